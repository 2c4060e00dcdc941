"""Pictures of a search, from what a run leaves behind. Needs matplotlib: `pip install matplotlib`.

Both functions take the search as any of: the folder of a run or of a checkpoint, the path of its `eas_search.json` or
`trainer_state.json`, or the record that is in these (`EASCallback.record`, `EASSearch.state_dict()`).
"""

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..strategies import AttentionBandit, restored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Source = str | os.PathLike | dict[str, Any]

# From the palette of Okabe and Ito, which is told apart with any colour vision.
SKIPPED, KEPT, REWARD, FAINT = "#D55E00", "#0072B2", "#009E73", "#A0A0A0"
FONT_SIZE = 8.0
# In inches: a row of the map, a line of text without room around it, and the lower part of the curve.
ROW_HEIGHT, LINE_HEIGHT, REWARD_HEIGHT = 0.2, 0.125, 2.6
# Parts of module names that say nothing where the rest tells the names apart.
GENERIC_WORDS = {"base_model", "encoder", "layer", "layers", "model", "transformer", "vision_model"}


def plot_skip_map(source: Source, path: str | os.PathLike) -> Path:
    """Draws the candidates in order, each kept or skipped, with its score; writes a PNG to `path` and returns it.

    While a search is not over, the best set so far takes the place of the skipped MHAs.

    Raises:
        ImportError: without matplotlib. FileNotFoundError, ValueError: if `source` holds no search.
    """
    bandit, skipped, is_over = _read(source)
    return draw_skip_map(bandit.candidates, skipped, dict(zip(bandit.candidates, bandit.scores)), path, is_over)


def draw_skip_map(
    candidates: list[str],
    skipped: list[str],
    scores: dict[str, float] | None,
    path: str | os.PathLike,
    is_over: bool = True,
) -> Path:
    """As `plot_skip_map`, from what it reads out of a search; without scores only what is kept and what is skipped.

    Raises:
        ImportError: without matplotlib.
    """
    labels, what = _short_names(candidates)
    rows = len(labels)
    figure = _new_figure(6.4 if scores else 3.2, 1.2 + ROW_HEIGHT * max(rows, 4))
    axes = figure.subplots(1, 2 if scores else 1, sharey=True, squeeze=False, width_ratios=(1, 4) if scores else None)
    states = axes[0, 0]
    for row, name in enumerate(candidates):
        is_skipped = name in skipped
        colour = SKIPPED if is_skipped else KEPT
        # The word tells the state without colour.
        states.barh(row, 1.0, height=0.86, color=colour if is_skipped else "white", edgecolor=colour)
        states.text(0.5, row, "skipped" if is_skipped else "kept", ha="center", va="center", size=FONT_SIZE - 1,
                    color="white" if is_skipped else colour)  # fmt: skip
    states.set_xlim(0, 1)
    states.set_xticks([])
    states.set_yticks(range(rows), labels, size=FONT_SIZE)
    states.set_ylim(rows - 0.4, -0.6)
    states.set_ylabel(what)
    states.tick_params(length=0)
    _plain(states)
    if scores:
        _draw_scores(
            axes[0, 1], [scores.get(name, 0.0) for name in candidates], [name in skipped for name in candidates]
        )
    title = "{} of {} attentions skipped" if is_over else "Search not over: the best {} of {} attentions so far"
    figure.suptitle(title.format(len(skipped), rows), size=FONT_SIZE + 2)
    return _save(figure, path)


def _draw_scores(axes: "Axes", scores: list[float], are_skipped: list[bool]) -> None:
    for row, (score, is_skipped) in enumerate(zip(scores, are_skipped)):
        axes.barh(row, score, height=0.7, color=SKIPPED if is_skipped else KEPT)
        axes.annotate(f" {score:+.3f} ", (score, row), ha="left" if score >= 0 else "right", va="center",
                      size=FONT_SIZE - 1)  # fmt: skip
    axes.tick_params(axis="y", length=0)
    low, high = min(0.0, *scores), max(0.0, *scores)
    room = 0.2 * (high - low) or 1.0  # for the numbers
    axes.set_xlim(low - (room if low < 0 else 0), high + (room if high > 0 or low == 0 else 0))
    if low == high:
        axes.set_xticks([0.0])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlabel("score (higher: skipping it costs less)")
    _plain(axes)


def plot_search_curve(
    source: Source, path: str | os.PathLike, values: Literal["scores", "probabilities"] = "scores"
) -> Path:
    """Draws the course of the search over the optimizer steps; writes a PNG to `path` and returns it.

    Above, a line per candidate of its score or its probability p, those that are skipped in colour and with their
    name; below, the reward of every set that was tried and its mean per round: for the reward "exp", exp(−loss), else
    the loss itself, on the held-out batches.

    Raises:
        ImportError: without matplotlib. FileNotFoundError, ValueError: if `source` holds no search, or one without a
            round of rewards yet; if `values` is something else.
    """
    if values not in ("scores", "probabilities"):
        raise ValueError(f"values={values!r} is unknown. Choose 'scores' or 'probabilities'.")
    bandit, skipped, _ = _read(source)
    if not bandit.rounds:
        raise ValueError("The search has no round of rewards yet, so there is no curve to draw. Train past warm-up.")
    steps, curves = _curves(bandit, values)
    labels, what = _short_names(bandit.candidates)
    height = max(3.0, 0.8 + 0.15 * len(skipped))
    figure = _new_figure(7.2, height + REWARD_HEIGHT)
    lines, rewards = figure.subplots(2, 1, sharex=True, height_ratios=(height, 1.7))
    colours = _colours(skipped)
    ends = []
    for name, label, curve in zip(bandit.candidates, labels, zip(*curves)):
        if name in skipped:
            lines.plot(steps, curve, color=colours[name], linewidth=1.8, zorder=3)
            ends.append((curve[-1], f"{what} {label}" if what == "layer" else label, colours[name]))
        else:
            lines.plot(steps, curve, color=FAINT, linewidth=0.8, zorder=2)
    lines.set_ylabel("score" if values == "scores" else "probability of being drawn first")
    lines.set_title(
        f"Search over {len(labels)} attentions: {len(skipped)} to skip in colour, the others grey", size=FONT_SIZE + 2
    )
    _label_ends(lines, ends)
    _draw_rewards(rewards, bandit)
    rewards.set_xlabel("optimizer step")
    for axes in (lines, rewards):
        _plain(axes, "left", "bottom")
    return _save(figure, path)


