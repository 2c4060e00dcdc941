"""What vLLM's backend for transformers' models (`model_impl="transformers"`) needs of a merged model.

The backend has the model built from its config, twice, then puts its own attention into each layer below the config's
`num_hidden_layers`, and looks for it by the attention's `layer_idx`. A layer without an attention is an error to it.
So it is shown the kept attentions alone, as the layers of a shorter model, while the model is built from the config of
all layers; the KV cache is then that of the kept attentions. No other state than the config's is needed, which is the
engine's own copy: it remembers what it said of all layers, for the next time.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import copy
import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .forward import SHIFT_NAME

# Types of the stock configs of models whose text attends to the tokens of an image in both directions. vLLM knows them
# by the type, or else by an attribute of the config.
ATTENDS_BOTH_WAYS = ("gemma3", "paligemma")
# In the config of the text model that the backend holds: what it said of all layers.
_ALL_LAYERS = "eas_all_layers"
# In a config of all layers that a model was built from, so that the body of a model with a head takes it as it is.
_IS_WHOLE = "eas_is_whole"


def config_of_all_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """What to build a model from: a copy of `config` that knows all layers where vLLM builds it, else `config`.

    Raises:
        ValueError: if vLLM builds a model that keeps adapters for each prompt's own context, or one with latent
            attentions whose type it was not told; or if SGLang builds one without some attentions, or with
            adapters: its loader knows no markers, and its batches have no prompts of their own.
    """
    if _text_config(config, "sglang") is not None and (config.eas["skipped"] or config.eas.get("context") == "prompt"):
        raise ValueError(
            "SGLang cannot run a model without some of its attentions, or with adapters. Serve this folder with vLLM "
            "and --trust-remote-code --model-impl transformers."
        )
    text = _text_config(config)
    if text is None or getattr(config, _IS_WHOLE, False):
        return config
    if config.eas.get("context") == "prompt":
        raise ValueError(
            'This model was merged with context="prompt": its weights depend on each prompt, which takes '
            "transformers. For vLLM, call freeze_context() before the end of training (or load the adapter with "
            'context="running") and merge again.'
        )
    family = config.eas["family"]
    if getattr(text, "kv_lora_rank", None) is not None and text.model_type == family:
        stock = family.partition("_")[2]
        raise ValueError(
            f"vLLM knows latent attentions by the model's type, which here is {family!r}, and would get the size of "
            f'their cache wrong. Tell it the base\'s: --hf-overrides \'{{"model_type": "{stock}"}}\', or in Python '
            f"hf_overrides={{'model_type': {stock!r}}}."
        )
    whole = copy.deepcopy(config)
    for name, value in getattr(text, _ALL_LAYERS, {}).items():
        setattr(_text_config(whole), name, value)
    setattr(whole, _IS_WHOLE, True)
    return whole


def show_kept_attentions(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Makes `model`, built from a config of all layers, look to vLLM like one of its kept attentions alone.

    `config` is the one that vLLM holds.

    Raises:
        ValueError: if no attention is left, or several kinds of them are deleted, as in an encoder-decoder.
    """
    _ignore_markers(model)
    for module in model.modules():
        if hasattr(module, SHIFT_NAME):  # vLLM gives a mixture of experts another forward pass, in the place of ours
            module.__dict__.pop("forward", None)
            module.register_forward_pre_hook(_add_shift)
    shown, whole = _text_config(config), _text_config(model.config)
    skipped = deleted_layers(model, is_text_model=whole is model.config)
    if not skipped:
        return
    if len(skipped) == whole.num_hidden_layers:
        raise ValueError(
            "All attentions of this model are deleted, and vLLM runs no model without any. Use transformers, or merge "
            "an adapter that keeps one."
        )
    everything = {name: getattr(whole, name, None) for name in ("num_hidden_layers", "layer_types")}
    for attention in number_kept_attentions(model, whole, shown, skipped):
        attention.config = shown  # in which vLLM chooses between its own attentions, later on
    setattr(shown, _ALL_LAYERS, {name: value for name, value in everything.items() if value is not None})


def number_kept_attentions(
    model: PreTrainedModel, whole: PreTrainedConfig, shown: PreTrainedConfig, skipped: set[int]
) -> list[nn.Module]:
    """Numbers the attentions that are not `skipped`, of which alone `shown` is made to tell, and returns them.

    `whole` is the config of all layers that they hold.
    """
    kept = [layer for layer in range(whole.num_hidden_layers) if layer not in skipped]
    if getattr(whole, "layer_types", None) is not None:
        shown.layer_types = [whole.layer_types[layer] for layer in kept]
    shown.num_hidden_layers = len(kept)
    modules = [module for module in model.modules() if getattr(module, "config", None) is whole]
    attentions = [module for module in modules if getattr(module, "layer_idx", None) in kept]
    for attention in attentions:
        attention.layer_idx = kept.index(attention.layer_idx)
    return attentions


def check_pipeline(config: PreTrainedConfig) -> None:
    """Raises a ValueError where vLLM, whose pipeline splits by the layers that it knows, would leave layers out."""
    text = _text_config(config)
    if text is not None and config.eas["skipped"]:
        raise ValueError(
            "vLLM splits a pipeline by its number of attentions, and would lose layers of this model, some of which "
            "have none. Set pipeline_parallel_size=1, and use tensor_parallel_size."
        )


def _text_config(config: PreTrainedConfig, engine: str = "vllm") -> PreTrainedConfig | None:
    """The part of `config` whose attentions are the engine's; None where another library builds the model."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    names = [str(getattr(part, "_attn_implementation", None)) for part in parts]
    return next((part for part, name in zip(parts, names) if name.startswith(engine)), None)


def _ignore_markers(model: PreTrainedModel) -> None:
    """Lets vLLM's loader pass over the markers of the deleted attentions, which are no weights.

    And over nothing else: a stock class's patterns are for what old checkpoints held, and GPT-2's would take biases.
    """
    markers = [f"{name}.{entry['marker']}" for name, entry in model.config.eas["skipped"].items()]
    model._keys_to_ignore_on_load_unexpected = [rf"(^|\.){re.escape(marker)}$" for marker in markers]


def deleted_layers(model: PreTrainedModel, is_text_model: bool) -> set[int]:
    """The layers whose attention is deleted, of those with a KV cache: not a vision tower's.

    Raises:
        ValueError: if several kinds of attentions are deleted, as in an encoder-decoder.
    """
    entries = model.config.eas["skipped"].items()
    names = [name for name, entry in entries if is_text_model or entry["layer_idx"] is not None]
    parts = [re.fullmatch(r"(.+)\.(\d+)\.(.+)", name).groups() for name in names]
    kinds = {f"{blocks}.N.{mha}" for blocks, _, mha in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"Attentions of several kinds are deleted from this model, {', '.join(sorted(kinds))}, and vLLM knows "
            "one per layer. Use transformers."
        )
    return {int(layer) for _, layer, _ in parts}


def _add_shift(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Pre-hook on a mixture of experts: adds its shift, (d,), to the hidden states, (…, d), that it is given."""
    return args[0] + getattr(module, SHIFT_NAME), *args[1:]
