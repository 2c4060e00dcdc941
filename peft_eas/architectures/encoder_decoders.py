"""Rows of the blocks of encoder-decoders."""

from collections.abc import Iterator
from dataclasses import replace

from .decoders import OPT
from .row import OWN_TOKENS, Architecture, named

_BART_CROSS = Architecture(
    mha="encoder_attn",
    mha_projections=("encoder_attn.q_proj",),
    ffn="fc1",
    ffn_projections=("fc1",),
    output_projection="fc2",
    attends=("key_value_states", "attention_mask"),
)
_BART_DECODER = replace(OPT, input_norm=None, where={})
_BART_ENCODER = replace(_BART_DECODER, kind="encoder", attends=OWN_TOKENS)
_WHISPER_DECODER = replace(_BART_DECODER, input_norm="self_attn_layer_norm")


def _t5_rows() -> Iterator[Architecture]:
    """The first self-attention of a stack holds the position bias of all, so that it cannot be skipped."""
    for inner in ("wi_0 wi_1", "wi"):
        for ffn, kind, attends in (
            ("layer.1.DenseReluDense", "encoder", ("hidden_states", "mask")),
            ("layer.2.DenseReluDense", "decoder", None),
        ):
            row = Architecture(
                mha="layer.0.SelfAttention",
                mha_projections=named("layer.0.SelfAttention", "q k v"),
                ffn=ffn,
                ffn_projections=named(ffn, inner),
                output_projection=f"{ffn}.wo",
                input_norm="layer.0.layer_norm",
                kind=kind,
                attends=attends,
                returns=("position_bias", None),
                where={"layer.0.SelfAttention.has_relative_attention_bias": False},
            )
            yield row
        yield replace(
            row,
            mha="layer.1.EncDecAttention",
            mha_projections=("layer.1.EncDecAttention.q",),
            input_norm="layer.1.layer_norm",
            attends=("key_value_states", "mask"),
            where={},
        )


# By class name of the block.
ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "T5Block": tuple(_t5_rows()),
    "BartEncoderLayer": _BART_ENCODER,
    "BartDecoderLayer": (_BART_DECODER, _BART_CROSS),
    "WhisperEncoderLayer": replace(_WHISPER_DECODER, kind="audio"),
    "WhisperDecoderLayer": (_WHISPER_DECODER, replace(_BART_CROSS, input_norm="encoder_attn_layer_norm")),
}
