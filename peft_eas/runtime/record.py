"""The record `eas` in the config of a merged model: how it is checked, and how it is applied to a model.

It tells, by names relative to the base model, which MHAs are deleted, which projections have gained a bias, and which
adapters have stayed.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapter import InputAdapter, PropagationAdapter, RoutedAdapter
from .checkpoint import INSTALL
from .forward import (
    SHIFT_NAME,
    AdaptedForward,
    Argument,
    Attended,
    BranchForward,
    Carrier,
    PromptedAdapter,
    ShiftedForward,
)
from .prompt_hook import PromptHook
from .skipped import SkippedMHA, slot_of

# Of the record. A process may load a checkpoint with the code of another one, which may be older.
FORMAT = 3


def check_record(record: dict[str, Any], model_type: str) -> None:
    """Raises a ValueError unless the record, of a config of the type `model_type`, is as this code has written it."""
    if record.get("format") != FORMAT:
        raise ValueError(
            f"The record `eas` in the checkpoint's config has format {record.get('format')!r}, but this code reads "
            f"format {FORMAT}. {INSTALL} as it is now, `import peft_eas`, and load it in a new process."
        )
    if record.get("checksum") != checksum(record) or record["family"] != model_type:
        raise ValueError(
            "The record `eas` in config.json, of what EAS has changed in the model, is not as it was saved: the "
            "weights beside it would be put to a use that they were not trained for. Restore config.json. To skip "
            "other attentions, merge the adapter again."
        )


def checksum(record: dict[str, Any]) -> str:
    """Checksum of what a record says about the model's function."""
    counted = {key: value for key, value in record.items() if key not in ("checksum", "origin", "speed")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def with_earlier_merges(record: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record of all merges into a model: what an earlier one added to an MHA that is deleted now is gone."""
    if earlier is None:
        return record
    skipped = {**earlier["skipped"], **record["skipped"]}
    biases = [name for name in earlier["biases"] if not name.startswith(tuple(f"{mha}." for mha in skipped))]
    shifts = {**earlier.get("shifts", {}), **record.get("shifts", {})}
    return {**record, "skipped": skipped, "biases": biases + record["biases"], "shifts": shifts}


def apply_record(
    model: PreTrainedModel, record: dict[str, Any], kept: dict[str, RoutedAdapter | torch.Tensor] | None = None
) -> None:
    """Deletes from `model` what `record`, the config's `eas`, names as skipped, and adds the biases it names.

    Where the context is each prompt's own, the adapters that the record names are put in place, and in front of a
    mixture of experts the shifts: those of `kept`, by name, or new ones for a checkpoint's weights.

    Raises:
        ValueError: if the model has no module of a recorded name.
    """
    for name, entry in record["skipped"].items():
        mha = _find(model, name)
        if isinstance(mha, SkippedMHA):  # by the body, which is a merged model itself
            continue
        norm = mha.get_submodule(entry["kept_norm"]) if entry["kept_norm"] else None
        cross_slot = slot_of(mha) if entry["layer_idx"] is None else None
        stub = SkippedMHA(entry["layer_idx"], entry["marker"], entry["kept_norm"], norm, entry["returns"], cross_slot)
        device = next(mha.parameters()).device
        if device.type == "meta" and any(hasattr(part, "_hf_hook") for part in mha.modules()):
            device = "cpu"  # of weights that are offloaded, not those of a model that is being loaded
        _replace(model, name, stub.to(device))
        for norm_name in entry["norms"]:
            _replace(model, norm_name, nn.Identity())
        if entry["branch"] is not None:
            block = _find(model, entry["block"])
            _set_forward(block, BranchForward(block, entry["branch"], entry["layer_idx"]))
    for name in record["biases"]:
        projection = _find(model, name)
        weight = getattr(projection, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(_misfit(model, name))
        if projection.bias is None:
            projection.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
    for name, width in record.get("shifts", {}).items():
        ffn = _find(model, name)
        if not hasattr(ffn, SHIFT_NAME):
            weight = next(parameter for parameter in ffn.parameters() if parameter.is_floating_point())
            shift = kept[name] if kept else torch.zeros(width)
            setattr(ffn, SHIFT_NAME, nn.Parameter(shift.to(weight.device, weight.dtype), weight.requires_grad))
            _set_forward(ffn, ShiftedForward(ffn))
    if record.get("context") == "prompt":
        # Under another head than a language model's, labels mark no answer among the tokens.
        has_answer = record["answer_in_input"] and (model.can_generate() or not hasattr(model, "num_labels"))
        of_prompt = [entry for entry in record["adapters"].values() if entry["tokens"] in ("prompt", "input")]
        blocks = (_find(model, entry["block"]) for entry in of_prompt)
        hook = PromptHook(model, blocks, _yes, answer_in_input=_yes if has_answer else _no, is_kept=_yes)
        for mha, entry in sorted(record["adapters"].items(), key=lambda item: item[1]["position"]):
            if not hasattr(_find(model, entry["block"]), entry["name"]):
                adapter_class = PropagationAdapter if entry["stands_for_skipped"] else InputAdapter
                _keep_adapter(model, mha, kept[mha] if kept else adapter_class(**entry["shape"]), record, hook)


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


def _keep_adapter(
    model: PreTrainedModel, mha: str, adapter: RoutedAdapter, record: dict[str, Any], hook: PromptHook
) -> None:
    """Puts `adapter` in front of the MHA of the name `mha`, or of the FFN behind it if it is deleted."""
    entry = record["adapters"][mha]
    block, module = _find(model, entry["block"]), _find(model, entry["module"])
    weight = next(module.parameters(), None)
    if weight is None:
        raise ValueError(_misfit(model, entry["module"]))
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else model.dtype  # quantised
    # It belongs to the block, for not every module takes another child: a Sequential would call it.
    block.add_module(entry["name"], adapter.to(weight.device, dtype))
    prompted = PromptedAdapter(adapter, entry["layer_idx"], entry["tokens"])
    skipped = record["skipped"].get(mha)
    if skipped is not None and skipped["branch"] is not None:
        branch = _forward_of(block)
        branch.prompted[entry["child"]], branch.current = prompted, hook.current
        return
    carrier = None
    if entry["stands_for_skipped"] or entry["attended"] is not None:
        attended = entry["attended"] and Attended(*(part and Argument(*part) for part in entry["attended"]))
        carrier = Carrier(hook.current, attended)
        _find(model, mha).register_forward_pre_hook(carrier, with_kwargs=True)
    if not isinstance(_forward_of(module), AdaptedForward):
        _set_forward(module, AdaptedForward(module, hook.current, is_counted=entry["stands_for_skipped"]))
    _forward_of(module).prompted.append((prompted, carrier))


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """The module's forward pass, which may lie inside a hook of accelerate's (`device_map`)."""
    return getattr(module, "_old_forward", module.forward)


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    setattr(module, "_old_forward" if hasattr(module, "_old_forward") else "forward", forward)


def _resolve(model: nn.Module, name: str) -> str:
    """A name relative to the base model, as it is in `model`, be that the base model or one with a head."""
    return _prefix(model) + name


def relative_name(model: nn.Module, name: str) -> str:
    """The inverse: a name in `model`, relative to its base model."""
    return name.removeprefix(_prefix(model))


def _prefix(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(_resolve(model, name))
    except AttributeError as error:
        raise ValueError(_misfit(model, name)) from error


def _misfit(model: nn.Module, name: str) -> str:
    return (
        f"The checkpoint's config says that {name} was changed by EAS, but {type(model).__name__} has no such module. "
        "Load it with the class that its config names under `architectures`, and leave `eas` as it is."
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    _find(model, name)
    model.set_submodule(_resolve(model, name), module.train(model.training))
