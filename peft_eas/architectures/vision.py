"""Rows of vision towers, and of encoders of several modalities."""

from dataclasses import replace

from .decoders import LLAMA
from .encoders import BERT, BERT_CROSS
from .row import OWN_TOKENS, Architecture, named

_VIT = Architecture(
    mha="attention",
    mha_projections=named("attention", "q_proj k_proj v_proj"),
    ffn="mlp",
    ffn_projections=("mlp.fc1",),
    output_projection="mlp.fc2",
    input_norm="layernorm_before",
    branch=("layernorm_after", "mlp", "dropout"),
    kind="vision",
)
_DINOV2 = replace(_VIT, input_norm="norm1", output_norm="layer_scale1", branch=None)
_SIGLIP = Architecture(
    mha="self_attn",
    mha_projections=LLAMA.mha_projections,
    ffn="mlp",
    ffn_projections=("mlp.fc1",),
    output_projection="mlp.fc2",
    input_norm="layer_norm1",
    branch=("layer_norm2", "mlp"),
    kind="vision",
    attends=OWN_TOKENS,
)

# Of a vision and a text tower with blocks of one class; the type of their configs is another in a merged model.
_TWO_TOWERS = (
    replace(_SIGLIP, where={"self_attn.config.vocab_size": None}),
    replace(_SIGLIP, kind="encoder", where={"self_attn.config.patch_size": None}),
)

# The images of a batch in one row, or in Qwen2.5-VL's windowed blocks their windows: each with a context of its own.
_PACKED_VISION = Architecture(
    mha="attn",
    mha_projections=("attn.qkv",),
    ffn="mlp",
    ffn_projections=("mlp.fc1",),
    output_projection="mlp.fc2",
    input_norm="norm1",
    branch=("norm2", "mlp"),
    kind="vision",
    attends=("hidden_states", "cu_seqlens"),
    returns=None,
)

# By class name of the block.
ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "ViTLayer": _VIT,
    "Dinov2Layer": tuple(
        replace(_DINOV2, **attention, ffn_projections=(f"mlp.{first}",), output_projection=f"mlp.{last}")
        for attention in (
            {},
            # before transformers 5.17
            {"mha_projections": named("attention.attention", "query key value"), "returns": None},
        )
        for first, last in (("fc1", "fc2"), ("weights_in", "weights_out"))
    ),
    "CLIPEncoderLayer": _TWO_TOWERS,
    "SiglipEncoderLayer": _TWO_TOWERS,
    "Idefics3EncoderLayer": _SIGLIP,
    "SmolVLMEncoderLayer": _SIGLIP,
    "InternVLVisionLayer": replace(_VIT, branch=None),
    "Qwen2VLVisionBlock": _PACKED_VISION,
    "Qwen2_5_VLVisionBlock": replace(
        _PACKED_VISION, ffn_projections=named("mlp", "gate_proj up_proj"), output_projection="mlp.down_proj"
    ),
    "ViltLayer": Architecture(
        mha="attention",
        mha_projections=named("attention.attention", "query key value"),
        ffn="intermediate",
        ffn_projections=("intermediate.dense",),
        output_projection="output.dense",
        input_norm="layernorm_before",
        kind="encoder",
        attends=OWN_TOKENS,
    ),
    "BridgeTowerTextLayer": BERT,
    "BridgeTowerBertCrossLayer": (BERT, BERT_CROSS),
}
