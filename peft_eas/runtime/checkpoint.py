"""How a merged model is saved, pushed and loaded: with the code that another process needs; complete, or not at all.

Needs nothing but torch, transformers and what they need themselves: it is a part of the file that it writes.
"""

import ast
import contextlib
import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from .forward import ADAPTER_NAME

# The package is not on PyPI.
INSTALL = "Install peft_eas from its repository"
CODE_FILE = "modeling_eas.py"
# The modules of which that file is made, in the order in which they need each other.
CODE_PARTS = (
    *("adapter", "prompt", "prompt_hook", "context_cache"),
    *("skipped", "forward", "checkpoint", "record", "vllm_backend", "batching", "merged"),
)
# What else is done to the folder of a saved model; the package writes the model card.
AFTER_SAVE: list[Callable[[PreTrainedModel, Path], None]] = []


@functools.cache
def code_text() -> str:
    """Text of the file that lets a process without the package load a merged checkpoint."""
    here = Path(__file__)
    if here.name == CODE_FILE:
        return here.read_text(encoding="utf-8")
    sources = [(here.parent / f"{part}.py").read_text(encoding="utf-8") for part in CODE_PARTS]
    head = '"""Loads a merged EAS checkpoint. Written by peft_eas (Apache-2.0); do not edit."""'
    return "\n\n".join([head, *map(_without_relative_imports, sources)])


def code_files(base_classes: Iterable[type]) -> dict[str, str]:
    """By name, the code file, and where `base_classes`, of the base model, are not transformers', what they come from.

    A module that needs no other of its own package is copied and imported from there; any other is imported under its
    own name, so that transformers asks for its package.

    Raises:
        ValueError: for classes that no other process could import.
    """
    by_module: dict[str, set[str]] = {}
    for base_class in base_classes:
        if base_class.__module__.partition(".")[0] != "transformers":
            by_module.setdefault(base_class.__module__, set()).add(base_class.__name__)
    files, imports = {}, []
    for module, names in sorted(by_module.items()):
        if module == "__main__":
            raise ValueError(
                f"{', '.join(sorted(names))} of this model's base are defined in the script that runs (__main__), "
                "where nobody can import them from. Move them into a module, import it, load the adapter on the base "
                "there and merge again."
            )
        source = Path(sys.modules[module].__file__)
        text, place = source.read_text(encoding="utf-8"), module
        if _stands_alone(text, module.partition(".")[0]):
            place = f".{source.stem}"
            files[source.name] = text
        elif module.startswith("transformers_modules."):
            raise ValueError(
                f"{module}, the code of this model's base, was loaded with trust_remote_code and needs other files "
                f"beside it, which a merged checkpoint does not hold. Put it all into one file, {source.name}, or "
                "install it as a package, load the base and the adapter again, and merge."
            )
        imports.append(f"from {place} import {', '.join(sorted(names))}\n")
    code = code_text()
    added = "".join(line for line in imports if line not in code)
    return {**files, CODE_FILE: f"{code}\n\n{added}" if added else code}


