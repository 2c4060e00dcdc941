"""What a config, a base model and an adapter's weights must fulfil together, checked before anything is changed."""

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..architectures import has_path
from ..config import EASConfig
from ..folding.offloaded import execution_device
from ..layers import AdaptedLayer, EASLayer
from ..runtime.forward import ADAPTER_NAME
from .targets import HEADS_OF_TASKS, Targets, block_width, is_merged, matches, shorten, skippable_mhas

_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# Classes whose head is made anew for a task.
_WITH_OWN_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|Detection|Segmentation|CTC)$")


def check_other_methods(model: nn.Module) -> None:
    """Raises a ValueError if the model has another PEFT method's adapters, which EAS would freeze and cannot merge."""
    own = (EASLayer, TrainableTokensLayer)  # the latter from an EAS adapter's trainable_token_indices, too
    others = ((n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, own))
    name, layer = next(others, (None, None))
    if layer is None and not hasattr(model, "prompt_encoder"):  # of PEFT's prompt learning
        return
    found = f"{name} is a {type(layer).__module__}.{type(layer).__name__}" if layer else "its prompt_encoder"
    raise ValueError(
        f"{type(model).__name__} has adapters of another PEFT method already ({found}). EAS would freeze them, and "
        "could not be merged into the weights behind them. Use one method after the other: train LoRA, merge it with "
        "base = model.merge_and_unload(), and give that base to EAS; or train EAS, merge it, and train LoRA on the "
        "merged model. To go without the other adapters, take them out with base = model.unload()."
    )


def warn_of_untrained_head(config: EASConfig, model: nn.Module) -> None:
    """Warns if a head of the model looks new and the adapter would leave it frozen.

    A head looks new if its last bias is zero throughout, as transformers draws it; or, where it has none, if the
    checkpoint was of another class, as its config tells.
    """
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    is_asked_for = isinstance(model, PreTrainedModel) and _WITH_OWN_HEAD.search(type(model).__name__)
    if config.inference_mode or not is_asked_for or base is None or base is model:
        return
    named = list(config.modules_to_save or ())
    trained = (*named, *HEADS_OF_TASKS.get(config.task_type, ()))
    frozen = []
    for head, child in model.named_children():
        inside = [f"{head}.{name}".rstrip(".") for name, _ in child.named_modules()]
        if child is not base and _looks_new(model, child) and not any(name.endswith(trained) for name in inside):
            frozen.append(head)
    if frozen:
        warnings.warn(
            f"{type(model).__name__} has a head that looks new ({', '.join(frozen)}), and this adapter leaves it "
            f"frozen: task_type={config.task_type and str(config.task_type)} and "
            f"modules_to_save={config.modules_to_save!r} do not name it. If it is to be trained, give "
            f"EASConfig(modules_to_save={[*named, *frozen]!r}).",
            stacklevel=2,
        )


