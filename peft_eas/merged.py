"""Models whose skipped MHAs are deleted: how they are built, saved and loaded.

A merged checkpoint has the model type `eas_<base model type>`; its config records under `eas` what was deleted and
which projections have gained a bias. Two locks keep it from being loaded into a stock class, which would fill the
deleted attention with random weights: in config.json, the place of `id2label` holds a sentence where every stock
config wants a number, so that its error shows the sentence; and each deleted MHA leaves an empty tensor under the name
of its first weight, whose shape no stock model accepts.

This module needs nothing but torch and transformers.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "llava", "gpt2", "bert", "vit", "clip_vision_model", "clip")
# Python shows the first 200 characters of what is not a number.
LOCK = (
    "EAS checkpoint: this class would fill its deleted attentions with random weights. "
    "Run `pip install peft_eas`, then `import peft_eas` and load it with an Auto class."
)

# Called with the model and the folder, on the main process, whenever a merged model has been saved or is pushed.
AFTER_SAVE: list[Callable[[PreTrainedModel, str], None]] = []


class EmptyLayer(DynamicLayer):
    """A growing cache layer of no heads: like any other, but that its length does not depend on its size."""

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0


def advance_cache(cache: Cache | None, layer_idx: int | None, hidden_states: torch.Tensor) -> None:
    """Lets the cache's slot of a skipped MHA count the tokens of `hidden_states`, (B, T, d), and hold nothing else.

    The slot gets keys and values of no heads: they take no memory, but lengths, masks, sliding windows, beams and
    cropping go on as for any other layer, whichever layer is asked.
    """
    if cache is None or layer_idx is None:
        return
    cache = getattr(cache, "self_attention_cache", cache)
    slot = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if slot is not None and slot.is_initialized and slot.keys.dim() == 4 and slot.keys.shape[1] > 0:
        raise ValueError(
            f"The KV cache holds keys of layer {layer_idx}, whose attention is skipped now. It was filled by another "
            "model, with another skip set, or by early_initialization(). Start with a new cache."
        )
    nothing = hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], 0)
    cache.update(nothing, nothing, layer_idx)
    slot = cache.layers[layer_idx]
    if type(slot) is DynamicLayer:  # the others count their tokens
        slot.__class__ = EmptyLayer


def skipped_output(hidden_states: torch.Tensor) -> torch.Tensor:
    """What a skipped MHA adds to the residual stream: zeros in the shape of `hidden_states`, never written out."""
    return hidden_states.new_zeros(()).expand_as(hidden_states)


class SkippedMHA(nn.Module):
    """Stands where a deleted MHA was. It has no parameters and computes nothing, but for a post-norm's kept norm.

    Args:
        layer_idx: slot of the KV cache, or None for models without one.
        marker: name of the first weight of the deleted MHA; an empty tensor takes its place in the checkpoint.
        kept_norm: name of the norm inside the MHA that a post-norm block still applies, or None. norm: that norm.
    """

    def __init__(
        self, layer_idx: int | None, marker: str, kept_norm: str | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.kept_norm = kept_norm
        *parents, last = marker.split(".")
        _container(self, parents, Marker).register_buffer(last, torch.empty(0))
        if kept_norm is not None:
            *parents, last = kept_norm.split(".")
            _container(self, parents, nn.Module).add_module(last, norm)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`, without the marker, whose place other methods would take for a projection."""
        return (item for item in super().named_modules(*args, **kwargs) if not isinstance(item[1], Marker))

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Returns (what the block adds to its residual, no attention weights); shapes as the deleted MHA's."""
        advance_cache(past_key_values, self.layer_idx, hidden_states)
        if self.kept_norm is not None:
            return self.get_submodule(self.kept_norm)(hidden_states), None
        return skipped_output(hidden_states), None


class Marker(nn.Module):
    """Leads to the marker of a deleted MHA, under the names that lead to the MHA's first weight."""


def _container(module: nn.Module, path: list[str], kind: type[nn.Module]) -> nn.Module:
    for name in path:
        if not hasattr(module, name):
            module.add_module(name, kind())
        module = getattr(module, name)
    return module


def delete_attention(model: nn.Module, record: dict[str, Any]) -> None:
    """Deletes from `model` what `record`, the config's `eas`, names as skipped, and adds the biases it names.

    Raises:
        ValueError: if the model has no module of a recorded name.
    """
    for name, entry in record["skipped"].items():
        mha = _find(model, name)
        norm = mha.get_submodule(entry["kept_norm"]) if entry["kept_norm"] else None
        stub = SkippedMHA(entry["layer_idx"], entry["marker"], entry["kept_norm"], norm)
        _replace(model, name, stub.to(next(mha.parameters()).device))
        if entry["input_norm"] is not None:
            _replace(model, entry["input_norm"], nn.Identity())
    for name in record["biases"]:
        projection = _find(model, name)
        if projection.bias is None:
            weight = projection.weight
            projection.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))


def _resolve(model: nn.Module, name: str) -> str:
    """A name relative to the base model, as it is in `model`, be that the base model or one with a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}.{name}" if prefix and hasattr(model, prefix) else name


def relative_name(model: nn.Module, name: str) -> str:
    """The inverse: a name in `model`, relative to its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix and hasattr(model, prefix) else name


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(_resolve(model, name))
    except AttributeError as error:
        raise ValueError(
            f"The checkpoint's config says that {name} was changed by EAS, but {type(model).__name__} has no such "
            "module. Load it with the class that its config names under `architectures`, and leave `eas` as it is."
        ) from error


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    _find(model, name)
    parent, _, child = _resolve(model, name).rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