def _curves(bandit: AttentionBandit, values: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and for each the values of all candidates, from the start of the training on."""
    rounds = [
        (number + 1 if record["step"] is None else record["step"], scores)
        for number, (record, scores) in enumerate(bandit.trajectory())
    ]
    # Scores rest through warm-up, which ends one interval before the first round.
    first = rounds[0][0]
    interval = rounds[1][0] - first if len(rounds) > 1 else first
    rest = [0.0] * len(bandit.candidates)
    rounds = [(0, rest), (max(0, first - interval), rest), *rounds]
    steps, curves = [step for step, _ in rounds], [scores for _, scores in rounds]
    if values == "probabilities":
        curves = [bandit.softmax(scores) for scores in curves]
    return steps, curves


def _draw_rewards(axes: "Axes", bandit: AttentionBandit) -> None:
    is_exp = bandit.reward == "exp"
    steps, means = [], []
    for number, record in enumerate(bandit.rounds):
        step = number + 1 if record["step"] is None else record["step"]
        finite = [loss for loss in record["losses"] if loss is not None]
        shown = [math.exp(-loss) for loss in finite] if is_exp else finite
        axes.plot([step] * len(shown), shown, "o", color=FAINT, markersize=2.5, zorder=2)
        if shown:
            steps.append(step)
            means.append(_mean(shown))
    axes.plot(steps, means, color=REWARD, linewidth=1.8, zorder=3, label="mean of a round")
    axes.plot([], [], "o", color=FAINT, markersize=2.5, label="a set tried")
    axes.set_ylabel("reward exp(−loss)" if is_exp else "held-out loss\n(lower: more reward)")
    axes.legend(fontsize=FONT_SIZE, frameon=False, ncols=2, loc="upper right")
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend


def _label_ends(axes: "Axes", ends: list[tuple[float, str, Any]]) -> None:
    """Names the lines at their right ends, moved apart where the names would overlap."""
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = (axes.figure.get_size_inches()[1] - REWARD_HEIGHT) * 0.85
    ends = sorted(ends, key=lambda end: end[0])
    gap = (high - low) * LINE_HEIGHT / height
    places = _spread([value for value, _, _ in ends], gap)
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


def _spread(values: list[float], gap: float) -> list[float]:
    """Places for labels of ascending `values`, at least `gap` apart and in sum as near to the values as can be."""
    # Isotonic regression of the values with the gaps taken out: neighbours that are too close share their mean.
    groups: list[list[float]] = []
    for i, value in enumerate(values):
        groups.append([value - i * gap])
        while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [_mean(group) for group in groups for _ in group]
    return [mean + i * gap for i, mean in enumerate(means)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _short_names(names: list[str]) -> tuple[list[str], str]:
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


def _read(source: Source) -> tuple[AttentionBandit, list[str], bool]:
    """The search, the MHAs that are skipped or the best so far, and whether it is over."""
    record = source if isinstance(source, dict) else _read_file(Path(source))
    if "stateful_callbacks" in record:
        record = (record["stateful_callbacks"].get("EASCallback") or {}).get("record") or {}
    saved = record.get("strategy", record.get("bandit"))  # as earlier versions call it
    if saved is None:
        raise ValueError(
            f"{source if not isinstance(source, dict) else 'The record'} holds no search. Give the folder of a run "
            "with EASCallback that searched (not one with skipped_modules given), its eas_search.json, or a "
            "checkpoint's trainer_state.json."
        )
    bandit = restored(saved)
    skipped = record.get("skipped_modules")
    return bandit, bandit.best() if skipped is None else skipped, skipped is not None


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        checkpoints = sorted(
            (folder for folder in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)),
            key=lambda folder: int(folder.name.rpartition("-")[2]),
        )
        options = [path / "eas_search.json", path / "trainer_state.json"]
        options += [checkpoint / "trainer_state.json" for checkpoint in reversed(checkpoints)]
        found = next((option for option in options if option.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{path} has no eas_search.json, trainer_state.json or checkpoint in it. Give the output_dir of a run "
                "with EASCallback, or one of its checkpoints."
            )
        path = found
    return json.loads(path.read_text(encoding="utf-8"))


def _new_figure(width: float, height: float) -> "Figure":
    """A figure in inches that is apart from pyplot, and so from the user's own figures and display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "peft_eas.plots needs matplotlib, which is not installed. Run `pip install matplotlib`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _colours(names: list[str]) -> dict[str, Any]:
    """A colour per name, from dark to light in the order of the layers, without viridis' end that is pale on white."""
    from matplotlib import colormaps

    return {name: colormaps["viridis"](0.75 * i / max(1, len(names) - 1)) for i, name in enumerate(names)}


def _plain(axes: "Axes", *spines: str) -> None:
    """Leaves an axes only the given borders."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
    axes.tick_params(labelsize=FONT_SIZE)


def _save(figure: "Figure", path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png")
    return path