def _looks_new(model: PreTrainedModel, head: nn.Module) -> bool:
    last = next((module for module in reversed(list(head.modules())) if isinstance(module, nn.Linear)), None)
    if last is None:
        return False
    if last.bias is not None:
        return last.bias.numel() > 0 and not last.bias.is_meta and not bool(last.bias.any())
    known = model.config.architectures
    return bool(known) and type(model).__name__ not in known


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
            does not divide a width, if an output adapter or one in front of a kept MHA's FFN has no place, if the
            model computes its FFN in chunks, or if it was merged already and has kept its adapters.
    """
    if any(f"{ADAPTER_NAME}_" in name for name, _ in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} was merged with context='prompt' and still has its adapters, which other EAS "
            "adapters cannot stand in front of. Merge with a frozen context (freeze_context()) to train it further."
        )
    widths = sorted({block_width(model, block, row) for block, row in targets.values()})
    shape = {"num_mhas": len(skippable_mhas(model)), "widths": widths, "merged": is_merged(model)}
    # Adapters that were saved before merged models were told apart may be for either.
    if config.base_shape is not None and {"merged": is_merged(model), **config.base_shape} != shape:
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
    heads = HEADS_OF_TASKS.get(config.task_type)
    has_lm_head = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    if heads and has_lm_head and not any(name.endswith(heads) for name, _ in model.named_modules()):
        raise ValueError(
            f"task_type={str(config.task_type)!r} trains a head called {' or '.join(heads)}, but "
            f"{type(model).__name__} has none, and a language model's head instead. Load the base by the task's Auto "
            "class, such as AutoModelForSequenceClassification, or choose another task_type, such as 'CAUSAL_LM'."
        )
    places = _output_projections(model, targets)
    if config.output_r and not places:
        raise ValueError(
            f"output_r={config.output_r} asks for adapters beside the projections that write the FFNs' outputs, but "
            "the table of architectures names none in this model; a mixture of experts has several. Leave output_r "
            "out, or name output_projection in the row of a model of your own."
        )
    missing = next((place for place, is_there in places.items() if not is_there), None)
    if config.output_r and missing is not None:
        block_name, path = missing
        name = type(model.get_submodule(block_name)).__name__
        raise ValueError(
            f"output_r={config.output_r}: the row of {name} in the table of architectures names {path!r} as the "
            f"projection that writes the FFN's output, but {block_name or name} has no such module. Set "
            f"output_projection in ARCHITECTURES[{name!r}], or leave output_r out."
        )
    if config.ffn_r and all(row.experts for _, row in targets.values()):
        raise ValueError(
            f"ffn_r={config.ffn_r} asks for adapters in front of the FFNs behind kept MHAs, but those of all targets "
            "are mixtures of experts, which get none. Leave ffn_r out."
        )
    chunk_size = getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)
    if chunk_size:
        raise ValueError(
            f"chunk_size_feed_forward={chunk_size} feeds the FFN a part of the tokens at a time, but the adapter in "
            "front of it takes all of a sequence. Set chunk_size_feed_forward to 0 in the model's config; a "
            "folded model takes any."
        )
    return shape


def output_rank(config: EASConfig, model: nn.Module, targets: Targets) -> int:
    """The rank of the output adapters: that of PIA by default, where they have their places."""
    if config.output_r is not None:
        return config.output_r
    places = _output_projections(model, targets).values()
    # An adapter that was saved by an earlier version knows its base's shape, and no such rank.
    return config.r if config.base_shape is None and places and all(places) else 0


def _output_projections(model: nn.Module, targets: Targets) -> dict[tuple[str, str], bool]:
    """Whether the projections that rows name are there, by their block's name and their path within."""
    return {
        (block, row.output_projection): has_path(model.get_submodule(block), row.output_projection)
        for block, row in targets.values()
        if row.output_projection is not None
    }


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
    # A file has all that stands for an MHA, or nothing of it: not PIA without an output adapter that there is. So it
    # is with what a kept one has.
    begun = {
        (layers[path].candidate, layers[path].stands_for_skipped, name)
        for (path, name), tensors in weights.items()
        if tensors
    }
    placed = {f"{path}{name}.{key}" for (path, name), tensors in weights.items() for key in tensors}
    problems = [
        f"it has {key}, for which there is no place in the model"
        for key in given or own  # none that is given at all has another prefix
        if key not in placed and not any(_is_of_another_set(key, layers, name) for name in loaded)
    ]
    for (path, name), tensors in weights.items():
        layer = layers[path]
        is_fixed = layer.candidate.configs[name].skipped_modules is not None
        is_begun = (layer.candidate, layer.stands_for_skipped, name) in begun
        if is_begun or (is_fixed and name in loaded):
            problems += _misfits(layer.adapters[name].state_dict(), tensors, f"{path}{name}.")
    if problems:
        raise ValueError(
            f"The file's EAS weights do not fit this model: {problems[0]} (problem 1 of {len(problems)}). Load them "
            "on the base model, and with the adapter_config.json, that they were saved with. A run goes on with the "
            "ranks that it began with; where it had no such adapters, with EASConfig(output_r=0, ffn_r=0)."
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


def sharded_parameter(model: nn.Module) -> str | None:
    """Name of a parameter of `model` that lies in shards on several ranks, or None."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)


def check_whole(model: nn.Module) -> None:
    """Raises a ValueError if `model` lies in shards on several ranks, where nothing can be folded into it."""
    sharded = sharded_parameter(model)
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
