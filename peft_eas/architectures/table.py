"""The one table that knows where each model family keeps its MHAs, norms, FFNs and projections; and its lookup.

Rows are found by the class name of the transformer block, so that one model may hold several families (the text model
and the vision tower of a multi-modal one). To add a family, add a row to the module of its kind.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from . import decoders, encoder_decoders, encoders, vision
from .row import Architecture, has_path, join

# By class name of the block: its row; or several, of which every one that fits the block applies to it.
ARCHITECTURES: dict[str, Architecture | Sequence[Architecture]] = {
    **decoders.ROWS,
    **encoders.ROWS,
    **vision.ROWS,
    **encoder_decoders.ROWS,
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
