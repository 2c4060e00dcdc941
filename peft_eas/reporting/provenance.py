"""Where a tuned model comes from and how fast it is: facts that its config keeps, and that its model card tells."""

import functools
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    ModelCard,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from ..layers import AdaptedLayer, MHALayer
from ..version import __version__

CARD = "README.md"
LICENSE_TIMEOUT = 3.0  # seconds
# In a model that is not merged, the modules whose parameters EAS has added.
_ADDED = r"eas_\w+|modules_to_save|trainable_tokens_delta"


def origin(eas: BaseTuner, adapter_name: str) -> dict[str, Any]:
    """Where a model merged with this adapter comes from, as values for JSON: the merged config keeps it.

    `base_model` is the base's id on the Hub, or None; `base_name` is what to call it, without the path of a folder;
    `license` holds the fields about it of the base's own card; `candidates` and `kept` name the MHAs that may be
    skipped and those that never are. A base that was merged before, and has no id on the Hub, counts as the base that
    it came from.
    """
    config = eas.peft_config[adapter_name]
    base_config = getattr(eas.model, "config", None)
    earlier = (getattr(base_config, "eas", None) or {}).get("origin") or {}
    name = config.base_model_name_or_path or getattr(base_config, "_name_or_path", None) or None
    hub_id, unnamed = hub_id_of(name), f"a {getattr(base_config, 'model_type', 'torch')} model"
    base = {
        "base_model": hub_id,
        "base_name": hub_id or (Path(name).resolve().name if name else unnamed),
        "license": base_license(name),
        "base_parameters": size_of(eas.model, added_parameters(eas.model)),
    }
    if earlier and hub_id is None:  # merged before, and never published
        base |= {key: earlier[key] for key in base if key in earlier}
    # Those of an earlier merge, too, whose skipped MHAs are gone.
    candidates = list(
        dict.fromkeys([*earlier.get("candidates", ()), *_mhas_of(eas, adapter_name, never_skipped=False)])
    )
    kept = dict.fromkeys([*earlier.get("kept", ()), *_mhas_of(eas, adapter_name, never_skipped=True)])
    return {
        **base,
        "task_type": getattr(config.task_type, "value", config.task_type),
        "candidates": candidates,
        "kept": [name for name in kept if name not in candidates],
        "scores": config.scores,
        "fit_errors": getattr(config, "fit_errors", None),
        "search": getattr(config, "search", None),
        "r": config.r,
        "attention_r": config.attention_r,
        "output_r": config.output_r,
        "ffn_r": config.ffn_r,
        "paths": config.paths,
        "context": config.context,
        "trainable_parameters": sum(map(_size, _parameters_of(eas, adapter_name))),
        "peft_eas_version": __version__,
    }


def added_parameters(model: nn.Module) -> set[int]:
    """Ids of what EAS has added: adapters, copies of `modules_to_save` and of tokens, biases from a fold in place."""
    added = re.compile(rf"\.({_ADDED})\.")
    ids = {id(parameter) for name, parameter in model.named_parameters() if added.search(f".{name}")}
    layers = (module for module in model.modules() if isinstance(module, AdaptedLayer))
    return ids | {
        id(layer.projections[path].bias)
        for layer in layers
        for path, record in layer.fold_records.items()
        if not record.had_bias
    }


def size_of(module: nn.Module, but: Collection[int] = ()) -> int:
    """How many parameters a module has, but for those whose ids are in `but`."""
    return sum(_size(parameter) for parameter in module.parameters() if id(parameter) not in but)


def is_same_mha(name: str, relative: str) -> bool:
    """Whether an MHA's full name and one that is relative to some part of the model can be of one MHA."""
    return f".{name}".endswith(f".{relative}")


def _mhas_of(eas: BaseTuner, adapter_name: str, never_skipped: bool) -> list[str]:
    """Full names of the MHAs that the adapter never skips, or of those that it may, whichever adapter is active."""
    mhas = (module.candidate for module in eas.model.modules() if isinstance(module, MHALayer))
    own = (mha for mha in mhas if adapter_name in mha.configs)
    return [mha.name for mha in own if (adapter_name in mha.kept_by) == never_skipped]


