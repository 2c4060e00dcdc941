"""GGUF files of llama.cpp's architecture "deci": the metadata and the weights.

`peft_eas.export.to_gguf` is the way in. The package gguf is imported when it is needed.
"""

import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .exportable import Exportable, head_dim
from .vocabulary import Vocabulary

# Name: (type of a matrix in gguf, type of the file there).
DTYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_OWN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def check_installed() -> None:
    """Raises `ImportError` if the package gguf is missing."""
    if find_spec("gguf") is None:
        raise ImportError("to_gguf needs the package gguf, which is not installed. Run `pip install gguf`.")


def own_dtype(parts: Exportable) -> str:
    """The name in `DTYPES` of what the embedding is stored in."""
    return _OWN[parts.weights["model.embed_tokens.weight"].dtype]


def write(path: Path, parts: Exportable, vocabulary: Vocabulary, dtype: str) -> None:
    """Writes the file, converting one weight at a time.

    Raises:
        ValueError: if a weight is too large for float16.
    """
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI])
    try:
        _add_metadata(writer, parts, dtype)
        _add_vocabulary(writer, vocabulary)
        entries = list(_entries(parts, gguf.GGMLQuantizationType[DTYPES[dtype][0]]))
        for name, value, kind in entries:
            size = int(np.prod(gguf.quant_shape_to_byte_shape(value.shape, kind)))
            writer.add_tensor_info(name, value.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value, kind in entries:
            writer.write_tensor_data(_converted(name, value, kind, parts))
    finally:
        writer.close()


def _entries(parts: Exportable, kind: Any) -> Iterator[tuple[str, Tensor, Any]]:
    """(name in GGUF, weight, type there) of all weights."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, _ = GGML_QUANT_SIZES[kind]
    for name, value in itertools.chain(parts.weights.items(), _first_attention(parts).items()):
        matrix = value.dim() == 2 and value.shape[-1] % block == 0
        yield gguf_name(name), value, kind if matrix else GGMLQuantizationType.F32
    if parts.rope_factors is not None:
        yield "rope_freqs.weight", parts.rope_factors, GGMLQuantizationType.F32


def _first_attention(parts: Exportable) -> dict[str, Tensor]:
    """What stands for a deleted first attention: "deci" wants heads there, and has attentions that are one projection.

    This one is zero. It has no keys and values.
    """
    if 0 not in parts.skipped:
        return {}
    width = parts.config.hidden_size
    return {
        "model.layers.0.input_layernorm.weight": torch.ones(width),
        "model.layers.0.self_attn.o_proj.weight": torch.zeros(width, width),
    }


def gguf_name(name: str) -> str:
    """A weight's name in GGUF, "blk.3.attn_q.bias", from the one in transformers."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[part]}.{kind}"


def _converted(name: str, value: Tensor, kind: Any, parts: Exportable) -> np.ndarray:
    """A weight in the type `kind`, with rows in llama.cpp's order."""
    from gguf import quants

    value = value.detach().float().cpu()
    heads = {"attn_q": parts.config.num_attention_heads, "attn_k": parts.config.num_key_value_heads}
    part = name.split(".")[-2]
    if part in heads:
        value = _interleaved(value, heads[part])
    with np.errstate(over="ignore"):  # an error below
        data = quants.quantize(np.ascontiguousarray(value.numpy()), kind)
    if data.dtype == np.float16 and not np.isfinite(data).all():
        raise ValueError(f"{name} has values that float16 cannot hold. Export with dtype='bf16', 'f32' or 'q8_0'.")
    return data


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, (heads · head_dim, ...), from transformers' order to llama.cpp's.

    Within a head, rotary embedding turns rows i and i + head_dim / 2 together in transformers, 2i and 2i + 1 in
    llama.cpp's "deci".
    """
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(value.shape)


def _add_metadata(writer: Any, parts: Exportable, dtype: str) -> None:
    import gguf

    config, layers = parts.config, range(parts.config.num_hidden_layers)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([config.intermediate_size for _ in layers])
    # The first layer's heads give the heads' width, also if it has none; see `_first_attention`.
    writer.add_head_count([config.num_attention_heads if i == 0 or i not in parts.skipped else 0 for i in layers])
    writer.add_head_count_kv([0 if i in parts.skipped else config.num_key_value_heads for i in layers])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, i in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    template = vocabulary.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
