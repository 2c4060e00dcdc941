"""What examples.recovery writes: the table, and the picture of accuracies."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.recovery.runs import Record, read_runs
from examples.recovery.variants import NOTHING_SKIPPED, REFERENCES, VARIANTS
from examples.shared.measure import markdown_table

FIRST = next(iter(VARIANTS))
MODELS = {  # by the task's name
    "minilm-banking77": "all-MiniLM-L6",
    "banking77": "SmolLM2-135M",
    "scienceqa": "SmolLM2-135M, ScienceQA",
}
Group = tuple[str, int]  # a model and a number of skipped attentions


def write_report(folder: Path) -> None:
    """Writes table.md and, where a run has skipped something, accuracy.png into `folder`."""
    runs = read_runs(folder)
    groups = sorted({(run["model"], run["num_skip"]) for run in runs if run["num_skip"]})
    parts = [_table(runs, group) for group in groups] or ["No run is finished yet."]
    if groups:
        parts.append(
            "Accuracy in percent on held-out training queries, mean ± standard deviation over the seeds. Won back: "
            f'the share of what "{FIRST}" loses against nothing skipped that a variant does not lose. Seconds: the '
            "median CPU time of a run, the fit included."
        )
        draw(runs, groups, folder / "accuracy.png")
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")


def _accuracies(runs: Sequence[Record], group: Group, variant: str) -> list[float]:
    """Of all seeds, in percent."""
    point = (group[0], 0 if variant in REFERENCES else group[1], variant)
    return [100 * run["accuracy"] for run in runs if (run["model"], run["num_skip"], run["variant"]) == point]


def _table(runs: Sequence[Record], group: Group) -> str:
    whole, first = (_accuracies(runs, group, variant) for variant in (NOTHING_SKIPPED, FIRST))
    rows = [["", "accuracy", "won back", "loss", "trainable parameters", "seconds", "seeds"]]
    for variant in (*REFERENCES, *VARIANTS):
        values = _accuracies(runs, group, variant)
        if not values:
            continue
        own = [run for run in runs if run["variant"] == variant and run["num_skip"] in (0, group[1])]
        own = [run for run in own if run["model"] == group[0]]
        won = "—"
        if whole and first and variant not in (*REFERENCES, FIRST):
            lost = statistics.mean(whole) - statistics.mean(first)
            won = f"{100 * (statistics.mean(values) - statistics.mean(first)) / lost:.0f} %" if lost > 0 else "—"
        losses = [run["loss"] for run in own if "loss" in run]
        loss = f"{statistics.mean(losses):.3f}" if losses else "—"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        seconds = statistics.median(run["cpu_seconds"] for run in own)
        trainable = f"{own[0]['trainable']:,}"
        rows.append(
            [
                variant,
                f"{statistics.mean(values):.2f}{spread}",
                won,
                loss,
                trainable,
                f"{seconds:.0f}",
                str(len(values)),
            ]
        )
    steps = ", ".join(sorted({str(run["steps"]) for run in runs if run["model"] == group[0]}))
    return f"## {MODELS.get(group[0], group[0])}: {group[1]} skipped, {steps} steps\n\n{markdown_table(rows)}"


def draw(runs: Sequence[Record], groups: Sequence[Group], path: Path) -> None:
    """Draws each run's accuracy, and the variants' means: a panel per model and number of skipped attentions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in VARIANTS if any(_accuracies(runs, group, name) for group in groups)]
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    size = (2 + 2.4 * columns, 0.5 + (0.9 + 0.3 * len(names)) * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    lines: dict[str, Any] = {}
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, group in zip(panels.flat, groups):
        for place, name in enumerate(names):
            values = _accuracies(runs, group, name)
            panel.plot(values, [place] * len(values), "o", color="#56B4E9", zorder=3)
            if values:
                panel.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="#0072B2", linewidth=2.2)
        for name, style in zip(REFERENCES, ("--", ":")):
            values = _accuracies(runs, group, name)
            if values:
                lines[name] = panel.axvline(statistics.mean(values), color="black", linestyle=style, label=name)
        panel.set_title(f"{MODELS.get(group[0], group[0])},\n{group[1]} skipped", fontsize=10)
        panel.set_xlabel("accuracy, %")
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.legend(handles=list(lines.values()), ncols=2, frameon=False, loc="outside lower center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