def saved_numbers(eas: BaseTuner, adapter_name: str) -> int:
    """How many numbers the adapter's file holds: what is trained, and statistics such as the running context."""
    # Not by state_dict(), which in a distributed run may wait for the other processes.
    tensors = (*eas.named_parameters(), *eas.named_buffers())
    return sum(_size(tensor) for name, tensor in tensors if _is_of(adapter_name, name))


def _parameters_of(eas: BaseTuner, adapter_name: str) -> list[nn.Parameter]:
    """What is trained with an adapter: its own parameters, its copies of `modules_to_save`, its tokens."""
    named = (item for item in eas.named_parameters() if not item[0].endswith(".running_context"))
    return [parameter for name, parameter in named if _is_of(adapter_name, name)]


def _is_of(adapter_name: str, name: str) -> bool:
    return re.search(rf"\.({_ADDED})\.{re.escape(adapter_name)}(\.|$)", name) is not None


def _size(tensor: torch.Tensor) -> int:
    if type(tensor).__name__ == "Params4bit":  # bitsandbytes packs two values into a byte
        return 2 * tensor.numel() * tensor.element_size()
    return getattr(tensor, "ds_numel", tensor.numel())  # DeepSpeed's ZeRO-3 leaves empty ones behind


def hub_id_of(name: Any) -> str | None:
    """`name` if it can be a model's id on the Hub, None if it is a folder or no name at all."""
    if not isinstance(name, str) or not name or os.path.isdir(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def base_license(name: str | None) -> dict[str, Any]:
    """The fields of a model's own card that tell its license; none where there is no such card. Never raises.

    `name` is a folder or a model's id. The Hub is asked at most once per process and id, after the local cache.
    """
    hub_id = hub_id_of(name)
    if hub_id is not None:
        return _license_on_hub(hub_id)
    fields = _license_in(Path(name, CARD)) if name else {}
    # A link to a file in that folder leads nowhere from another one.
    return {key: value for key, value in fields.items() if key != "license_link" or str(value).startswith("http")}


@functools.cache
def _license_on_hub(hub_id: str) -> dict[str, Any]:
    try:
        path = try_to_load_from_cache(hub_id, CARD)
        if not isinstance(path, str):
            # Where there is no network, the download alone would try again for 23 seconds.
            get_hf_file_metadata(hf_hub_url(hub_id, CARD), timeout=LICENSE_TIMEOUT)
            path = hf_hub_download(hub_id, CARD)
    except Exception:  # whatever it is, a license that is not found is no reason not to save a model
        return {}
    fields = _license_in(Path(path))
    link = str(fields.get("license_link", ""))
    if link and not link.startswith("http"):  # a file beside that card
        fields["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return fields


def _license_in(path: Path) -> dict[str, Any]:
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception:  # as above
        return {}
    return {key: data.get(key) for key in ("license", "license_name", "license_link") if data.get(key)}


def record_speed(
    merged: PreTrainedModel,
    *,
    device: str,
    prefill: float | None = None,
    decode: float | None = None,
    against: str = "the base model",
    conditions: str = "",
) -> None:
    """Notes in a merged model's config how much faster it was measured to be, for its model card.

    Args:
        device: what it was measured on, such as "NVIDIA H100" or "2 CPU cores".
        prefill: how many times as fast a pass over a prompt is. decode: the same for a step of generation.
        against: what it was compared with. conditions: batch size, lengths, dtype and so on. A measurement takes the
            place of an earlier one with the same `device`, `against` and `conditions`.

    Raises:
        TypeError: if the model was not made by `merge_and_unload`. ValueError: without a factor, or for one that is
            not a finite number above 0.
    """
    if not isinstance(getattr(merged.config, "eas", None), dict):
        raise TypeError(
            f"record_speed was given a {type(merged).__name__} that no attention was deleted from. Give it the model "
            "that merge_and_unload() returns."
        )
    factors = {"prefill": prefill, "decode": decode}
    if prefill is None and decode is None:
        raise ValueError("record_speed was given neither prefill nor decode. Give at least one speed-up.")
    for name, factor in factors.items():
        if factor is not None and not (isinstance(factor, (int, float)) and 0 < factor < math.inf):
            raise ValueError(f"record_speed({name}={factor!r}): {name} must be a finite number above 0, such as 1.4.")
    key = {"device": device, "against": against, "conditions": conditions}
    others = [one for one in merged.config.eas.get("speed", []) if any(one[name] != key[name] for name in key)]
    merged.config.eas["speed"] = [*others, {**key, **factors}]
