"""The skip map: which candidates are kept and which are skipped, in the model's order."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..search_result import Unit, increase_text, shown
from .record import Source, read_search
from .style import (
    FONT_SIZE,
    LETTER_WIDTH,
    ROW_HEIGHT,
    VALUE_LABELS,
    colour_of,
    far_out,
    label_rows,
    new_figure,
    plain,
    save,
    short_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_skip_map(source: Source, path: str | os.PathLike) -> Path:
    """Draws the candidates in order, each kept or skipped, with its cost or score; writes a PNG to `path` and returns
    it.

    While a search is not over, the best set so far takes the place of the skipped MHAs.

    Raises:
        ImportError: without matplotlib. FileNotFoundError, ValueError: if `source` holds no search.
    """
    search = read_search(source)
    values = dict(zip(search.candidates, search.values))
    return draw_skip_map(search.candidates, search.skipped, values, path, search.is_over, search.unit)


def draw_skip_map(
    candidates: list[str],
    skipped: list[str],
    values: dict[str, float] | None,
    path: str | os.PathLike,
    is_over: bool = True,
    unit: Unit = "score",
) -> Path:
    """As `plot_skip_map`, from what it reads out of a search: `values` are costs or scores by name, as `unit` says.
    Without them, only what is kept and what is skipped.

    Raises:
        ImportError: without matplotlib.
    """
    labels, what = short_names(candidates)
    rows = len(labels)
    width = (6.4 if values else 3.2) + LETTER_WIDTH * max(map(len, labels))
    figure = new_figure(width, 1.2 + ROW_HEIGHT * max(rows, 4))
    axes = figure.subplots(1, 2 if values else 1, sharey=True, squeeze=False, width_ratios=(1, 4) if values else None)
    states = axes[0, 0]
    for row, name in enumerate(candidates):
        is_skipped = name in skipped
        colour = colour_of(is_skipped)
        # The word tells the state without colour.
        states.barh(row, 1.0, height=0.86, color=colour if is_skipped else "white", edgecolor=colour)
        states.text(0.5, row, "skipped" if is_skipped else "kept", ha="center", va="center", size=FONT_SIZE - 1,
                    color="white" if is_skipped else colour)  # fmt: skip
    states.set_xlim(0, 1)
    states.set_xticks([])
    label_rows(states, labels, what)
    plain(states)
    if values:
        are_skipped = [name in skipped for name in candidates]
        _draw_values(axes[0, 1], [values.get(name, 0.0) for name in candidates], are_skipped, unit)
    title = "{} of {} attentions skipped" if is_over else "Search not over: the best {} of {} attentions so far"
    figure.suptitle(title.format(len(skipped), rows), size=FONT_SIZE + 2)
    return save(figure, path)


def _draw_values(axes: "Axes", values: list[float], are_skipped: list[bool], unit: Unit) -> None:
    lengths = [shown(value, unit) for value in values]
    low, high = min(0.0, *lengths), max(0.0, *lengths)
    if unit != "score":
        high = max(0.0, far_out(lengths))
    room = 0.25 * (high - low) or 1.0  # for the numbers
    for row, (value, length, is_skipped) in enumerate(zip(values, lengths, are_skipped)):
        end = min(length, high)
        axes.barh(row, end, height=0.7, color=colour_of(is_skipped))
        text = f"{value:+.3f}" if unit == "score" else increase_text(value, unit)
        text = f" {'▶ ' if length > high else ''}{text} "
        axes.annotate(text, (end, row), ha="left" if length >= 0 else "right", va="center", size=FONT_SIZE - 1)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(low - (room if low < 0 else 0), high + (room if high > 0 or low == 0 else 0))
    if low == high:
        axes.set_xticks([0.0])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel(VALUE_LABELS[unit], size=FONT_SIZE + 1)
    plain(axes)
