"""What a config, a base model and an adapter's weights must fulfil together, checked before anything is changed."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import Architecture, at_path, default_targets, find_mhas, has_path, join, reasons_against, rows_of
from .config import EASConfig
from .forward import ADAPTER_NAME
from .layer import AdaptedLayer, EASLayer
from .merged import FOLDED_MARK
from .offloaded import execution_device
from .skipped import SkippedMHA

# What PEFT adds to modules_to_save for some tasks, whether the model has it or not.
_HEADS = ("classifier", "score", "qa_outputs")
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")

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


def _is_merged(model: nn.Module) -> bool:
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
    if _is_merged(model) and (config.base_shape or {}).get("merged") is False:
        raise ValueError(
            f"This adapter was made for a model before its merge, but {type(model).__name__} is a merged one, into "
            "which it may have gone already. Use the merged model as it is (without the adapter's files beside its "
            "own, which transformers would apply), or load the adapter on the base model it was trained on "
            f"({config.base_model_name_or_path})."
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
    for given in config.modules_to_save or ():
        found = [name for name in names if name.endswith(given)]  # as PEFT does
        both = [n for n in found if any(f"{n}.".startswith(w) or w.startswith(f"{n}.") for w in wrapped)]
        if both:
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r} names {shorten(both)}, which EAS wraps, or which lies in "
                "or around what it wraps. Take it out of modules_to_save, or the MHA beside it out of the targets "
                "with exclude_modules."
            )
        is_of_trl = given == "lm_head" and config.task_type == "SEQ_CLS"  # RewardTrainer with tokens of a template
        if not found and given not in _HEADS and not is_of_trl:
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


def check_skip_fields(config: EASConfig, targets: Iterable[str]) -> None:
    """Raises a ValueError unless `skipped_modules` and `num_skip` fit the target MHAs that are not kept."""
    candidates = [name for name in targets if not matches(config.kept_modules, name)]
    both = [name for name in config.skipped_modules or () if name in targets and name not in candidates]
    if both:
        raise ValueError(
            f"skipped_modules names {shorten(both)}, which kept_modules={config.kept_modules!r} never skips. Take it "
            "out of one of them."
        )
    check_names(config.skipped_modules or (), candidates)
    if (config.num_skip or 0) > len(candidates):
        raise ValueError(
            f"num_skip={config.num_skip}, but this model has {len(candidates)} MHAs that may be skipped "
            f"({shorten(candidates)}). Choose num_skip from 0 to {len(candidates)}."
        )


def check_names(names: Iterable[str], candidates: list[str]) -> list[str]:
    """Returns `names` as a list. Raises a ValueError unless they are candidates, each named once."""
    names = list(names) if isinstance(names, Iterable) and not isinstance(names, (str, bytes)) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"skipped_modules={names!r} was received. Give a list of full names of candidates: {shorten(candidates)}."
        )
    unknown = [repr(name) for name in names if name not in candidates]
    if unknown:
        raise ValueError(
            f"skipped_modules names {shorten(unknown)}, which cannot be skipped. Use full names of candidates: "
            f"{shorten(candidates)}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"skipped_modules names an MHA more than once: {names}. Name each once.")
    return names


def check_base(config: EASConfig, model: nn.Module, targets: Targets) -> dict[str, Any]:
    """Returns the base model's shape: its number of MHAs, the targets' widths, and whether it was merged with EAS.

    Raises:
        ValueError: if the adapter was made for another shape or is for a task that the model is not for, if `groups`
            does not divide a width, if the model computes its FFN in chunks, or if it was merged already and has kept
            its adapters.
    """
    if any(f"{ADAPTER_NAME}_" in name for name, _ in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} was merged with context='prompt' and still has its adapters, which other EAS "
            "adapters cannot stand in front of. Merge with a frozen context (freeze_context()) to train it further."
        )
    widths = sorted({block_width(model, block, row) for block, row in targets.values()})
    shape = {"num_mhas": len(skippable_mhas(model)), "widths": widths, "merged": _is_merged(model)}
    # Adapters that were saved before merged models were told apart may be for either.
    if config.base_shape is not None and {"merged": _is_merged(model), **config.base_shape} != shape:
        raise ValueError(
            f"This adapter was made for a base model with {config.base_shape}, but this one has {shape}. Load it on "
            f"the base model it was trained on ({config.base_model_name_or_path})."
        )
    for width in widths:
        if width % config.groups:
            raise ValueError(
                f"groups={config.groups} does not divide the model's width, {width}. Choose a divisor of it."
            )
    if config.task_type in _GENERATING and not hasattr(model, "prepare_inputs_for_generation"):
        kinds = {row.kind for _, row in targets.values()}
        if "decoder" not in kinds:
            raise ValueError(
                f"task_type={str(config.task_type)!r} is for models that generate text, but {type(model).__name__} "
                f"does not, and its MHAs are of the kind {', '.join(sorted(kinds))}. Choose another task_type, such "
                "as 'SEQ_CLS' or 'FEATURE_EXTRACTION', or leave it out."
            )
    chunk_size = getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)
    if chunk_size:
        raise ValueError(
            f"chunk_size_feed_forward={chunk_size} feeds the FFN a part of the tokens at a time, but the adapter in "
            "front of it takes all of a sequence. Set chunk_size_feed_forward to 0 in the model's config; a "
            "folded model takes any."
        )
    return shape


def block_width(model: nn.Module, block_name: str, row: Architecture) -> int:
    """Width d of what a block's projections read."""
    return _width(at_path(model.get_submodule(block_name), row.ffn_projections[0]))


