"""Which MHAs of a model an adapter is for: found by its config, and refused where they do not fit."""

import inspect
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import Architecture, at_path, default_targets, find_mhas, has_path, join, reasons_against, rows_of
from ..config import EASConfig
from ..folding.offloaded import execution_device
from ..layers import EASLayer
from ..runtime.merged import FOLDED_MARK
from ..runtime.skipped import SkippedMHA

# What PEFT trains beside the adapters for a task, and names in modules_to_save, whether the model has it or not.
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# TRL's RewardTrainer names lm_head besides, for tokens of a chat template.
_ADDED_HEADS = {**HEADS_OF_TASKS, "SEQ_CLS": (*HEADS_OF_TASKS["SEQ_CLS"], "lm_head")}

# By one of which a projection tells its width.
_OF_PROJECTIONS = ("weight", "in_features")

# By full name of an MHA: the full name of its block, and the block's row of the table.
Targets = dict[str, tuple[str, Architecture]]


def skippable_mhas(model: nn.Module) -> Targets:
    """Every MHA of the model that the table knows and that is not deleted already, in the model's order.

    Raises:
        ValueError: if a row of the table does not fit the block that it is for.
    """
    found = {}
    for name, block, row in find_mhas(model):
        if not isinstance(at_path(model, name), SkippedMHA):
            _check_row(model.get_submodule(block), block, row)
            found[name] = (block, row)
    return found


def _check_row(block: nn.Module, block_name: str, row: Architecture) -> None:
    name = type(block).__name__
    head = f"The row of {name} in the table of architectures names"
    advice = f"Set ARCHITECTURES[{name!r}] to an Architecture with this model's own names."
    for path in (*row.paths, *(row.branch or ())):
        if not has_path(block, path):
            raise ValueError(f"{head} {path!r}, but {block_name or name} has no such module. {advice}")
    if row.experts and sum(other.ffn == row.ffn for other in rows_of(block)) > 1:
        raise ValueError(
            f"The rows of {name} in the table of architectures have several MHAs in front of the mixture of experts "
            f"{row.ffn!r}, whose folded adapters would need more than the one vector that can stay in front of it. "
            f"Leave one of them in ARCHITECTURES[{name!r}]."
        )
    widths = {}
    for path in (*row.mha_projections, *row.ffn_projections):
        projection = at_path(block, path)
        if not isinstance(projection, nn.Parameter) and not any(has_path(projection, a) for a in _OF_PROJECTIONS):
            raise ValueError(
                f"{head} {path!r} as a projection, but it is a {type(projection).__name__}, which has no weight. Name "
                f"the linear layers that read the input of the MHA and of the FFN. {advice}"
            )
        if isinstance(projection, Conv1D) or has_path(projection, "in_features"):
            widths[path] = _width(projection)
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"{head} projections that read inputs of different widths ({widths}), but one adapter's output is of one "
            f"width. Name those that read the input of the MHA and of the FFN. {advice}"
        )


