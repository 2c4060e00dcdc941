"""Rows of decoders, also of the text models of vision-language models."""

from dataclasses import replace

from .row import Architecture, named

LLAMA = Architecture(
    mha="self_attn",
    mha_projections=named("self_attn", "q_proj k_proj v_proj"),
    ffn="mlp",
    ffn_projections=named("mlp", "gate_proj up_proj"),
    output_projection="mlp.down_proj",
    input_norm="input_layernorm",
    branch=("post_attention_layernorm", "mlp"),
)
_GEMMA2 = replace(
    LLAMA,
    output_norm="post_attention_layernorm",
    branch=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
_MIXTURE = replace(
    LLAMA, ffn_projections=named("mlp", "gate experts.gate_up_proj"), output_projection=None, experts=True
)
_LLAMA4 = replace(
    LLAMA,
    ffn="feed_forward",
    ffn_projections=named("feed_forward", "gate_proj up_proj"),
    output_projection="feed_forward.down_proj",
    branch=("post_attention_layernorm", "feed_forward"),
)
_DEEPSEEK_MIXTURE = named("mlp", "gate experts.gate_up_proj shared_experts.gate_proj shared_experts.up_proj")
# Queries from a latent of their own or from the width, and an FFN of one expert or of several.
_DEEPSEEK = tuple(
    replace(row, mha_projections=named("self_attn", f"{query} kv_a_proj_with_mqa"))
    for row in (LLAMA, replace(_MIXTURE, ffn_projections=_DEEPSEEK_MIXTURE))
    for query in ("q_a_proj", "q_proj")
)
_GPT_NEOX = Architecture(
    mha="attention",
    mha_projections=("attention.query_key_value",),
    ffn="mlp",
    ffn_projections=("mlp.dense_h_to_4h",),
    output_projection="mlp.dense_4h_to_h",
    input_norm="input_layernorm",
)
_FALCON = replace(
    _GPT_NEOX,
    mha="self_attention",
    mha_projections=("self_attention.query_key_value",),
)
OPT = Architecture(
    mha="self_attn",
    mha_projections=LLAMA.mha_projections,
    ffn="fc1",
    ffn_projections=("fc1",),
    output_projection="fc2",
    input_norm="self_attn_layer_norm",
    where={"do_layer_norm_before": True},
)

# By class name of the block.
ROWS: dict[str, Architecture | tuple[Architecture, ...]] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": LLAMA,
    "Qwen2DecoderLayer": LLAMA,
    "Qwen3DecoderLayer": LLAMA,
    "SmolLM3DecoderLayer": LLAMA,
    "GemmaDecoderLayer": LLAMA,
    "Gemma2DecoderLayer": _GEMMA2,
    "Gemma3DecoderLayer": _GEMMA2,
    "Olmo2DecoderLayer": replace(_GEMMA2, input_norm=None, branch=("mlp", "post_feedforward_layernorm")),
    "Phi3DecoderLayer": replace(
        LLAMA, mha_projections=("self_attn.qkv_proj",), ffn_projections=("mlp.gate_up_proj",), branch=None
    ),
    "Starcoder2DecoderLayer": replace(LLAMA, ffn_projections=("mlp.c_fc",), output_projection="mlp.c_proj"),
    "MixtralDecoderLayer": _MIXTURE,
    "Qwen3MoeDecoderLayer": (LLAMA, _MIXTURE),
    "Llama4TextDecoderLayer": (
        _LLAMA4,
        replace(
            _LLAMA4,
            ffn_projections=named(
                "feed_forward", "router experts.gate_up_proj shared_expert.gate_proj shared_expert.up_proj"
            ),
            output_projection=None,
            branch=None,
            experts=True,
            transposed=("feed_forward.experts.gate_up_proj",),
        ),
    ),
    "DeepseekV3DecoderLayer": _DEEPSEEK,
    "GPT2Block": Architecture(
        mha="attn",
        mha_projections=("attn.c_attn",),
        ffn="mlp",
        ffn_projections=("mlp.c_fc",),
        output_projection="mlp.c_proj",
        input_norm="ln_1",
        branch=("ln_2", "mlp"),
    ),
    "GPTNeoXLayer": _GPT_NEOX,
    # One norm for MHA and FFN; one each, side by side; one each, in turns.
    "FalconDecoderLayer": (
        replace(
            _FALCON,
            input_norm=None,
            shared_norm="input_layernorm",
            where={"config.parallel_attn": True, "ln_mlp": None},
        ),
        replace(_FALCON, input_norm="ln_attn"),
        replace(_FALCON, where={"config.parallel_attn": False}),
    ),
    # Norms in front, or (350m) behind.
    "OPTDecoderLayer": (OPT, replace(OPT, input_norm=None, where={"do_layer_norm_before": False})),
    "Qwen2VLDecoderLayer": LLAMA,
    "Qwen2_5_VLDecoderLayer": LLAMA,
}
