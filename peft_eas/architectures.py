"""The one table that knows where each model family keeps its MHAs, norms, FFNs and projections.

Rows are found by the class name of the transformer block, so that one model may hold several families (the text model
and the vision tower of a multi-modal one). To add a family, add a row.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import nn

Kind = Literal["decoder", "encoder", "vision", "audio"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one transformer block are, for one of its MHAs; every path is relative to the block.

    Attributes:
        mha: the multi-head attention, the module that is wrapped and may be skipped.
        mha_projections: the projections that read the MHA's input (of a cross-attention, the query's).
        ffn: the module in front of whose input the PIA stands.
        ffn_projections: the projections that read the FFN's input: modules with a weight, or parameters of shape
            (experts, outputs, width), or (experts, width, outputs) where `transposed` names them.
        input_norm: the norm that only feeds the MHA and is deleted with it (pre-norm blocks), or None.
        shared_norm: the norm that feeds both the MHA and the FFN beside it (parallel blocks), or None.
        output_norm: what only the MHA feeds, in front of the residual (a norm or a scale); deleted too, or None.
        kept_norm: the norm inside the MHA that a skipped block still applies, y = norm(x) (post-norm blocks), or None.
        core: the part of the MHA that holds its projections, where the MHA also reads its input for a residual, which
            its adapter must not touch (post-norm blocks); or None.
        branch: the block's children that make up its FFN branch, in order, where y = x + branch(x) is all that the
            block computes without its MHA; None where it is more, so that a merged block runs the stock code.
        kind: which tokens are the prompt: "decoder", those before the answer; "encoder", all that are attended to;
            "vision" and "audio", all. The MHAs of a vision tower are no default targets where there are others.
        attends: names of the MHA's arguments that hold the states and the mask of what it attends to, where the
            context is the mean over these: of a cross-attention, the other modality's tokens (section 4.1 of the
            paper, METER); of an encoder whose mask is made inside the model, ("hidden_states", "attention_mask").
        returns: what the MHA returns behind its output: per value, the name of the argument that a skipped MHA hands
            on in its place, or None for nothing. None as a whole: the output alone, not in a tuple.
        experts: whether the FFN is a mixture of experts, whose projections have no bias: what an adapter adds to every
            token alike then stays in front of the FFN, as one vector.
        transposed: those of `ffn_projections` that store (…, width, outputs).
        where: attributes of the block, by their path, and the values they must have for the row to apply; None for an
            attribute that the block must not have.
    """

    mha: str
    mha_projections: tuple[str, ...]
    ffn: str
    ffn_projections: tuple[str, ...]
    input_norm: str | None = None
    shared_norm: str | None = None
    output_norm: str | None = None
    kept_norm: str | None = None
    core: str | None = None
    branch: tuple[str, ...] | None = None
    kind: Kind = "decoder"
    attends: tuple[str, str] | None = None
    returns: tuple[str | None, ...] | None = (None,)
    experts: bool = False
    transposed: tuple[str, ...] = ()
    where: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.branch is not None and self.ffn not in self.branch:
            raise ValueError(
                f"Architecture(branch={self.branch!r}) does not contain ffn={self.ffn!r}. Name the FFN and the norms "
                "and dropouts around it, in order, or leave branch out."
            )
        if self.kind not in KINDS:
            raise ValueError(f"Architecture(kind={self.kind!r}): kind must be one of {', '.join(map(repr, KINDS))}.")
        for name, root in (("mha_projections", self.mha), ("ffn_projections", self.ffn)):
            paths = getattr(self, name)
            is_right = isinstance(paths, tuple) and len(paths) > 0
            if not is_right or not all(isinstance(p, str) and f"{p}.".startswith(f"{root}.") for p in paths):
                raise ValueError(
                    f"Architecture({name}={paths!r}): {name} must be a tuple of paths of modules in {root!r}, such as "
                    f"('{root}.in_proj',)."
                )

    @property
    def deleted_norms(self) -> tuple[str, ...]:
        """What is not computed where the MHA is skipped, beside the MHA."""
        return tuple(norm for norm in (self.input_norm, self.output_norm) if norm is not None)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path that a block of this row has."""
        given = (self.mha, *self.mha_projections, self.ffn, *self.ffn_projections, *self.deleted_norms)
        return given + tuple(path for path in (self.kept_norm, self.core) if path is not None)

    @property
    def is_cross(self) -> bool:
        """Whether the MHA attends to other states than its own input."""
        return self.attends is not None and self.attends[0] != "hidden_states"

    def is_asked_for(self, block: nn.Module) -> bool:
        """Whether `block` has the attributes that `where` asks for."""
        return all(at_path(block, path) == value for path, value in self.where.items())


def has_path(module: nn.Module, path: str) -> bool:
    """Whether `path` leads from `module` to anything but None."""
    return at_path(module, path) is not None


def at_path(module: nn.Module, path: str) -> Any:
    """What `path` leads to from `module`, which is itself for an empty one; None where there is nothing."""
    try:
        return operator.attrgetter(path)(module) if path else module
    except AttributeError:
        return None


def _named(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names.split())


_OWN_TOKENS = ("hidden_states", "attention_mask")

# --- decoders ------------------------------------------------------------------------------------------------------

_LLAMA = Architecture(
    mha="self_attn",
    mha_projections=_named("self_attn", "q_proj k_proj v_proj"),
    ffn="mlp",
    ffn_projections=_named("mlp", "gate_proj up_proj"),
    input_norm="input_layernorm",
    branch=("post_attention_layernorm", "mlp"),
)
_GEMMA2 = replace(
    _LLAMA,
    output_norm="post_attention_layernorm",
    branch=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
_MIXTURE = replace(_LLAMA, ffn_projections=_named("mlp", "gate experts.gate_up_proj"), experts=True)
_LLAMA4 = replace(
    _LLAMA,
    ffn="feed_forward",
    ffn_projections=_named("feed_forward", "gate_proj up_proj"),
    branch=("post_attention_layernorm", "feed_forward"),
)
_DEEPSEEK_MIXTURE = _named("mlp", "gate experts.gate_up_proj shared_experts.gate_proj shared_experts.up_proj")
# Queries from a latent of their own or from the width, and an FFN of one expert or of several.
_DEEPSEEK = tuple(
    replace(row, mha_projections=_named("self_attn", f"{query} kv_a_proj_with_mqa"))
    for row in (_LLAMA, replace(_MIXTURE, ffn_projections=_DEEPSEEK_MIXTURE))
    for query in ("q_a_proj", "q_proj")
)
_GPT_NEOX = Architecture(
    mha="attention",
    mha_projections=("attention.query_key_value",),
    ffn="mlp",
    ffn_projections=("mlp.dense_h_to_4h",),
    input_norm="input_layernorm",
)
_FALCON = replace(
    _GPT_NEOX,
    mha="self_attention",
    mha_projections=("self_attention.query_key_value",),
)
_OPT = Architecture(
    mha="self_attn",
    mha_projections=_LLAMA.mha_projections,
    ffn="fc1",
    ffn_projections=("fc1",),
    input_norm="self_attn_layer_norm",
    where={"do_layer_norm_before": True},
)

# --- encoders ------------------------------------------------------------------------------------------------------

_BERT = Architecture(
    mha="attention",
    mha_projections=_named("attention.self", "query key value"),
    ffn="intermediate",
    ffn_projections=("intermediate.dense",),
    kept_norm="attention.output.LayerNorm",
    core="attention.self",
    kind="encoder",
    attends=_OWN_TOKENS,
)
_BERT_CROSS = replace(
    _BERT,
    mha="crossattention",
    mha_projections=("crossattention.self.query",),
    kept_norm="crossattention.output.LayerNorm",
    core="crossattention.self",
    attends=("encoder_hidden_states", "encoder_attention_mask"),
)
_BERTS = (  # as an encoder, as a decoder, and behind an encoder
    replace(_BERT, where={"is_decoder": False}),
    replace(_BERT, kind="decoder", attends=None, where={"is_decoder": True}),
    replace(_BERT_CROSS, kind="decoder"),
)
_VIT = Architecture(
    mha="attention",
    mha_projections=_named("attention", "q_proj k_proj v_proj"),
    ffn="mlp",
    ffn_projections=("mlp.fc1",),
    input_norm="layernorm_before",
    branch=("layernorm_after", "mlp", "dropout"),
    kind="vision",
)
_DINOV2 = replace(_VIT, input_norm="norm1", output_norm="layer_scale1", branch=None)
_SIGLIP = Architecture(
    mha="self_attn",
    mha_projections=_LLAMA.mha_projections,
    ffn="mlp",
    ffn_projections=("mlp.fc1",),
    input_norm="layer_norm1",
    branch=("layer_norm2", "mlp"),
    kind="vision",
    attends=_OWN_TOKENS,
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
    input_norm="norm1",
    branch=("norm2", "mlp"),
    kind="vision",
    attends=("hidden_states", "cu_seqlens"),
    returns=None,
)

# --- encoder-decoders ----------------------------------------------------------------------------------------------

_BART_CROSS = Architecture(
    mha="encoder_attn",
    mha_projections=("encoder_attn.q_proj",),
    ffn="fc1",
    ffn_projections=("fc1",),
    attends=("key_value_states", "attention_mask"),
)
_BART_DECODER = replace(_OPT, input_norm=None, where={})
_BART_ENCODER = replace(_BART_DECODER, kind="encoder", attends=_OWN_TOKENS)
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
                mha_projections=_named("layer.0.SelfAttention", "q k v"),
                ffn=ffn,
                ffn_projections=_named(ffn, inner),
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


# By class name of the block: its row; or several, of which every one that fits the block applies to it.
ARCHITECTURES: dict[str, Architecture | Sequence[Architecture]] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "SmolLM3DecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _GEMMA2,
    "Gemma3DecoderLayer": _GEMMA2,
    "Olmo2DecoderLayer": replace(_GEMMA2, input_norm=None, branch=("mlp", "post_feedforward_layernorm")),
    "Phi3DecoderLayer": replace(
        _LLAMA, mha_projections=("self_attn.qkv_proj",), ffn_projections=("mlp.gate_up_proj",), branch=None
    ),
    "Starcoder2DecoderLayer": replace(_LLAMA, ffn_projections=("mlp.c_fc",)),
    "MixtralDecoderLayer": _MIXTURE,
    "Qwen3MoeDecoderLayer": (_LLAMA, _MIXTURE),
    "Llama4TextDecoderLayer": (
        _LLAMA4,
        replace(
            _LLAMA4,
            ffn_projections=_named(
                "feed_forward", "router experts.gate_up_proj shared_expert.gate_proj shared_expert.up_proj"
            ),
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
    "OPTDecoderLayer": (_OPT, replace(_OPT, input_norm=None, where={"do_layer_norm_before": False})),
    "BertLayer": _BERTS,
    "RobertaLayer": _BERTS,
    "XLMRobertaLayer": _BERTS,
    "ModernBertEncoderLayer": Architecture(
        mha="attn",
        mha_projections=("attn.Wqkv",),
        ffn="mlp",
        ffn_projections=("mlp.Wi",),
        input_norm="attn_norm",
        branch=("mlp_norm", "mlp"),
        kind="encoder",
        attends=_OWN_TOKENS,
    ),
    "ViTLayer": _VIT,
    "Dinov2Layer": tuple(
        replace(_DINOV2, **attention, ffn_projections=ffn)
        for attention in (
            {},
            # before transformers 5.17
            {"mha_projections": _named("attention.attention", "query key value"), "returns": None},
        )
        for ffn in (("mlp.fc1",), ("mlp.weights_in",))
    ),
    "CLIPEncoderLayer": _TWO_TOWERS,
    "SiglipEncoderLayer": _TWO_TOWERS,
    "Idefics3EncoderLayer": _SIGLIP,
    "SmolVLMEncoderLayer": _SIGLIP,
    "InternVLVisionLayer": replace(_VIT, branch=None),
    "Qwen2VLDecoderLayer": _LLAMA,
    "Qwen2_5_VLDecoderLayer": _LLAMA,
    "Qwen2VLVisionBlock": _PACKED_VISION,
    "Qwen2_5_VLVisionBlock": replace(_PACKED_VISION, ffn_projections=_named("mlp", "gate_proj up_proj")),
    "ViltLayer": Architecture(
        mha="attention",
        mha_projections=_named("attention.attention", "query key value"),
        ffn="intermediate",
        ffn_projections=("intermediate.dense",),
        input_norm="layernorm_before",
        kind="encoder",
        attends=_OWN_TOKENS,
    ),
    "BridgeTowerTextLayer": _BERT,
    "BridgeTowerBertCrossLayer": (_BERT, _BERT_CROSS),
    "T5Block": tuple(_t5_rows()),
    "BartEncoderLayer": _BART_ENCODER,
    "BartDecoderLayer": (_BART_DECODER, _BART_CROSS),
    "WhisperEncoderLayer": replace(_WHISPER_DECODER, kind="audio"),
    "WhisperDecoderLayer": (_WHISPER_DECODER, replace(_BART_CROSS, input_norm="encoder_attn_layer_norm")),
}

# Blocks that the method does not fit as it is, and why.
UNSUPPORTED: dict[str, str] = {
    "DebertaV2Layer": "its key projection also reads the embeddings of relative positions, which an adapter at the "
    "MHA's input must not touch, so that no fold is exact",
    "BridgeTowerResidualAttention": "its attention is torch.nn.MultiheadAttention, with the tokens in the "
    "place of the batch, and is called by another method than forward",
}


def find_mhas(model: nn.Module) -> Iterator[tuple[str, str, Architecture]]:
    """Yields (full name of the MHA, full name of its block, row of the table) in the model's own order."""
    for name, module in model.named_modules():
        for row in rows_of(module):
            yield join(name, row.mha), name, row