def is_merged(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return isinstance(getattr(config, "eas", None), dict) or bool(getattr(config, FOLDED_MARK, False))


def find_targets(config: EASConfig, model: nn.Module) -> Targets:
    """The MHAs that the config names, those that it keeps among them, in the model's order.

    Raises:
        ValueError: if a part of the model is wrapped by torch.compile; if it is merged and the config its base's; if
            the targets match none, or something else; if all are excluded, or none is excluded or kept by a name that
            is to be; if modules_to_save names what is wrapped, or nothing.
    """
    compiled = next((name for name, module in model.named_modules() if "_orig_mod" in module._modules), None)
    if compiled is not None:
        raise ValueError(
            f"torch.compile has wrapped {compiled or 'the model'}, so that its weights are named otherwise "
            "(`_orig_mod`), and neither the adapter nor a merged model would fit any other. Give the module inside, "
            "`._orig_mod`, to get_peft_model, and compile what that returns, or compile in place with "
            "module.compile(), which renames nothing."
        )
    if is_merged(model) and (config.base_shape or {}).get("merged") is False:
        raise ValueError(
            f"This adapter was made for a model before its merge, but {type(model).__name__} is a merged one, into "
            "which it may have gone already. Use the merged model as it is (without the adapter's files beside its "
            "own, which transformers would apply), or load the adapter on "
            f"{config.base_model_name_or_path or 'the base model that it was trained on'}."
        )
    known = skippable_mhas(model)
    names = set(default_targets(model)) & set(known)
    if config.target_modules is not None:
        names = {name for name in _outer_names(model) if matches(config.target_modules, name)}
    unknown = sorted(names - set(known))
    if unknown or not names:
        what = f"{shorten(unknown)}, which cannot be skipped," if unknown else "nothing"
        raise ValueError(
            f"target_modules={config.target_modules!r} matches {what} in {type(model).__name__}."
            f"{reasons_against(model, unknown)} Its MHAs are: "
            f"{shorten(known)}. Name some of these, give a regular expression that matches only them, or leave "
            "target_modules out."
        )
    names |= {name for name in known if matches(config.kept_modules, name)}
    targets = {name: known[name] for name in known if name in names and not matches(config.exclude_modules, name)}
    if not targets:
        raise ValueError(
            f"exclude_modules={config.exclude_modules!r} leaves none of the {len(names)} target MHAs "
            f"({shorten(sorted(names))}). Exclude fewer."
        )
    for field in ("exclude_modules", "kept_modules"):
        patterns = getattr(config, field) or ()
        for pattern in [patterns] if isinstance(patterns, str) else sorted(patterns):
            if not any(matches(pattern if isinstance(patterns, str) else {pattern}, name) for name in known):
                raise ValueError(
                    f"{field}={patterns!r}: {pattern!r} matches nothing that could be skipped. The MHAs of "
                    f"{type(model).__name__} are: {shorten(known)}. Name some of these, or leave it out."
                )
    _check_modules_to_save(config, model, targets)
    _check_dispatched(model, targets)
    return targets


def _check_modules_to_save(config: EASConfig, model: nn.Module, targets: Targets) -> None:
    wrapped = {
        join(block, path) + "." for block, row in targets.values() for path in (row.mha, row.ffn, *row.deleted_norms)
    }
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules() if name]
    added = _ADDED_HEADS.get(config.task_type, ())
    if config.task_type is None:  # beside an adapter with a task, PEFT adds that task's heads
        there = {name for name in config.modules_to_save or () if any(n.endswith(name) for n in names)}
        added = {head for heads in _ADDED_HEADS.values() if there & set(heads) for head in heads}
    if config.inference_mode:  # trained already, maybe by an earlier version, which let all of these pass
        added = {head for heads in _ADDED_HEADS.values() for head in heads}
    for given in config.modules_to_save or ():
        found = [name for name in names if name.endswith(given)]  # as PEFT does
        both = [n for n in found if any(f"{n}.".startswith(w) or w.startswith(f"{n}.") for w in wrapped)]
        if both:
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r} names {shorten(both)}, which EAS wraps, or which lies in "
                "or around what it wraps. Take it out of modules_to_save, or the MHA beside it out of the targets "
                "with exclude_modules."
            )
        if not found and given not in added:
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r}: {given!r} is no module of {type(model).__name__}. Give "
                "names, or their endings, as model.named_modules() lists them."
            )


def _outer_names(model: nn.Module) -> Iterator[str]:
    """Names of the model's modules as the base model has them, without what lies inside a wrapper."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, EASLayer) else None
        if name:
            yield name


def matches(patterns: set[str] | str | None, name: str) -> bool:
    """Whether the full name of a module is one that `target_modules` and its like name, as PEFT reads them."""
    if not patterns:
        return False
    probe = EASConfig(target_modules=patterns if isinstance(patterns, str) else list(patterns))
    return bool(check_target_module_exists(probe, name))


def prompt_root(config: EASConfig, model: nn.Module, targets: Targets) -> nn.Module:
    """The module whose inputs tell the prompt: the outermost transformers model around the targets, else `model`.

    Raises:
        ValueError: if it has no keyword arguments in which the prompt could be handed on, and the context needs it.
    """
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, PreTrainedModel) and all(target.startswith(prefix) for target in targets):
            return module
    parameters = inspect.signature(model.forward).parameters.values()
    if config.context == "prompt" and not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"{type(model).__name__}.forward() takes no **kwargs, in which the prompt would be handed on to the "
            "attentions. Let it take **kwargs and pass them on to its blocks, or use context='running'."
        )
    return model


def _check_dispatched(model: nn.Module, targets: Targets) -> None:
    """Raises a ValueError if weights of the targets' blocks are on disk, and nothing would fetch them."""
    device_map = getattr(model, "hf_device_map", None) or {}
    for block_name in dict.fromkeys(block for block, _ in targets.values()) if "disk" in device_map.values() else ():
        block = model.get_submodule(block_name)
        if any(parameter.is_meta for parameter in block.parameters()) and execution_device(block) is None:
            raise ValueError(
                f"device_map keeps weights of {block_name} on disk, from where PeftModel.from_pretrained() does not "
                "bring them back for an EAS adapter. Load the base again, and then the adapter with model = "
                "get_peft_model(base, EASConfig.from_pretrained(folder)) and set_peft_model_state_dict(model, "
                "load_peft_weights(folder)); or choose a device_map that keeps nothing on disk."
            )


def block_width(model: nn.Module, block_name: str, row: Architecture) -> int:
    """Width d of what a block's projections read."""
    return _width(at_path(model.get_submodule(block_name), row.ffn_projections[0]))


def _width(projection: nn.Module) -> int:
    # nn.Linear, quantised or not, tells the width of its input; Conv1D stores weights of shape (width, outputs).
    return (
        getattr(projection, "in_features", None) or projection.weight.shape[0 if isinstance(projection, Conv1D) else 1]
    )


def shorten(names: Iterable[str], most: int = 6) -> str:
    """Names as a list to read, cut where it is long."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "") or "none"
