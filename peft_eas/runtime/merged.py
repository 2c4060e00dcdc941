"""Models whose skipped MHAs are deleted: how they are built, saved and loaded.

A merged checkpoint has the model type `eas_<base model type>`; its config holds the record `eas` of what was changed.
Two locks keep it from being loaded into a stock class, which would fill the deleted attention with random weights: in
config.json, the place of `id2label` holds a sentence where every stock config wants a number, so that its error shows
the sentence; and each deleted MHA leaves an empty tensor under the name of its first weight, whose shape no stock
model accepts.

This module and those it imports need nothing but torch and transformers. Put together in one file, they are saved with
every merged checkpoint, which so loads without the package.
"""

import importlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .adapter import RoutedAdapter
from .batching import BatchingMixin
from .checkpoint import CODE_FILE, INSTALL, CheckpointMixin
from .record import _no, _yes, apply_record, check_record, checksum, with_earlier_merges  # noqa: F401  (old pickles)
from .vllm_backend import ATTENDS_BOTH_WAYS, check_pipeline, config_of_all_layers, show_kept_attentions

TYPE_PREFIX = "eas_"  # in front of the base's model type
# In the config of a model that was merged and yet stays a stock one, as nothing was skipped and no bias is new.
FOLDED_MARK = "eas_merged"
# Python shows the first 200 characters of what is not a number.
LOCK_START = "EAS checkpoint: "
LOCK = (
    f"{LOCK_START}this class would fill its deleted attentions with random weights. "
    f"{INSTALL}, `import peft_eas`, and use an Auto class; or one with trust_remote_code=True."
)


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
        check_record(config_dict["eas"], cls.model_type)
        return super().from_dict(_unlock(config_dict), **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        return json.dumps(_lock(json.loads(super().to_json_string(*args, **kwargs))), indent=2, sort_keys=True) + "\n"


def _lock(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Puts the lock into a config and its sub-configs, which stock classes can be loaded from as well."""
    parts = {key: _lock(v) for key, v in config_dict.items() if isinstance(v, dict) and "model_type" in v}
    return {**config_dict, **parts, "id2label": {LOCK: config_dict.get("id2label")}}


def _unlock(config_dict: dict[str, Any]) -> dict[str, Any]:
    unlocked = {key: _unlock(v) if isinstance(v, dict) else v for key, v in config_dict.items()}
    labels = unlocked.get("id2label")
    # By its start, for an older version's goes on in other words.
    lock = next((key for key in labels if str(key).startswith(LOCK_START)), None) if isinstance(labels, dict) else None
    if lock is not None:
        unlocked["id2label"] = labels[lock]
    return {key: v for key, v in unlocked.items() if (key, v) != ("id2label", None)}


class MergedModelMixin(BatchingMixin, CheckpointMixin):
    """What every merged model class adds to the stock class: it is built, and then what its record names changes."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_record(config.eas, type(config).model_type)  # not the instance's, which vLLM's hf_overrides may set
        whole = config_of_all_layers(config)
        super().__init__(whole, *args, **kwargs)
        apply_record(self, config.eas)
        if whole is not config:
            show_kept_attentions(self, config)

    @property
    def supports_pp_plan(self) -> bool:
        """Whether the model tells how its layers are shared out; who asks, as vLLM does, is about to do it."""
        check_pipeline(self.config)
        return super().supports_pp_plan

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        classes = {auto.__name__: model_class for auto, model_class in _auto_classes(cls.config_class)}
        classes["AutoConfig"] = cls.config_class
        return {auto: f"{CODE_FILE.removesuffix('.py')}.{own.__name__}" for auto, own in classes.items()}

    @classmethod
    def _base_classes(cls) -> set[type]:
        merged = [cls, *(model_class for _, model_class in _auto_classes(cls.config_class))]
        return {_stock_of(cls.config_class, MergedConfigMixin), *(_stock_of(c, CheckpointMixin) for c in merged)}

    # What transformers reads off the source of the stock class's module, it would look for in this one.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._stock_class()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._stock_class()._can_set_experts_implementation()

    @classmethod
    def _stock_class(cls) -> type[PreTrainedModel]:
        return _stock_of(cls, CheckpointMixin)

    @classmethod
    def _class_named(cls, name: str) -> type[PreTrainedModel]:
        return globals()[name] if name in globals() else __getattr__(name)


def _stock_of(merged: type, mixin: type) -> type:
    """The class that `merged` was made from; `mixin` is the last one before it."""
    return merged.__mro__[merged.__mro__.index(mixin) + 1]


_AUTO_CLASSES = [
    auto
    for auto in map(vars(modeling_auto).get, modeling_auto.__all__)
    if isinstance(auto, type) and getattr(auto, "_model_mapping", None) is not None
]
_CLASSES: dict[type, type] = {}  # by the stock class


def merged_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of merged models whose base has the config class `stock`; the same one at every call."""
    own = {"model_type": f"{TYPE_PREFIX}{stock.model_type}", "is_mm_prefix_lm": stock.model_type in ATTENDS_BOTH_WAYS}
    return _subclass(stock, MergedConfigMixin, **own)


def merged_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class of merged models whose base has the model class `stock`; the same one at every call."""
    config_class = merged_config_class(stock.config_class)
    return _subclass(stock, MergedModelMixin, config_class=config_class, config=config_class)


def _subclass(stock: type, mixin: type, **attributes: Any) -> type:
    if issubclass(stock, mixin):
        return stock
    if stock not in _CLASSES:
        name = f"EAS{stock.__name__}"
        # Of a base that has an `_auto_class`, transformers would copy the module, in the place of the merged one's.
        own = {"__module__": __name__, "__qualname__": name, "_auto_class": None}
        _CLASSES[stock] = type(name, (mixin, stock), {**own, **attributes})
        globals()[name] = _CLASSES[stock]  # where pickle looks for it
    return _CLASSES[stock]


class MergedTypes(dict):
    """What is registered with AutoConfig, and beside it a merged type for every model type that it knows.

    A type is looked up when it is met, so that none is missing, one that is registered later included, and importing
    this module imports no model's code.
    """

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _has_base(model_type)

    def __missing__(self, model_type: str) -> type[PreTrainedConfig]:
        if not _has_base(model_type):
            raise KeyError(model_type)
        return merged_config_class(CONFIG_MAPPING[model_type.removeprefix(TYPE_PREFIX)])


def _has_base(model_type: object) -> bool:
    """Whether it is the type of merged models whose base the Auto classes know."""
    is_merged = isinstance(model_type, str) and model_type.startswith(TYPE_PREFIX)
    return is_merged and model_type.removeprefix(TYPE_PREFIX) in CONFIG_MAPPING


def register_family(model_type: str) -> type[PreTrainedConfig]:
    """The config class of merged models whose base has the type `model_type`, which the Auto classes load.

    Nothing needs to be registered beforehand: they load merged models of every type that they know (`MergedTypes`).

    Raises:
        ValueError: if the Auto classes do not know `model_type`.
    """
    _check_type(model_type)
    return merged_config_class(CONFIG_MAPPING[model_type])


def check_registered(model_class: type[PreTrainedModel]) -> None:
    """Raises ValueError if the Auto classes would not load a model of this class, or would take another for it."""
    config_class = model_class.config_class
    _check_type(config_class.model_type)
    if model_class.__module__.partition(".")[0] == "transformers":
        return
    known = CONFIG_MAPPING[config_class.model_type]
    if known is not config_class:
        raise ValueError(
            f"To the Auto classes the model type {config_class.model_type!r} is {known.__name__}'s, whose model they "
            f"would load for this {model_class.__name__}, merged. Give its {config_class.__name__} a model_type of "
            "its own and register both classes: AutoConfig.register(...), and AutoModel.register(...) or that of its "
            "task."
        )
    if not any(auto._model_mapping.get(config_class, None) is model_class for auto in _AUTO_CLASSES):
        raise ValueError(
            f"No Auto class knows {model_class.__name__}, so that none could load it merged. Register it first: "
            f"AutoModel.register({config_class.__name__}, {model_class.__name__}), or that of its task."
        )


def _check_type(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"The Auto classes do not know the model type {model_type!r}, so that they could not load it merged. "
            f"Register its classes first: AutoConfig.register({model_type!r}, ...) and AutoModel.register(...), or "
            "that of its task."
        )


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Registers a merged model class with every Auto class that has one for the stock config.

    Called when a merged config is first read, so that importing the package imports no model's code.
    """
    for auto, model_class in _auto_classes(config_class):
        if config_class not in auto._model_mapping:
            auto.register(config_class, model_class)


def _auto_classes(config_class: type[PreTrainedConfig]) -> Iterator[tuple[type, type[PreTrainedModel]]]:
    """Yields (an Auto class, the merged model class that it shall load for `config_class`)."""
    stock = _stock_of(config_class, MergedConfigMixin)
    for auto in _AUTO_CLASSES:
        model_class = auto._model_mapping.get(stock, None)
        if getattr(model_class, "config_class", None) is stock:
            yield auto, merged_model_class(model_class)


def turn_into_merged(
    model: PreTrainedModel, record: dict[str, Any], kept: dict[str, RoutedAdapter | torch.Tensor]
) -> PreTrainedModel:
    """Applies `record` to a model in memory and makes it one of the classes above, in place; see `apply_record`."""
    apply_record(model, record, kept)
    record = with_earlier_merges(record, getattr(model.config, "eas", None))
    config_class = register_family(model.config_class.model_type)
    register_models(config_class)
    for module in model.modules():  # sub-models share the config object
        if getattr(module, "config", None) is model.config and isinstance(module, PreTrainedModel):
            # Names that the stock checkpoint had are not those of the merged one, which is saved as it is.
            module._weight_conversions = []
    model.config.__class__ = config_class
    model.config.__dict__.pop("model_type", None)  # which a config that was read from a file has of its own
    record = {**record, "family": config_class.model_type}
    model.config.eas = {**record, "checksum": checksum(record)}
    model.config._name_or_path = ""
    model.__class__ = merged_model_class(type(model))
    # A class hands out hidden states and attentions only once the base class's constructor has seen it.
    PreTrainedModel.__init__(object.__new__(type(model)), model.config)
    return model


def __getattr__(name: str) -> type:
    """Builds `EASLlamaForCausalLM` and the like on first use, so that they can be imported and unpickled by name."""
    if not name.startswith("EAS"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = _stock_named(name.removeprefix("EAS"))
    if stock is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: neither transformers nor its Auto classes know "
            f"{name.removeprefix('EAS')}. Import the module that defines and registers it first."
        )
    return (merged_config_class if issubclass(stock, PreTrainedConfig) else merged_model_class)(stock)


def _stock_named(name: str) -> type | None:
    """A base model's class: one that was saved beside this file, transformers', or one that is registered there."""
    if name in globals():
        return globals()[name]
    registered = list(CONFIG_MAPPING._extra_content.values())
    for auto in _AUTO_CLASSES:
        registered += auto._model_mapping._extra_content.values()
    own = next((found for found in registered if getattr(found, "__name__", None) == name), None)
    return own or getattr(importlib.import_module("transformers"), name, None)


# The last module of this kind that is imported makes the classes, not one that lies beside another checkpoint.
_others = {key: value for key, value in CONFIG_MAPPING._extra_content.items() if not _has_base(key)}
CONFIG_MAPPING._extra_content = MergedTypes(_others)