class MergedConfigMixin:
    """What every `EAS…Config` adds to the stock config: the record `eas`, and the lock described above."""

    eas: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        register_models(cls)
        if not isinstance(config_dict.get("eas"), dict):
            raise ValueError(
                f"A config of type {cls.model_type} needs the record `eas` of what was deleted, but it is missing. "
                "Take config.json as merge_and_unload() and save_pretrained() wrote it."
            )
        return super().from_dict(_unlock(config_dict), **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        return json.dumps(_lock(json.loads(super().to_json_string(*args, **kwargs))), indent=2, sort_keys=True) + "\n"


def _lock(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Puts the lock into a config and its sub-configs, which stock classes can be loaded from as well."""
    parts = {key: _lock(v) for key, v in config_dict.items() if isinstance(v, dict) and "model_type" in v}
    return {**config_dict, **parts, "id2label": {LOCK: config_dict.get("id2label")}}


def _unlock(config_dict: dict[str, Any]) -> dict[str, Any]:
    unlocked = {key: _unlock(v) if isinstance(v, dict) else v for key, v in config_dict.items()}
    if isinstance(unlocked.get("id2label"), dict) and LOCK in unlocked["id2label"]:
        unlocked["id2label"] = unlocked["id2label"][LOCK]
    return {key: v for key, v in unlocked.items() if (key, v) != ("id2label", None)}


class MergedModelMixin:
    """What every merged model class adds to the stock class: it is built, and then its deleted parts are taken out."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        delete_attention(self, config.eas)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As the stock class; then calls the functions in `AFTER_SAVE`."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self._call_after_save(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # push_to_hub has just put the Hub's card, or an empty one, in the place of the one that was saved.
        self._call_after_save(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _call_after_save(self, folder: str | os.PathLike) -> None:
        for function in AFTER_SAVE:
            function(self, os.fspath(folder))


_CLASSES: dict[type, type] = {}


def merged_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of merged models whose base has the config class `stock`; the same one at every call."""
    return _subclass(stock, MergedConfigMixin, model_type=f"eas_{stock.model_type}")


def merged_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class of merged models whose base has the model class `stock`; the same one at every call."""
    config_class = merged_config_class(stock.config_class)
    return _subclass(stock, MergedModelMixin, config_class=config_class, config=config_class)


def _subclass(stock: type, mixin: type, **attributes: Any) -> type:
    if issubclass(stock, mixin):
        return stock
    if stock not in _CLASSES:
        name = f"EAS{stock.__name__}"
        _CLASSES[stock] = type(name, (mixin, stock), {"__module__": __name__, "__qualname__": name, **attributes})
        globals()[name] = _CLASSES[stock]  # where pickle looks for it
    return _CLASSES[stock]


def register_family(model_type: str) -> type[PreTrainedConfig]:
    """Lets the Auto classes load merged models whose base has the type `model_type`.

    The families of `FAMILIES` are registered on import; call this for one whose row you added yourself.
    """
    config_class = merged_config_class(CONFIG_MAPPING[model_type])
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    return config_class


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Registers a merged model class with every Auto class that has one for the stock config.

    Called when a merged config is first read, so that importing the package imports no model's code.
    """
    stock = config_class.__mro__[config_class.__mro__.index(MergedConfigMixin) + 1]
    for name in modeling_auto.__all__:
        auto_class = getattr(modeling_auto, name)
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is None or config_class in mapping or stock not in mapping:
            continue
        model_class = mapping[stock]
        if getattr(model_class, "config_class", None) is stock:
            auto_class.register(config_class, merged_model_class(model_class))


def turn_into_merged(model: PreTrainedModel, record: dict[str, Any]) -> PreTrainedModel:
    """Deletes what `record` names from a model in memory and makes it one of the classes above, in place."""
    delete_attention(model, record)
    record = _with_earlier_merges(record, getattr(model.config, "eas", None))
    config_class = register_family(model.config_class.model_type)
    register_models(config_class)
    for module in model.modules():  # sub-models share the config object
        if getattr(module, "config", None) is model.config and isinstance(module, PreTrainedModel):
            # Names that the stock checkpoint had are not those of the merged one, which is saved as it is.
            module._weight_conversions = []
    model.config.__class__ = config_class
    model.config.eas = record
    model.config._name_or_path = ""
    model.__class__ = merged_model_class(type(model))
    return model


def _with_earlier_merges(record: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record of all merges into a model: what an earlier one added to an MHA that is deleted now is gone."""
    if earlier is None:
        return record
    skipped = {**earlier["skipped"], **record["skipped"]}
    biases = [name for name in earlier["biases"] if not name.startswith(tuple(f"{mha}." for mha in skipped))]
    return {**record, "skipped": skipped, "biases": biases + record["biases"]}


def __getattr__(name: str) -> type:
    """Builds `EASLlamaForCausalLM` and the like on first use, so that they can be imported and unpickled by name."""
    if not name.startswith("EAS"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(importlib.import_module("transformers"), name.removeprefix("EAS"))
    return (merged_config_class if issubclass(stock, PreTrainedConfig) else merged_model_class)(stock)


for _family in FAMILIES:
    register_family(_family)
