"""The one table that knows where each model family keeps its MHAs, norms, FFNs and projections.

Rows are found by the class name of the transformer block, so that one model may hold several families (the text model
and the vision tower of a multi-modal one). To add a family, add a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one transformer block are; every path is relative to the block.

    Attributes:
        mha: the multi-head attention, the module that is wrapped and may be skipped.
        mha_projections: the projections that read the MHA's input.
        ffn: the module in front of whose input the PIA stands.
        ffn_projections: the projections that read the FFN's input.
        input_norm: the norm that only feeds the MHA and is deleted with it (pre-norm blocks), or None.
        output_norm: the norm that only the MHA feeds, in front of the residual; deleted with it too, or None.
        kept_norm: the norm inside the MHA that a skipped block still applies, y = norm(x) (post-norm blocks), or None.
        core: the part of the MHA that holds its projections, where the MHA also reads its input for a residual, which
            its adapter must not touch (post-norm blocks); or None.
        branch: the block's children that make up its FFN branch, in order, where y = x + branch(x) is all that the
            block computes without its MHA; None where it is more, so that a merged block runs the stock code.
        kind: which tokens are the prompt: "decoder", those before the answer; "encoder", all that are attended to;
            "vision", all.
    """

    mha: str
    mha_projections: tuple[str, ...]
    ffn: str
    ffn_projections: tuple[str, ...]
    input_norm: str | None = None
    output_norm: str | None = None
    kept_norm: str | None = None
    core: str | None = None
    branch: tuple[str, ...] | None = None
    kind: Literal["decoder", "encoder", "vision"] = "decoder"

    def __post_init__(self) -> None:
        if self.branch is not None and self.ffn not in self.branch:
            raise ValueError(
                f"Architecture(branch={self.branch!r}) does not contain ffn={self.ffn!r}. Name the FFN and the norms "
                "and dropouts around it, in order, or leave branch out."
            )

    @property
    def deleted_norms(self) -> tuple[str, ...]:
        """The norms that are not computed where the MHA is skipped."""
        return tuple(norm for norm in (self.input_norm, self.output_norm) if norm is not None)


_LLAMA = Architecture(
    mha="self_attn",
    mha_projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ffn="mlp",
    ffn_projections=("mlp.gate_proj", "mlp.up_proj"),
    input_norm="input_layernorm",
    branch=("post_attention_layernorm", "mlp"),
)
_GEMMA2 = replace(
    _LLAMA,
    output_norm="post_attention_layernorm",
    branch=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _GEMMA2,
    "Gemma3DecoderLayer": _GEMMA2,
    "GPT2Block": Architecture(
        mha="attn",
        mha_projections=("attn.c_attn",),
        ffn="mlp",
        ffn_projections=("mlp.c_fc",),
        input_norm="ln_1",
        branch=("ln_2", "mlp"),
    ),
    "BertLayer": Architecture(
        mha="attention",
        mha_projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        ffn="intermediate",
        ffn_projections=("intermediate.dense",),
        kept_norm="attention.output.LayerNorm",
        core="attention.self",
        kind="encoder",
    ),
    "ViTLayer": Architecture(
        mha="attention",
        mha_projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        ffn="mlp",
        ffn_projections=("mlp.fc1",),
        input_norm="layernorm_before",
        branch=("layernorm_after", "mlp", "dropout"),
        kind="vision",
    ),
    "CLIPEncoderLayer": Architecture(
        mha="self_attn",
        mha_projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ffn="mlp",
        ffn_projections=("mlp.fc1",),
        input_norm="layer_norm1",
        branch=("layer_norm2", "mlp"),
        kind="vision",
    ),
}


def find_mhas(model: nn.Module) -> Iterator[tuple[str, str, Architecture]]:
    """Yields (full name of the MHA, full name of its block, row of the table) in the model's own order."""
    for name, module in model.named_modules():
        row = ARCHITECTURES.get(type(module).__name__)
        if row is not None:
            yield _join(name, row.mha), name, row


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
    return (
        f"{type(model).__name__} has no block that peft_eas knows (known: {', '.join(ARCHITECTURES)}; repeated blocks "
        f"of this model: {blocks}). Add a row for its block class before get_peft_model:\n"
        "    from peft_eas import ARCHITECTURES, Architecture\n"
        '    ARCHITECTURES["<block class>"] = Architecture(mha=..., mha_projections=(...), ffn=..., '
        "ffn_projections=(...), input_norm=...)\n"
        "with the names of the block's own submodules."
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
