"""The search curve: what the search has learned of each candidate, and the losses that it learned from."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...strategies import AttentionBandit
from ..search_result import increase_text, shown
from .record import Search, Source, read_rounds
from .style import (
    FAINT,
    FONT_SIZE,
    KEPT,
    LINE_HEIGHT,
    MEAN,
    ROW_HEIGHT,
    SKIPPED,
    VALUE_LABELS,
    colour_of,
    far_out,
    label_rows,
    mean,
    new_figure,
    plain,
    save,
    short_names,
    spread_out,
    viridis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LOSSES_HEIGHT = 7.2, 2.9
# Losses that span more than this ratio are drawn on a logarithmic axis.
DECADE = 10.0


def plot_search_curve(
    source: Source, path: str | os.PathLike, values: Literal["scores", "probabilities"] = "scores"
) -> Path:
    """Draws what the search has learned, so that one sees whether it has settled; writes a PNG to `path` and returns
    it.

    Above, the expected cost of each candidate with its standard deviation, the cheapest first: a search has settled
    where the costs of those that are skipped, in colour, stand apart from the others', or where it makes no difference
    which of them are skipped. Below, over the optimizer steps, the held-out losses of the sets that were tried, the
    darker the more of the chosen candidates they held, and the training losses that the search learned from.

    Of the bandit, which has no costs, a line per candidate of its score or its probability p stands above, those that
    are skipped in colour and with their name; and with the reward "exp", exp(−loss) below. Of a strategy of your own,
    which has none of these, the scores at the end.

    Args:
        values: of the bandit: what the lines show.

    Raises:
        ImportError: without matplotlib. FileNotFoundError, ValueError: if `source` holds no search, or one without a
            round of rewards yet; for `values` that are unknown, or that the strategy does not have.
    """
    if values not in ("scores", "probabilities"):
        raise ValueError(f"values={values!r} is unknown. Choose 'scores' or 'probabilities'.")
    search = read_rounds(source)
    if values == "probabilities" and search.bandit is None:
        raise ValueError(
            f"values='probabilities' is for the bandit, and this search was made by {search.result.strategy}, which "
            "has no probabilities. Leave values out."
        )
    if search.bandit is None:
        height = 0.9 + ROW_HEIGHT * max(len(search.candidates), 4)
        figure = new_figure(WIDTH, height + LOSSES_HEIGHT)
        # Apart, so that long names above leave the losses their width.
        parts = figure.subfigures(2, 1, height_ratios=(height, LOSSES_HEIGHT))
        above, below = (part.subplots() for part in parts)
        _draw_costs(above, search)
    else:
        height = max(3.0, 0.8 + 0.15 * len(search.skipped))
        figure = new_figure(WIDTH, height + LOSSES_HEIGHT)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(height, LOSSES_HEIGHT))
        _draw_lines(above, search, search.bandit, values, height)
    _draw_losses(below, search)
    figure.suptitle(_title(search), size=FONT_SIZE + 2)
    return save(figure, path)


def _title(search: Search) -> str:
    what = "to skip, in colour" if search.is_over else "the best so far, in colour; not over"
    rounds = f"{len(search.rounds)} round{'s' if len(search.rounds) > 1 else ''}"
    text = f"{search.result.strategy} over {len(search.candidates)} attentions, {rounds}: {len(search.skipped)} {what}"
    if search.gain is None:
        return text
    gain = f"{search.gain:.2g}"
    if search.unit == "log loss":
        percent = -100.0 * math.expm1(-search.gain)
        gain = f"{percent:.1f} %" if percent >= 0.1 else "less than 0.1 %"
    return f"{text}\nThe loss of a perfect choice is expected to be lower by {gain}"


# --- above -----------------------------------------------------------------------------------------------------------


def _draw_costs(axes: "Axes", search: Search) -> None:
    """A row per candidate, the cheapest on top."""
    labels, what = short_names(search.candidates)
    order, unit = search.ranking, search.unit
    costs = [search.values[i] for i in order]
    deviations = [0.0 if search.deviations is None else search.deviations[i] for i in order]
    points = [shown(cost, unit) for cost in costs]
    ends = [(shown(c - d, unit), shown(c + d, unit)) for c, d in zip(costs, deviations)]
    limit = max(points) if unit == "score" else far_out(points)
    low = min(end for end, _ in ends)
    high = max(end for (_, end), point in zip(ends, points) if point <= limit)
    room = 0.04 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    label_rows(axes, [labels[i] for i in order], what)
    beside = axes.get_yaxis_transform()
    for row, (i, point, (left, right)) in enumerate(zip(order, points, ends)):
        colour = colour_of(search.candidates[i] in search.skipped)
        axes.plot([left, right], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
        is_far = point > limit
        axes.plot(1.0 if is_far else point, row, ">" if is_far else "o", color=colour, markersize=4.5,
                  transform=beside if is_far else axes.transData, clip_on=False)  # fmt: skip
        text = f"{costs[row]:+.3f}" if unit == "score" else increase_text(costs[row], unit, deviations[row])
        axes.text(1.02, row, text, transform=beside, va="center", size=FONT_SIZE - 1, color=colour)
    axes.axvline(0.0, color="black", linewidth=0.8, zorder=0)
    axes.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.5)
    axes.set_xlabel(VALUE_LABELS[unit] + ("" if unit == "score" else "; ± standard deviation"), size=FONT_SIZE + 1)
    plain(axes, "bottom")


def _draw_lines(axes: "Axes", search: Search, bandit: AttentionBandit, values: str, height: float) -> None:
    """A line per candidate over the steps."""
    steps, curves = _curves(search, bandit, values)
    labels, what = short_names(search.candidates)
    colours = viridis(search.skipped)
    ends = []
    for name, label, curve in zip(search.candidates, labels, zip(*curves)):
        if name in search.skipped:
            axes.plot(steps, curve, color=colours[name], linewidth=1.8, zorder=3)
            ends.append((curve[-1], f"{what} {label}" if what == "layer" else label, colours[name]))
        else:
            axes.plot(steps, curve, color=FAINT, linewidth=0.8, zorder=2)
    axes.set_ylabel("score" if values == "scores" else "probability of being drawn first", size=FONT_SIZE + 1)
    _label_ends(axes, ends, height)
    plain(axes, "left", "bottom")


def _curves(search: Search, bandit: AttentionBandit, values: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and for each the values of all candidates, from the start of the training on."""
    steps = [one.step for one in search.rounds]
    # Scores rest through warm-up, which ends one interval before the first round.
    interval = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    rest = [0.0] * len(bandit.candidates)
    curves = [rest, rest, *(scores for _, scores in bandit.trajectory())]
    if values == "probabilities":
        curves = [bandit.softmax(scores) for scores in curves]
    return [0, max(0, steps[0] - interval), *steps], curves


