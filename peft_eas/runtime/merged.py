"""Models whose skipped MHAs are deleted: how they are built, saved and loaded.

A merged checkpoint has the model type `eas_<base model type>`; its config records under `eas` what was deleted, which
projections have gained a bias, and which adapters have stayed. Two locks keep it from being loaded into a stock class,
which would fill the deleted attention with random weights: in config.json, the place of `id2label` holds a sentence
where every stock config wants a number, so that its error shows the sentence; and each deleted MHA leaves an empty
tensor under the name of its first weight, whose shape no stock model accepts.

This module and those it imports need nothing but torch and transformers. Put together in one file, they are saved with
every merged checkpoint, which so loads without the package.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .adapter import InputAdapter, PropagationAdapter, RoutedAdapter
from .checkpoint import CODE_FILE, INSTALL, CheckpointMixin
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

TYPE_PREFIX = "eas_"  # in front of the base's model type
# Of the record `eas`. A process may load a checkpoint with the code of another one, which may be older.
FORMAT = 3
# In the config of a model that was merged and yet stays a stock one, as nothing was skipped and no bias is new.
FOLDED_MARK = "eas_merged"
# Python shows the first 200 characters of what is not a number.
LOCK_START = "EAS checkpoint: "
LOCK = (
    f"{LOCK_START}this class would fill its deleted attentions with random weights. "
    f"{INSTALL}, `import peft_eas`, and use an Auto class; or one with trust_remote_code=True."
)


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
                _keep_adapter(model, mha, kept[mha] if kept else _new_adapter(entry), record, hook)


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


def _new_adapter(entry: dict[str, Any]) -> RoutedAdapter:
    return (PropagationAdapter if entry["stands_for_skipped"] else InputAdapter)(**entry["shape"])


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
        raise ValueError(_misfit(model, name)) from error


def _misfit(model: nn.Module, name: str) -> str:
    return (
        f"The checkpoint's config says that {name} was changed by EAS, but {type(model).__name__} has no such module. "
        "Load it with the class that its config names under `architectures`, and leave `eas` as it is."
    )


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
        _check_record(config_dict["eas"], cls.model_type)
        return super().from_dict(_unlock(config_dict), **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        return json.dumps(_lock(json.loads(super().to_json_string(*args, **kwargs))), indent=2, sort_keys=True) + "\n"


def _check_record(record: dict[str, Any], model_type: str) -> None:
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


class MergedModelMixin(CheckpointMixin):
    """What every merged model class adds to the stock class: it is built, and then what its record names changes."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        _check_record(config.eas, config.model_type)
        super().__init__(config, *args, **kwargs)
        apply_record(self, config.eas)

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        module = CODE_FILE.removesuffix(".py")
        classes = {name: model_class for name, _, model_class in _auto_classes(cls.config_class)}
        classes["AutoConfig"] = cls.config_class
        return {name: f"{module}.{some_class.__name__}" for name, some_class in classes.items()}

    @classmethod
    def _base_classes(cls) -> set[type]:
        merged = [cls, *(model_class for _, _, model_class in _auto_classes(cls.config_class))]
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


_CLASSES: dict[type, type] = {}


def merged_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of merged models whose base has the config class `stock`; the same one at every call."""
    return _subclass(stock, MergedConfigMixin, model_type=f"{TYPE_PREFIX}{stock.model_type}")


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
    if not any(mapping.get(config_class, None) is model_class for _, _, mapping in _auto_mappings()):
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
    for _, auto_class, model_class in _auto_classes(config_class):
        if config_class not in auto_class._model_mapping:
            auto_class.register(config_class, model_class)


def _auto_classes(config_class: type[PreTrainedConfig]) -> Iterator[tuple[str, type, type[PreTrainedModel]]]:
    """Yields (name of an Auto class, that class, the merged model class that it shall load for `config_class`)."""
    stock = _stock_of(config_class, MergedConfigMixin)
    for name, auto_class, mapping in _auto_mappings():
        model_class = mapping.get(stock, None)
        if getattr(model_class, "config_class", None) is stock:
            yield name, auto_class, merged_model_class(model_class)


def _auto_mappings() -> Iterator[tuple[str, type, Any]]:
    """Yields (name of an Auto class, that class, its mapping from config classes to model classes)."""
    for name in modeling_auto.__all__:
        auto_class = getattr(modeling_auto, name)
        if (mapping := getattr(auto_class, "_model_mapping", None)) is not None:
            yield name, auto_class, mapping


def turn_into_merged(
    model: PreTrainedModel, record: dict[str, Any], kept: dict[str, RoutedAdapter | torch.Tensor]
) -> PreTrainedModel:
    """Applies `record` to a model in memory and makes it one of the classes above, in place; see `apply_record`."""
    apply_record(model, record, kept)
    record = _with_earlier_merges(record, getattr(model.config, "eas", None))
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


def _with_earlier_merges(record: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record of all merges into a model: what an earlier one added to an MHA that is deleted now is gone."""
    if earlier is None:
        return record
    skipped = {**earlier["skipped"], **record["skipped"]}
    biases = [name for name in earlier["biases"] if not name.startswith(tuple(f"{mha}." for mha in skipped))]
    shifts = {**earlier.get("shifts", {}), **record.get("shifts", {})}
    return {**record, "skipped": skipped, "biases": biases + record["biases"], "shifts": shifts}


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
    for _, _, mapping in _auto_mappings():
        registered += getattr(mapping, "_extra_content", {}).values()
    own = next((found for found in registered if getattr(found, "__name__", None) == name), None)
    return own or getattr(importlib.import_module("transformers"), name, None)


# The last module of this kind that is imported makes the classes, not one that lies beside another checkpoint.
_others = {key: value for key, value in CONFIG_MAPPING._extra_content.items() if not _has_base(key)}
CONFIG_MAPPING._extra_content = MergedTypes(_others)
