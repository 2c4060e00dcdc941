"""What the pictures have in common: colours, names, numbers beside bars, files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..search_result import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito, which is told apart with any colour vision.
SKIPPED, KEPT, MEAN, FAINT = "#D55E00", "#0072B2", "#009E73", "#A0A0A0"
FONT_SIZE = 8.0
# In inches: a row of text with and without room around it; a letter.
ROW_HEIGHT, LINE_HEIGHT, LETTER_WIDTH = 0.2, 0.125, 0.06
# Parts of module names that say nothing where the rest tells the names apart.
GENERIC_WORDS = {"base_model", "encoder", "layer", "layers", "model", "transformer", "vision_model"}
# An axis ends where a value is further than so many interquartile ranges above the others: one vital attention must
# not press all others into a line.
FAR_OUT = 4.0
VALUE_LABELS: dict[Unit, str] = {
    "score": "score (higher: skipping it costs less)",
    "log loss": "cost: rise of the loss by skipping it,\nover the mean of the chosen, in percent",
    "loss": "cost: rise of the loss by skipping it,\nover the mean of the chosen",
}


def new_figure(width: float, height: float) -> "Figure":
    """A figure in inches that is apart from pyplot, and so from the user's own figures and display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "peft_eas.plots needs matplotlib, which is not installed. Run `pip install matplotlib`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: "Axes", *spines: str) -> None:
    """Leaves an axes only the given borders."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
    axes.tick_params(labelsize=FONT_SIZE)


def save(figure: "Figure", path: str | os.PathLike) -> Path:
    """Writes a PNG, and the folders that it needs."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png")
    return path


def far_out(values: Sequence[float]) -> float:
    """The highest of the values that are not far out above the others."""
    ordered = sorted(values)
    first, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.75))
    fence = third + FAR_OUT * (third - first)
    return max(value for value in ordered if value <= fence)


def short_names(names: list[str]) -> tuple[list[str], str]:
    """What tells the names apart, and what to call it: "3" and "layer" for `model.layers.3.self_attn`."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    labels = [" ".join(word for word in p if word not in GENERIC_WORDS) for p in parts]
    if len(set(labels)) < len(labels):
        labels = [" ".join(p) for p in parts]
    return labels, "layer" if all(label.isdigit() for label in labels) else "attention"


def label_rows(axes: "Axes", labels: list[str], what: str) -> None:
    """Rows of an axes from the top down, with their names."""
    axes.set_yticks(range(len(labels)), labels, size=FONT_SIZE)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_ylabel(what, size=FONT_SIZE + 1)
    axes.tick_params(axis="y", length=0)


def colour_of(is_skipped: bool) -> str:
    """Of a candidate in its state."""
    return SKIPPED if is_skipped else KEPT


def spread_out(values: list[float], gap: float) -> list[float]:
    """Places for labels of ascending `values`, at least `gap` apart and in sum as near to the values as can be."""
    # Isotonic regression of the values with the gaps taken out: neighbours that are too close share their mean.
    groups: list[list[float]] = []
    for i, value in enumerate(values):
        groups.append([value - i * gap])
        while len(groups) > 1 and mean(groups[-2]) > mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [mean(group) for group in groups for _ in group]
    return [middle + i * gap for i, middle in enumerate(means)]


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def viridis(names: list[str]) -> dict[str, Any]:
    """A colour per name, from dark to light in the order of the layers, without viridis' end that is pale on white."""
    from matplotlib import colormaps

    return {name: colormaps["viridis"](0.75 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}