def _label_ends(axes: "Axes", ends: list[tuple[float, str, Any]], height: float) -> None:
    """Names the lines at their right ends, moved apart where the names would overlap."""
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ends = sorted(ends, key=lambda end: end[0])
    gap = (high - low) * LINE_HEIGHT / (0.85 * height)
    places = spread_out([value for value, _, _ in ends], gap)
    places = [max(low + i * gap, min(high - (len(ends) - 1 - i) * gap, place)) for i, place in enumerate(places)]
    for (value, label, colour), place in zip(ends, places):
        axes.annotate(
            label,
            xy=(1.0, value),
            xytext=(1.05, place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            size=FONT_SIZE,
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0.0, 0.5), "shrinkB": 0},
        )


# --- below -----------------------------------------------------------------------------------------------------------


def _draw_losses(axes: "Axes", search: Search) -> None:
    """The losses of the sets tried, by how much of the chosen set they held, and of the training steps."""
    is_exp = search.bandit is not None and search.bandit.reward == "exp"
    chosen = {search.candidates.index(name) for name in search.skipped}
    tried, nothing, by_step = [], [], defaultdict(list)
    for one in search.rounds:
        losses = [math.exp(-loss) if is_exp else loss for loss in one.losses]
        points = [(one.step, loss, _share(names, chosen)) for names, loss in zip(one.sets, losses) if names]
        nothing += [(one.step, loss) for names, loss in zip(one.sets, losses) if not names]
        tried += points
        for step, loss, _ in points:
            by_step[step].append(loss)
    means = [(step, mean(losses)) for step, losses in by_step.items()]
    _draw_points(axes, search.training, ".", "a training step", color=FAINT, alpha=0.5, zorder=1, markeredgewidth=0)
    _draw_points(axes, means, "-", "mean of a round", color=MEAN, linewidth=1.2, zorder=2)
    _draw_points(axes, nothing, "D", "nothing skipped", color=KEPT, markersize=3, zorder=2)
    if tried:
        _draw_tried(axes, *zip(*tried))
    for style, (what, step) in zip((":", "--"), search.boundaries.items()):
        axes.axvline(step, color="black", linewidth=0.8, linestyle=style, zorder=0, label=what)
    losses = [y for _, y, *_ in (*tried, *nothing, *search.training)]
    if not is_exp and losses and 0 < DECADE * min(losses) < max(losses):
        axes.set_yscale("log")
    axes.set_ylabel("reward exp(−loss)" if is_exp else "loss", size=FONT_SIZE + 1)
    axes.set_xlabel("optimizer step", size=FONT_SIZE + 1)
    axes.margins(x=0.01)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2, ncols=5, fontsize=FONT_SIZE,
                frameon=False, columnspacing=1.2, handlelength=1.6)  # fmt: skip
    plain(axes, "left", "bottom")


def _share(names: set[int], chosen: set[int]) -> float:
    return len(names & chosen) / max(1, len(names), len(chosen))


def _draw_points(axes: "Axes", points: Sequence[tuple[int, float]], style: str, label: str, **options: Any) -> None:
    if points:
        axes.plot(*zip(*points), style, label=label, **options)


def _draw_tried(axes: "Axes", steps: Sequence[int], losses: Sequence[float], shares: Sequence[float]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("chosen", ["#D8D8D8", SKIPPED])
    dots = axes.scatter(steps, losses, s=14, c=shares, cmap=colours, vmin=0, vmax=1, linewidths=0.4,
                        edgecolors="white", zorder=3)  # fmt: skip
    bar = axes.figure.colorbar(dots, cax=axes.inset_axes([1.03, 0.0, 0.02, 1.0]), ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"], size=FONT_SIZE - 1)
    bar.set_label("of the chosen in a set tried", size=FONT_SIZE)
    bar.outline.set_visible(False)