def rows_of(block: nn.Module) -> list[Architecture]:
    """The rows that apply to `block`. A class that has but one is meant by it, whether it fits or not."""
    rows = ARCHITECTURES.get(type(block).__name__, ())
    if isinstance(rows, Architecture):
        return [rows] if rows.is_asked_for(block) else []
    if not all(isinstance(row, Architecture) for row in rows):
        raise TypeError(
            f"ARCHITECTURES[{type(block).__name__!r}] holds {rows!r}. Give it an Architecture, or several in a tuple."
        )
    return [row for row in rows if row.is_asked_for(block) and all(has_path(block, path) for path in row.paths)]


def default_targets(model: nn.Module) -> list[str]:
    """Full names of the MHAs that a search may skip when the user names none.

    In a multi-modal model these are the text model's; the vision tower's are targets on request.

    Raises:
        ValueError: if no block of the model has a row in the table.
    """
    found = list(find_mhas(model))
    if not found:
        raise ValueError(unknown_architecture_message(model))
    text = [name for name, _, row in found if row.kind != "vision"]
    return text or [name for name, _, _ in found]


def reasons_against(model: nn.Module, names: Iterable[str]) -> str:
    """Why the modules `names` cannot be skipped, as far as the table says; else an empty string."""
    blocks = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in names if name}
    return "".join(f" {block}: {UNSUPPORTED[block]}." for block in sorted(blocks & set(UNSUPPORTED)))


def unknown_architecture_message(model: nn.Module) -> str:
    """What to do about a model without a row, naming the block classes that a row would be for."""
    repeated = {
        type(child).__name__
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module
        if any(True for _ in child.children())
    }
    blocks = ", ".join(sorted(repeated)) or "none found"
    for name in sorted(repeated & set(UNSUPPORTED)):
        return f"The attentions of {type(model).__name__} cannot be skipped: {name}: {UNSUPPORTED[name]}."
    return (
        f"{type(model).__name__} has no block that peft_eas knows (known: {', '.join(ARCHITECTURES)}; repeated blocks "
        f"of this model: {blocks}). Add a row for its block class before get_peft_model:\n"
        "    from peft_eas import ARCHITECTURES, Architecture\n"
        '    ARCHITECTURES["<block class>"] = Architecture(mha=..., mha_projections=(...), ffn=..., '
        "ffn_projections=(...), input_norm=...)\n"
        "with the names of the block's own submodules."
    )


def join(prefix: str, name: str) -> str:
    """The path `name` below the module of the path `prefix`, which may be empty."""
    return f"{prefix}.{name}" if prefix else name
