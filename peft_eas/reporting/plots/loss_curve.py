"""The loss curve: what it costs to skip so many candidates, and what it saves."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..search_result import SearchResult, increase_text, ranking_of, shown
from .record import Source, read_rounds
from .style import FAINT, FONT_SIZE, KEPT, SKIPPED, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The axis of the increase ends at so many times what was measured, or what is expected of the choice, so that one sees
# how it grows around that.
HEADROOM = 4.0
MOST_TICKS = 9


def plot_loss_curve(source: Source, path: str | os.PathLike) -> Path:
    """Draws by how much the loss is expected to grow with the number of skipped candidates, the cheapest first, with a
    band of one standard deviation; what was measured at the end of the search, with its standard error; and the number
    that is skipped. Where the search knows what skipping saves, the axis on top shows it. Writes a PNG to `path` and
    returns it.

    Raises:
        ImportError: without matplotlib. FileNotFoundError, ValueError: if `source` holds no search, one without a
            round of rewards yet, or one without this curve, as the bandit's.
    """
    search = read_rounds(source)
    return draw_loss_curve(search.result, search.scores, search.skipped, path, search.is_over)


def draw_loss_curve(
    result: SearchResult,
    scores: dict[str, float],
    skipped: list[str],
    path: str | os.PathLike,
    is_over: bool = True,
) -> Path:
    """As `plot_loss_curve`, from what it reads out of a search; `scores` of all candidates, in the model's order.

    Raises:
        ImportError: without matplotlib. ValueError: without a curve.
    """
    if result.curve is None:
        raise ValueError(
            f"The search, made by {result.strategy}, holds no curve of the loss against the number skipped. Draw one "
            "that was made with strategy='thompson', the default."
        )
    figure = new_figure(6.4, 3.9)
    axes = figure.subplots()
    expected = result.expected(sum(name in scores for name in skipped))
    choice = "" if expected is None else f": {increase_text(expected[0], result.unit, expected[1])}"
    _draw_curve(axes, result, len(skipped), f"{len(skipped)} skipped{choice}")
    numbers = result.curve["num_skip"]
    step = -(-max(numbers) // (MOST_TICKS - 1)) or 1
    axes.set_xticks(numbers[::step])
    axes.set_xlabel("attentions skipped", size=FONT_SIZE + 1)
    saved = result.saved(ranking_of(list(scores.values())))
    if saved is not None:
        what, texts = saved
        top = axes.secondary_xaxis("top")
        top.set_xticks(numbers[::step], [texts[number] for number in numbers[::step]], size=FONT_SIZE)
        top.set_xlabel(what, size=FONT_SIZE + 1)
        plain(top)
    title = "What skipping costs" if is_over else "What skipping costs, as far as the search has got"
    figure.suptitle(title, size=FONT_SIZE + 2)
    return save(figure, path)


def _draw_curve(axes: "Axes", result: SearchResult, num_skip: int, choice: str) -> None:
    unit, curve = result.unit, result.curve
    numbers, increases, deviations = curve["num_skip"], curve["increase"], curve["deviation"]
    lows, highs = (
        [shown(increase + sign * deviation, unit) for increase, deviation in zip(increases, deviations)]
        for sign in (-1, 1)
    )
    middle = [shown(increase, unit) for increase in increases]
    axes.fill_between(numbers, lows, highs, color=KEPT, alpha=0.18, linewidth=0, label="± standard deviation")
    axes.plot(numbers, middle, color=KEPT, linewidth=1.6, label="expected")
    axes.axvline(num_skip, color=SKIPPED, linewidth=1.0, linestyle="--", label=choice, zorder=0)
    ends = []
    for one in result.measured:
        deviation = one.get("deviation") or 0.0
        point, low, high = (shown(one["increase"] + sign * deviation, unit) for sign in (0, -1, 1))
        axes.errorbar(one["num_skip"], point, [[point - low], [high - point]], fmt="o", color="black", markersize=4,
                      capsize=2, linewidth=1.0, label="measured" if one is result.measured[0] else None)  # fmt: skip
        ends += [low, high]
    axes.axhline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    if not ends and num_skip in numbers:
        ends = [lows[numbers.index(num_skip)], highs[numbers.index(num_skip)]]
    top = HEADROOM * max(map(abs, ends), default=0.0)
    if 0.0 < top < max(highs):
        bottom = max(min(0.0, *lows, *ends), -top)
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)
    axes.set_xlim(numbers[0] - 0.2, numbers[-1] + 0.2)
    axes.set_ylabel("increase of the loss" + (" in percent" if unit == "log loss" else ""), size=FONT_SIZE + 1)
    axes.legend(loc="upper left", fontsize=FONT_SIZE, frameon=False)
    plain(axes, "left", "bottom")
