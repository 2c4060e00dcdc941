"""What examples.compare writes: the table, and the figure of accuracy against speed."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.compare.methods import LABELS, SKIPS_NOTHING
from examples.shared.measure import markdown_table

Record = dict[str, Any]
STYLES = {  # from the palette of Okabe and Ito, which is told apart with any colour vision
    "nothing_skipped": {"color": "black", "marker": "D"},
    "lora": {"color": "#808080", "marker": "s"},
    "das": {"color": "#E69F00", "marker": "^"},
    "cosine": {"color": "#CC79A7", "marker": "v"},
    "random_choice": {"color": "#56B4E9", "marker": "<"},
    "no_context": {"color": "#009E73", "marker": "P"},
    "eas_prompt": {"color": "#D55E00", "marker": "*"},
    "eas_bandit": {"color": "#0072B2", "marker": "o", "linestyle": ":"},
    "eas_pia": {"color": "#0072B2", "marker": "o", "linestyle": "--"},
    "eas": {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 4},
}


def write_report(records: Sequence[Record], folder: Path) -> None:
    """Writes table.md and, where there is a run that skips something, accuracy_against_speed.png into `folder`."""
    parts = [_task_table(records, name) for name in _names(records, "task")]
    parts = [*_average_table(records), *parts, *_footnotes(records)]
    (folder / "table.md").write_text("\n\n".join(parts) + "\n")
    if any(record["share"] > 0 for record in records):
        draw(records, folder / "accuracy_against_speed.png")


def _names(records: Sequence[Record], what: str) -> list[Any]:
    return list(dict.fromkeys(record[what] for record in records))


def headline(record: Record) -> float:
    """The task's first figure."""
    return next(iter(record["scores"].values()))


def _points(records: Sequence[Record], task: str) -> list[tuple[str, float, list[Record]]]:
    """(method, share, runs of all seeds), in the order of the methods and shares."""
    own = [record for record in records if record["task"] == task]
    found = {(record["method"], record["share"]) for record in own}
    return [
        (method, share, [record for record in own if (record["method"], record["share"]) == (method, share)])
        for method in LABELS
        for share in sorted(share for name, share in found if name == method)
    ]


