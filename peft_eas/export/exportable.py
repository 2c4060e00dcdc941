"""Which merged models other engines can express in their own classes, and the parts of those that they can.

They know one kind of model whose layers may lack an attention, DeciLM, of Llama-like blocks.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

CLASSES = ("EASLlamaForCausalLM", "EASMistralForCausalLM", "EASQwen2ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
UNEXPORTED = (
    "Without an export, run what save_pretrained() writes: with transformers, or with vLLM and the options "
    "--trust-remote-code --model-impl transformers."
)


@dataclass(frozen=True)
class Exportable:
    """A merged model that has passed all checks that do not depend on the engine.

    Attributes:
        config: its config; `head_dim` and `rope_parameters` are set.
        weights: by their names in transformers, without the empty tensors that mark deleted attentions and without
            the output head if that is the embedding; (out, in) for projections, (width,) for norms and biases.
        skipped: layers without an attention.
        rope_factors: (head_dim / 2,) float32, by what each of the rotary embedding's default frequencies is divided;
            None for the default frequencies.
        tied: whether the embedding is the output head.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    weights: dict[str, Tensor]
    skipped: frozenset[int]
    rope_factors: Tensor | None
    tied: bool


def is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def take_apart(model: PreTrainedModel | str | os.PathLike) -> Exportable:
    """The parts of a merged model, or of one that is loaded from its folder.

    Raises:
        TypeError: if `model` is neither a transformers model nor a folder.
        ValueError: if it is not a merged model, or has a part that DeciLM models do not have.
    """
    if isinstance(model, PreTrainedModel):
        _check_config(model.config, type(model).__name__)
    elif is_path(model):
        model = _load(Path(model))
    else:
        raise TypeError(
            f"Received {type(model).__name__}, which is neither a merged model nor the folder of one. Call "
            "merge_and_unload() on an EAS model and pass what it returns."
        )
    return _parts(model)


def _load(folder: Path) -> PreTrainedModel:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, not a merged model. Load it on its base with PeftModel.from_pretrained(), "
            "call merge_and_unload() and pass what it returns."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a folder with a config.json. Pass the folder that the merged model's save_pretrained() "
            "has written, or the model itself."
        )
    config = AutoConfig.from_pretrained(folder)
    _check_config(config, (config.architectures or [type(config).__name__])[0])
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def _check_config(config: PreTrainedConfig, class_name: str) -> None:
    record = getattr(config, "eas", None)
    if not isinstance(record, dict):
        raise ValueError(
            f"{class_name} is not a merged EAS model: its config has no record `eas`. Pass what merge_and_unload() "
            "returned; models that EAS has not changed have their own ways into vLLM and llama.cpp."
        )
    if record.get("context", "running") != "running":
        raise ValueError(
            f"This model was merged with context={record['context']!r}: its weights depend on each prompt, which "
            "takes transformers and peft_eas. For other engines, call freeze_context() before the end of training "
            '(or load the adapter with context="running") and merge again.'
        )
    if class_name not in CLASSES:
        raise ValueError(
            f"{class_name} does not fit DeciLM's layout, the one in which other engines know deleted attentions; "
            f"{', '.join(CLASSES)} do. {UNEXPORTED}"
        )
    skipped = _skipped(config)
    if len(skipped) == config.num_hidden_layers:
        raise ValueError(
            "All attentions of this model are deleted, and no other engine runs a model without any. Use "
            "transformers, or merge an adapter that keeps one."
        )
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    types = layer_types or ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    sliding = [i for i, kind in enumerate(types) if i not in skipped and kind != "full_attention"]
    if sliding:
        raise ValueError(
            f"The attentions of layers {sliding} see a sliding window ({window} tokens), which DeciLM models do not "
            f"have. {UNEXPORTED}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"The FFN's activation is {config.hidden_act!r}, but DeciLM models have 'silu' only. {UNEXPORTED}"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"The position embedding {rope} is not among those that are exported: rope_type {', '.join(ROPE_TYPES)}, "
            f"over the whole head. {UNEXPORTED}"
        )


def _parts(model: PreTrainedModel) -> Exportable:
    config, skipped = model.config, _skipped(model.config)
    markers = tuple(f"model.layers.{i}.self_attn." for i in skipped)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(markers)}
    types = sorted(
        {
            str(value.dtype) if type(value) is torch.Tensor else type(value).__name__
            for value in weights.values()
            if value.dtype not in DTYPES or value.is_meta or type(value) is not torch.Tensor
        }
    )
    if types:
        raise ValueError(
            f"The export needs weights in memory, in float32, float16 or bfloat16, but some are {', '.join(types)} or "
            "offloaded. Load the model without offloading; if it is quantised, call its dequantize() first, or merge "
            "into a base without quantisation."
        )
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied:
        weights.pop("lm_head.weight")
    required, optional = _names(config.num_hidden_layers, skipped, tied)
    misfits = sorted((weights.keys() - required - optional) | (required - weights.keys()))
    if misfits:
        raise ValueError(
            f"The merged model has or lacks weights that a {type(model).__name__} should not: {misfits[:5]}. Pass the "
            "model as merge_and_unload() returned it, without other adapters."
        )
    return Exportable(config, model.generation_config, weights, skipped, _rope_factors(model), tied)


def _names(num_layers: int, skipped: frozenset[int], tied: bool) -> tuple[set[str], set[str]]:
    """Names of the weights that a model must have, and of those that it may have."""
    required = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    optional = set()
    for i in range(num_layers):
        projections = MLP if i in skipped else ATTENTION + MLP
        norms = ["post_attention_layernorm"] if i in skipped else ["input_layernorm", "post_attention_layernorm"]
        required |= {f"model.layers.{i}.{name}.weight" for name in (*projections, *norms)}
        optional |= {f"model.layers.{i}.{name}.bias" for name in projections}
    return required, optional


def _skipped(config: PreTrainedConfig) -> frozenset[int]:
    return frozenset(entry["layer_idx"] for entry in config.eas["skipped"].values())


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    # A new module, because the model's own frequencies are rounded where the model was cast.
    actual = type(model.model.rotary_emb)(model.config).inv_freq.double().cpu()
    exponents = torch.arange(len(actual), dtype=torch.float64) / len(actual)
    return (rope["rope_theta"] ** -exponents / actual).float()
