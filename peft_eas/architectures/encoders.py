"""Rows of text encoders."""

from dataclasses import replace

from .row import OWN_TOKENS, Architecture, named

BERT = Architecture(
    mha="attention",
    mha_projections=named("attention.self", "query key value"),
    ffn="intermediate",
    ffn_projections=("intermediate.dense",),
    output_projection="output.dense",
    kept_norm="attention.output.LayerNorm",
    core="attention.self",
    kind="encoder",
    attends=OWN_TOKENS,
)
BERT_CROSS = replace(
    BERT,
    mha="crossattention",
    mha_projections=("crossattention.self.query",),
    kept_norm="crossattention.output.LayerNorm",
    core="crossattention.self",
    attends=("encoder_hidden_states", "encoder_attention_mask"),
)
_BERTS = (  # as an encoder, as a decoder, and behind an encoder
    replace(BERT, where={"is_decoder": False}),
    replace(BERT, kind="decoder", attends=None, where={"is_decoder": True}),
    replace(BERT_CROSS, kind="decoder"),
)

# By class name of the block.
ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "BertLayer": _BERTS,
    "RobertaLayer": _BERTS,
    "XLMRobertaLayer": _BERTS,
    "ModernBertEncoderLayer": Architecture(
        mha="attn",
        mha_projections=("attn.Wqkv",),
        ffn="mlp",
        ffn_projections=("mlp.Wi",),
        output_projection="mlp.Wo",
        input_norm="attn_norm",
        branch=("mlp_norm", "mlp"),
        kind="encoder",
        attends=OWN_TOKENS,
    ),
}