def _percent(values: Sequence[float]) -> str:
    """Mean, and behind ± the standard deviation where there are several values."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{spread}"


def _median_speed_up(runs: Sequence[Record], what: str) -> str:
    values = [run["speed_up"][what] for run in runs if what in run["speed_up"]]
    return f"{statistics.median(values):.2f}×" if values else "—"


def _task_table(records: Sequence[Record], task: str) -> str:
    own = [record for record in records if record["task"] == task]
    names = list(own[0]["scores"])
    head = ["method", "skipped", *(f"{name}, %" for name in names), "runs", "trained parameters"]
    rows = [[*head, "search, s", "tuning, s", "forward", "decode", "KV cache, bytes/token"]]
    for method, share, runs in _points(records, task):
        cache = [run["cache_bytes_per_token"]["deployed"] for run in runs if "cache_bytes_per_token" in run]
        rows.append(
            [
                LABELS[method],
                "—" if method in SKIPS_NOTHING else f"{share:.0%}",
                *(_percent([run["scores"][name] for run in runs]) for name in names),
                str(len(runs)),
                f"{statistics.mean(run['trainable_parameters'] for run in runs):,.0f}",
                f"{statistics.median(run['choice_seconds'] for run in runs):.1f}",
                f"{statistics.median(run['tuning_seconds'] for run in runs):.0f}",
                _median_speed_up(runs, "prefill"),
                _median_speed_up(runs, "decode"),
                f"{statistics.mean(cache):,.0f}" if cache else "—",
            ]
        )
    return f"## {task}: {own[0]['num_mhas']} MHAs, {own[0]['steps']} steps\n\n{markdown_table(rows)}"


def _average_table(records: Sequence[Record]) -> list[str]:
    """The headline figures side by side, and their mean over the tasks."""
    tasks = _names(records, "task")
    rows = [["method", "skipped", *tasks, "mean", "against nothing skipped, points"]]
    by_key: dict[tuple[str, float], dict[str, dict[int, float]]] = {}
    for task in tasks:
        for method, share, runs in _points(records, task):
            by_key.setdefault((method, share), {})[task] = {run["seed"]: headline(run) for run in runs}
    full = by_key.get(("nothing_skipped", 0.0), {})
    for method, share in sorted(by_key, key=lambda key: (list(LABELS).index(key[0]), key[1])):
        values = by_key[method, share]
        row = [LABELS[method], "—" if method in SKIPS_NOTHING else f"{share:.0%}"]
        row += [_percent(list(values[task].values())) if task in values else "—" for task in tasks]
        is_whole = len(values) == len(tasks)
        row.append(f"{100 * _mean_of_means(values):.2f}" if is_whole else "—")
        differences = {  # of the seeds that both have
            task: {seed: own[seed] - full[task][seed] for seed in own if seed in full.get(task, {})}
            for task, own in values.items()
        }
        row.append(f"{100 * _mean_of_means(differences):+.2f}" if is_whole and all(differences.values()) else "—")
        rows.append(row)
    return ["## Accuracy of the deployed model, %", markdown_table(rows)] if records else ["No run is finished yet."]


def _mean_of_means(values: dict[str, dict[int, float]]) -> float:
    """Over the tasks, of the means over their seeds."""
    return statistics.mean(statistics.mean(own.values()) for own in values.values())


def _footnotes(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    versions = "; ".join(
        f"{name} {', '.join(sorted({r['versions'][name] for r in records}))}" for name in records[0]["versions"]
    )
    dates = sorted(_names(records, "date"))
    return [
        "Accuracies are mean ± standard deviation over the seeds, times and speed-ups the median; recall@1 is the "
        "first figure of retrieval. Forward and decode are the speed-up of the deployed model over the base, each the "
        "median of paired rounds. "
        "Search is the time until it was fixed what is skipped; the adapters are trained meanwhile, but for the "
        "choice by cosine similarity.",
        f"{len(records)} runs, {dates[0]} to {dates[-1]}, on {', '.join(_names(records, 'machine'))} with "
        f"{', '.join(map(str, _names(records, 'threads')))} thread(s); {versions}.",
    ]


def draw(records: Sequence[Record], path: Path) -> None:
    """Draws accuracy against the speed-up of a forward pass, a panel per task and a line per method."""
    from matplotlib.figure import Figure

    tasks = _names(records, "task")
    figure = Figure(figsize=(1.2 + 3.1 * len(tasks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        points = _points(records, task)
        starts = [runs for method, _, runs in points if method == "nothing_skipped"]
        for method in LABELS:
            own = [runs for name, _, runs in points if name == method]
            if not own:
                continue
            own = own if method in SKIPS_NOTHING else starts + own
            x = [statistics.median(run["speed_up"]["prefill"] for run in runs) for runs in own]
            y = [100 * statistics.mean(map(headline, runs)) for runs in own]
            spread = [100 * statistics.stdev(map(headline, runs)) if len(runs) > 1 else 0.0 for runs in own]
            bars = [spread, [min(above, 100 - mean) for above, mean in zip(spread, y)]]  # to no more than 100 %
            style = {"markersize": 5, "linewidth": 1.2, "capsize": 2, "elinewidth": 0.7, **STYLES[method]}
            axes.errorbar(x, y, yerr=bars, label=LABELS[method], **style)
        axes.set_title(f"{task} ({points[0][2][0]['num_mhas']} attentions)", size=9)
        axes.set_xlabel("forward pass: speed-up over the base", size=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
    first = next(iter(records[0]["scores"]))
    panels[0].set_ylabel(f"{first} of the deployed model, %", size=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    shares = ", ".join(f"{share:.0%}" for share in sorted({r["share"] for r in records} - {0.0}))
    figure.suptitle(f"Accuracy against speed; along a line {shares} of the attentions are skipped", size=10)
    figure.savefig(path, dpi=160)