def _width(projection: nn.Module) -> int:
    # nn.Linear, quantised or not, tells the width of its input; Conv1D stores weights of shape (width, outputs).
    return (
        getattr(projection, "in_features", None) or projection.weight.shape[0 if isinstance(projection, Conv1D) else 1]
    )


def check_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """Refuses EAS weights that do not fit the model, whose keys start with `prefix` in `state_dict`.

    Where the skip set is open, an adapter may be absent as a whole, for a checkpoint holds only what is used. Where it
    is fixed, weights that only another set would use are no mistake: a checkpoint within a search has them.

    Raises:
        ValueError: for weights of a layer that the model does not have, of another shape, or incomplete.
    """
    own = {key: value for key, value in state_dict.items() if ".eas_" in key}
    given = {key: value for key, value in own.items() if key.startswith(prefix)}
    layers = {
        f"{prefix}{name}.{layer.adapter_layer_names[0]}.": layer
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLayer)
    }
    weights = {
        (path, name): {k.removeprefix(f"{path}{name}."): v for k, v in given.items() if k.startswith(f"{path}{name}.")}
        for path, layer in layers.items()
        for name in layer.adapters
    }
    loaded = {name for (_, name), tensors in weights.items() if tensors}
    placed = {f"{path}{name}.{key}" for (path, name), tensors in weights.items() for key in tensors}
    problems = [
        f"it has {key}, for which there is no place in the model"
        for key in given or own  # none that is given at all has another prefix
        if key not in placed and not any(_is_of_another_set(key, layers, name) for name in loaded)
    ]
    for (path, name), tensors in weights.items():
        is_fixed = layers[path].candidate.configs[name].skipped_modules is not None
        if tensors or (is_fixed and name in loaded):
            problems += _misfits(layers[path].adapters[name].state_dict(), tensors, f"{path}{name}.")
    if problems:
        raise ValueError(
            f"The file's EAS weights do not fit this model: {problems[0]} (problem 1 of {len(problems)}). Load them "
            "on the base model, and with the adapter_config.json, that they were saved with."
        )


def _is_of_another_set(key: str, layers: dict[str, AdaptedLayer], name: str) -> bool:
    """Whether `key` would have a place in the adapter `name` if its skip set, which is fixed, were another one."""
    layer = next((layer for path, layer in layers.items() if key.startswith(path)), None)
    config = layer and layer.candidate.configs.get(name)
    is_unused = config and config.skipped_modules is not None and name not in layer.adapters
    return bool(is_unused and layer.could_use(name))


def _misfits(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], prefix: str) -> Iterator[str]:
    for key, tensor in own.items():
        if key not in given:
            yield f"{prefix}{key} is missing"
        elif given[key].shape != tensor.shape:
            yield f"{prefix}{key} has shape {tuple(given[key].shape)} instead of {tuple(tensor.shape)}"
        elif tensor.is_floating_point() and not given[key].is_floating_point():
            yield f"{prefix}{key} has dtype {given[key].dtype}, but weights are floating-point numbers"
    for key in given:
        if key not in own:
            yield f"it has {prefix}{key}, for which there is no place in the model"


def shorten(names: Iterable[str], most: int = 6) -> str:
    """Names as a list to read, cut where it is long."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "") or "none"


def check_whole(model: nn.Module) -> None:
    """Raises a ValueError if `model` lies in shards on several ranks, where nothing can be folded into it."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    sharded = next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
    if sharded is not None:
        raise ValueError(
            f"The model is sharded by FSDP ({sharded} is a DTensor), and adapters are merged into whole weights only. "
            "Save the adapter with the full state dict (accelerator.get_state_dict(model)), load it onto the base "
            "model in a new process, and merge there."
        )


def check_not_offloaded(layers: Iterable[AdaptedLayer]) -> None:
    """Raises a ValueError if an adapter would stay in front of weights that device_map keeps on the CPU or on disk."""
    for layer in layers:
        if execution_device(layer.base_layer) is not None:
            raise ValueError(
                f"device_map offloads {layer.candidate.name} or the FFN behind it, in front of which context='prompt' "
                "would keep an adapter. Load the base with a device_map that offloads nothing, such as 'cpu', and the "
                "adapter on it, and merge there; or merge with a frozen context, whose adapters are folded."
            )


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
