"""Merged models in other engines' formats: `to_decilm` (vLLM, MLX-LM) and `to_gguf` (llama.cpp).

All of them know one kind of model whose layers may lack an attention, DeciLM, of Llama-like blocks. Whatever does not
fit is refused before a file is written.
"""

import itertools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from . import configuration_decilm, gguf_file
from .exportable import ATTENTION, MLP, UNEXPORTED, Exportable, head_dim, is_path, take_apart
from .vocabulary import read_vocabulary

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates"),
)

Dtype = Literal["f32", "f16", "bf16", "q8_0"]


def to_decilm(
    model: PreTrainedModel | str | os.PathLike,
    folder: str | os.PathLike,
    processing_class: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Writes a merged model as a checkpoint in DeciLM's layout, which MLX-LM loads, and vLLM with trust_remote_code.

    The layout is that of Nemotron-NAS ("nemotron-nas", the class DeciLMForCausalLM): config.json with `block_configs`,
    the small `configuration_decilm.py` that reads them, safetensors, generation_config.json, and the tokenizer's
    files. The weights keep their dtype. There is one switch for all attentions' biases and one for all FFNs', so
    projections without them get zeros.

    vLLM's class refuses a model whose first attention is deleted, of which a warning tells. MLX-LM refuses one whose
    FFNs' width is no multiple of 256, or whose heads' together is not the model's.

    Args:
        model: what `merge_and_unload()` returned, or the folder in which it was saved.
        folder: where to write; it must not exist or be empty.
        processing_class: the tokenizer. By default the tokenizer's files in the folder `model`, if there are any.
        max_shard_size: largest safetensors file, in bytes or as "5GB".

    Returns:
        `folder`.

    Raises:
        TypeError: if `model` is neither a transformers model nor a folder.
        ValueError: if the model is not a merged one or has a part that DeciLM does not have (the message says which),
            if neither engine would take it, or if `folder` is not empty. Nothing is written then.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"The export to {folder} needs a folder that is empty or does not exist yet. Name another.")
    parts = take_apart(model)
    _check_first_layer(parts)
    config, weights = _decilm_config(parts)
    with _temporary_beside(folder) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(configuration_decilm.__file__, temporary / "configuration_decilm.py")
        save_torch_state_dict(weights, temporary, max_shard_size=max_shard_size)
        if parts.generation_config is not None:
            parts.generation_config.save_pretrained(temporary)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        elif is_path(model):
            _copy_tokenizer(Path(model), temporary)
        if folder.is_dir():
            folder.rmdir()
        temporary.rename(folder)
    return folder


to_vllm = to_decilm  # the old name


def to_gguf(
    model: PreTrainedModel | str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | os.PathLike,
    dtype: Dtype | None = None,
) -> Path:
    """Writes a merged model as a GGUF file (architecture "deci"), which llama.cpp and what builds on it run.

    Norms, biases, and with "q8_0" the projections whose inputs are not a multiple of 32 wide, are kept in float32.
    The tokenizer goes along with its special tokens and chat template. Byte-level BPE tokenizers are known by what
    they do before BPE (GPT-2, SmolLM, Llama 3, DBRX, Qwen2), BPE with byte fallback by its normalizer (Llama 2).

    Args:
        model: what `merge_and_unload()` returned, or the folder in which it was saved.
        tokenizer: its tokenizer; None for the one in the folder `model`.
        path: the file to write; one that exists is replaced once the new one is complete.
        dtype: type of the embedding and the projections; by default the one that they have.

    Returns:
        `path`.

    Raises:
        ImportError: if the package gguf is not installed.
        TypeError: if `model` is neither a transformers model nor a folder.
        ValueError: if the model is not a merged one or has a part that "deci" does not have, or if llama.cpp would
            split text into other tokens than `tokenizer` (the message says which). Nothing is written then.
    """
    path = Path(path)
    gguf_file.check_installed()
    if dtype not in (None, *gguf_file.DTYPES):
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(map(repr, gguf_file.DTYPES))}. Choose one.")
    if path.is_dir():
        raise ValueError(f"The export to {path} needs the name of a file, but this is a folder. Add a file name.")
    parts = take_apart(model)
    if tokenizer is None:
        if not is_path(model):
            raise ValueError(
                "to_gguf(model, tokenizer=None, ...) works for a saved checkpoint only. Pass a tokenizer."
            )
        tokenizer = AutoTokenizer.from_pretrained(model)
    vocabulary = read_vocabulary(tokenizer, parts)
    with _temporary_beside(path) as temporary:
        gguf_file.write(temporary, parts, vocabulary, dtype or gguf_file.own_dtype(parts))
        temporary.replace(path)
    return path


# --- DeciLM ----------------------------------------------------------------------------------------------------------


def _check_first_layer(parts: Exportable) -> None:
    """Warns that vLLM's class will refuse a model without its first attention; raises if MLX-LM would as well."""
    if 0 not in parts.skipped:
        return
    config = parts.config
    what = "The first layer's attention is deleted, and vLLM's DeciLM class cannot run a model without it"
    if config.intermediate_size % 256 or head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"{what}. MLX-LM could, but takes only FFNs of a multiple of 256 wide and heads that are together as wide "
            f"as the model. {UNEXPORTED}"
        )
    warnings.warn(f"{what}; MLX-LM can run what is written. {UNEXPORTED}", stacklevel=3)


def _decilm_config(parts: Exportable) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of config.json, and the weights with zeros for the biases that its switches ask for."""
    config, weights = parts.config, dict(parts.weights)
    layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    switches = {}
    for switch, projections in {"attention_bias": ATTENTION, "mlp_bias": MLP}.items():
        names = [f"{layer}.{part}" for layer, part in itertools.product(layers, projections)]
        switches[switch] = any(f"{name}.bias" in weights for name in names)
        for name in names if switches[switch] else ():
            if f"{name}.weight" in weights:
                weight = weights[f"{name}.weight"]
                weights.setdefault(f"{name}.bias", weight.new_zeros(weight.shape[0]))
    group = config.num_attention_heads // config.num_key_value_heads
    kept = {"no_op": False, "n_heads_in_group": group}
    deleted = {"no_op": True, "n_heads_in_group": None}
    ffn = {"no_op": False, **_ffn_size(config)}
    blocks = [
        {"attention": deleted if i in parts.skipped else kept, "ffn": ffn} for i in range(config.num_hidden_layers)
    ]
    copied = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    rope = config.rope_parameters
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "id2label": {configuration_decilm.LOCK: None},
        **{name: getattr(config, name) for name in copied},
        "head_dim": head_dim(config),
        "hidden_act": "silu",
        "tie_word_embeddings": parts.tied,
        "dtype": str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        **switches,
        # What rope_parameters is in MLX-LM's words.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if parts.rope_factors is None else rope,
        "block_configs": blocks,
    }, weights


def _ffn_size(config: PreTrainedConfig) -> dict[str, Any]:
    """An FFN's width as DeciLM's readers take it.

    MLX-LM knows multiples of 256 alone, by `ffn_mult`, and refuses a block with `intermediate_size`.
    """
    if config.intermediate_size % 256 == 0:
        return {"ffn_mult": 1.5 * config.intermediate_size / config.hidden_size}
    return {"intermediate_size": config.intermediate_size}


# --- files -----------------------------------------------------------------------------------------------------------


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A name in a new folder beside `path`, which is removed at the end with what is left in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