def _stands_alone(source: str, package: str) -> bool:
    """Whether a module of `package` imports nothing of it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    is_relative = any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in nodes)
    return not is_relative and package not in {name.partition(".")[0] for name in names}


def _without_relative_imports(source: str) -> str:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


class CheckpointMixin:
    """Saving, pushing and loading of a merged model class, which tells `_auto_map` and `_class_named`."""

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        """By Auto class, the class of the code file that it shall load."""
        raise NotImplementedError

    @classmethod
    def _base_classes(cls) -> set[type]:
        """The base model's own classes that this class and those of `_auto_map` are made from."""
        raise NotImplementedError

    @classmethod
    def _class_named(cls, name: str) -> type[PreTrainedModel]:
        """The merged model class of that name; raises AttributeError if no base is known for it."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As the stock class, but never with random weights in the place of missing ones; a new head may be random.

        Raises:
            OSError, ValueError: if files of the checkpoint are missing, damaged, or do not fit its config; if an EAS
                adapter lies beside it that was made for another model.
        """
        advice = f"Copy or download {pretrained_model_name_or_path} again, with config.json as it was saved."
        if is_peft_available() and (in_the_way := adapter_in_the_way(pretrained_model_name_or_path, **kwargs)):
            raise ValueError(in_the_way)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"The checkpoint's weights cannot be read ({error}). {advice}") from error
        except OSError as error:
            raise OSError(f"{error} {advice}") from error
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                "The checkpoint's weights do not have the shapes that its config asks for, in it the record `eas` of "
                f"the skipped attentions. {advice}"
            ) from error
        name = (model.config.architectures or [None])[0]
        lost = sorted(set(info["missing_keys"]) & _saved_keys(model))
        below = [{key.partition(".")[2] for key in keys} for keys in (lost, info["unexpected_keys"])]
        if name != cls.__name__ and below[0] & below[1]:
            raise ValueError(
                f"{cls.__name__} names its weights otherwise than {name}, from which the checkpoint was saved: as in "
                f"the stock class, {len(lost)} would stay random, such as {lost[0]}. Load it with AutoModel, save "
                "that, and load the result."
            )
        strange = [key for key in info["unexpected_keys"] if f".{ADAPTER_NAME}_" in key or name == cls.__name__]
        if strange:
            raise ValueError(
                f"The checkpoint has {len(strange)} weights that its config tells nothing of, such as "
                f"{sorted(strange)[0]}: they belong to another model. {advice}"
            )
        if lost:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} of the weights that it was saved with, such as {lost[0]}. {advice}"
            )
        if any(parameter.is_meta for name, parameter in model.named_parameters() if f".{ADAPTER_NAME}_" in name):
            raise ValueError(
                "device_map offloads adapters that this model has kept for each prompt's own context, which are not "
                "brought back when they are needed. Choose a device_map that offloads nothing, or merge the model "
                "with a frozen context."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        processing_class: Any = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the stock class, and beside the weights the code that loads them, the model card, and `processing_class`.

        Args:
            processing_class: a tokenizer or processor to save in the same folder, or None.

        Raises:
            ValueError: before anything is written, for a base whose code no other process could import.
        """
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        files = code_files(self._base_classes())
        self.config.auto_map = self._auto_map()
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        for function in AFTER_SAVE:
            function(self, folder)
        if in_the_way := adapter_in_the_way(folder):
            warnings.warn(f"This merged model was saved, but will not load from there. {in_the_way}", stacklevel=2)
        if push_to_hub:
            self.push_to_hub(
                hub.pop("repo_id", folder.resolve().name),
                processing_class=processing_class,
                max_shard_size=kwargs.get("max_shard_size", "50GB"),
                token=kwargs.get("token"),
                **hub,
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processing_class: Any = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Uploads what `save_pretrained` writes in one commit; a model card in the repository is kept and extended.

        Args:
            repo_id: name of the repository, which is created if there is none. tags: more tags for the model card.
            revision: branch to push to, created if there is none. kwargs: `commit_message`, `commit_description` and
                `create_pr`, as in `HfApi.upload_folder`.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kwargs.setdefault("commit_message", f"Upload {type(self).__name__}")
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):  # no card yet
                api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
            self.save_pretrained(folder, processing_class=processing_class, max_shard_size=max_shard_size)
            if tags:
                _add_tags(Path(folder) / "README.md", tags)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=[".cache/*"], **kwargs
            )


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def adapter_in_the_way(folder: str | os.PathLike | None, **kwargs: Any) -> str | None:
    """What to say of an EAS adapter in the merged model's `folder` or repository that does not belong on top of it.

    transformers applies an adapter that it finds beside a model. None if there is none, or if it was trained on the
    merged model itself. kwargs: among others those of the Hub.
    """
    if folder is None:
        return None
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
    path = find_adapter_config_file(folder, **hub)
    config = json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    base = config.get("base_model_name_or_path")
    is_its_own = (config.get("base_shape") or {}).get("merged") or (
        bool(base) and Path(base).absolute() == Path(folder).absolute()
    )
    if config.get("peft_type") != "EAS" or is_its_own:
        return None
    return (
        f"Beside the merged model, {folder} holds an EAS adapter (adapter_config.json, adapter_model.safetensors) of "
        "another model, probably its base. transformers would apply it as well: twice, if it is the one that was "
        "merged. Move both files to a folder of their own, and load the adapter on its base from there."
    )


def _saved_keys(model: PreTrainedModel) -> set[str]:
    """Names, as in `model`, of the weights of the class that the checkpoint of `model` was saved from."""
    name = (model.config.architectures or [type(model).__name__])[0]
    if name == type(model).__name__:
        return set(model.state_dict())
    try:
        saved_class = model._class_named(name)
    except AttributeError:
        return set(model.state_dict())
    with torch.device("meta"):
        saved = saved_class(model.config)
    names = {key.removeprefix(f"{saved.base_model_prefix}.") for key in saved.state_dict()}
    return {key for key in model.state_dict() if key.removeprefix(f"{model.base_model_prefix}.") in names}


def _add_tags(path: Path, tags: list[str]) -> None:
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(path)
