"""What examples.search_quality writes: the tables, and the picture of loss against evaluations."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.search_quality.methods import METHODS, WITHOUT_SEARCH
from examples.search_quality.problem import mask_of
from examples.search_quality.runs import BUDGETS, Record, Scores, read_runs, read_scores
from examples.search_quality.tuned import read_tuned
from examples.shared.measure import markdown_table

STYLES = {  # from the palette of Okabe and Ito, which is told apart with any colour vision
    "thompson": {"color": "#0072B2", "marker": "o", "linewidth": 2.2, "zorder": 4},
    "thompson, hint": {"color": "#56B4E9", "marker": "s"},
    "bandit": {"color": "#D55E00", "marker": "*"},
    "bandit, exp": {"color": "#E69F00", "marker": "^"},
    "single drops": {"color": "#009E73", "marker": "P"},
    "evolution": {"color": "#CC79A7", "marker": "v"},
    "cosine": {"color": "black", "linestyle": "--"},
    "random": {"color": "#808080", "linestyle": ":"},
}
BEST = "best set"
TOP = 2  # a choice counts as one of the best if it is among so many

Group = tuple[str, int]  # a problem and a number skipped
Choice = dict[str, Any]  # of a run at a budget
FOOTNOTES = (
    "Losses are mean ± standard deviation over the seeds, on batches that no search saw. An evaluation is the loss of "
    "one set on one batch.",
    "Regret is the loss of the choice minus that of the best set, the mean over the seeds; in brackets in units of "
    "the standard deviation over all sets of that size. Behind it: how many seeds chose the best or the second-best "
    "set, by the batches that no search saw, and by all batches that searches may see. Where the two differ, the "
    "batches are too few to tell the best sets apart; the last row is what a search without end would choose.",
)


def write_report(folder: Path) -> None:
    """Writes table.md and, where a search has run, loss_against_evaluations.png into `folder`."""
    runs, scores, tuned = read_runs(folder), read_scores(folder), read_tuned(folder)
    groups = sorted({(run["problem"], run["k"]) for run in runs}, key=lambda group: (group in scores, *group))
    parts = [
        _regret_table(runs, scores[one], one) if one in scores else _loss_table(runs, scores, one) for one in groups
    ]
    parts += [_tuned_table(tuned)] if tuned else []
    parts += FOOTNOTES if parts else []
    (folder / "table.md").write_text("\n\n".join(parts or ["No run is finished yet."]) + "\n")
    if groups:
        draw(runs, scores, groups, folder / "loss_against_evaluations.png")


def _choices(runs: Sequence[Record], group: Group, method: str, budget: int) -> list[Choice]:
    """Those of all seeds."""
    own = [run for run in runs if (run["problem"], run["k"], run["method"]) == (*group, method)]
    return [run["choices"][str(budget)] for run in own if str(budget) in run["choices"]]


def _values(runs: Sequence[Record], group: Group, method: str, budget: int) -> list[float]:
    """The scores of all seeds' choices."""
    return [choice["score"] for choice in _choices(runs, group, method, budget)]


def _mean_and_deviation(choices: Sequence[Choice]) -> str:
    values = [choice["score"] for choice in choices]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _method_rows(runs: Sequence[Record], group: Group, show: Callable[[list[Choice]], str]) -> list[list[str]]:
    """A row per method: its name, what `show` makes of the choices at each budget, and the number of seeds."""
    rows = []
    for method in METHODS:
        cells = [_choices(runs, group, method, budget) for budget in BUDGETS]
        if any(cells):
            rows.append([method, *(show(choices) if choices else "—" for choices in cells), str(max(map(len, cells)))])
    return rows


def _loss_table(runs: Sequence[Record], scores: dict[Group, Scores], group: Group) -> str:
    problem, k = group
    rows = _method_rows(runs, group, _mean_and_deviation)
    head = ["loss of the choice", *(f"{budget} evaluations" for budget in BUDGETS), "seeds"]
    title = f"## {problem}: {k} skipped"
    if (problem, 0) in scores:
        title += f" (loss with nothing skipped {scores[problem, 0].held_out[0]:.3f})"
    return f"{title}\n\n{markdown_table([head, *rows])}"


def _regret_table(runs: Sequence[Record], scores: Scores, group: Group) -> str:
    ordered = sorted(scores.held_out.values())
    deviation = statistics.pstdev(ordered)
    best = {part: sorted(values, key=values.__getitem__)[:TOP] for part, values in vars(scores).items()}

    def show(choices: Sequence[Choice]) -> str:
        regret = statistics.fmean(choice["score"] - ordered[0] for choice in choices)
        masks = [mask_of(choice["skipped"]) for choice in choices]
        held_out, search = (sum(mask in best[part] for mask in masks) for part in ("held_out", "search"))
        return f"{regret:.4f} ({regret / deviation:.4f} sd); {held_out}, {search} of {len(masks)}"

    rows = _method_rows(runs, group, show)
    found = best["search"][0]
    regret = scores.held_out[found] - ordered[0]
    whole = f"{regret:.4f} ({regret / deviation:.4f} sd); {int(found in best['held_out'])}, 1 of 1"
    rows.append(["every set on all batches of the search", *[whole] * len(BUDGETS), "—"])
    head = ["regret; best or second-best", *(f"{budget} evaluations" for budget in BUDGETS), "seeds"]
    title = (
        f"## {group[0]}: {group[1]} skipped, {len(ordered)} sets (loss of the best {ordered[0]:.3f}, of the second "
        f"{ordered[1]:.3f}, of the third {ordered[2]:.3f}, of the worst {ordered[-1]:.3f}; sd {deviation:.3f})"
    )
    return f"{title}\n\n{markdown_table([head, *rows])}"


def _tuned_table(tuned: Sequence[Record]) -> str:
    """The searches' runs against those of the given sets."""
    given = {mask_of(run["given"]): run for run in tuned if run["given"] is not None}
    order = sorted(given, key=lambda mask: given[mask]["loss"])
    rows = [["run", "skipped", "accuracy, %", "loss", "rank of the set, tuned from the start", "its loss, tuned so"]]
    for run in sorted(tuned, key=lambda run: (str(run["strategy"]), run["seed"])):
        if run["given"] is None:
            mask = mask_of(run["skipped"])
            found = (
                [f"{order.index(mask) + 1} of {len(order)}", f"{given[mask]['loss']:.4f}"]
                if mask in given
                else ["—"] * 2
            )
            rows.append([f"{run['strategy']}, seed {run['seed']}", *_outcome(run), *found])
    for place in sorted({0, 1, 2, len(order) // 2, len(order) - 1} & {*range(len(order))}):
        run = given[order[place]]
        rows.append(["given set", *_outcome(run), f"{place + 1} of {len(order)}", f"{run['loss']:.4f}"])
    steps = ", ".join(sorted({str(run["steps"]) for run in tuned}))
    return f"## tuned: MiniLM, {len(tuned[0]['skipped'])} of 6 skipped, {steps} steps\n\n{markdown_table(rows)}"


def _outcome(run: Record) -> list[str]:
    return [" ".join(map(str, run["skipped"])), f"{100 * run['accuracy']:.2f}", f"{run['loss']:.4f}"]


def draw(runs: Sequence[Record], scores: dict[Group, Scores], groups: Sequence[Group], path: Path) -> None:
    """Draws the loss of the chosen set against the evaluations made, a panel per problem and number skipped."""
    from matplotlib.figure import Figure

    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(1.2 + 3.4 * columns, 0.9 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, group in zip(panels, groups):
        searched = []
        for place, method in enumerate(METHODS):
            points = [(budget, values) for budget in BUDGETS if (values := _values(runs, group, method, budget))]
            if not points:
                continue
            means = [statistics.fmean(values) for _, values in points]
            if method in WITHOUT_SEARCH:
                axes.axhline(means[0], label=method, linewidth=1.2, **STYLES[method])
                continue
            deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            x = [budget * 1.03 ** (place - 2) for budget, _ in points]  # so that bars do not hide each other
            style = {"markersize": 5, "linewidth": 1.2, "capsize": 2, "elinewidth": 0.7, **STYLES[method]}
            axes.errorbar(x, means, yerr=deviations, label=method, **style)
            searched += [mean + deviation for mean, deviation in zip(means, deviations)]
            searched += [mean - deviation for mean, deviation in zip(means, deviations)]
        if group in scores:
            best = min(scores[group].held_out.values())
            axes.axhline(best, color="black", linewidth=0.8, label=BEST)
            searched.append(best)
        if searched:  # a random choice may be far above
            margin = 0.08 * (max(searched) - min(searched)) or 0.01
            axes.set_ylim(min(searched) - margin, max(searched) + margin)
        axes.set_xscale("log")
        axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
        axes.minorticks_off()
        axes.set_title(f"{group[0]}, {group[1]} skipped", size=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(groups) - columns) : len(groups)]:
        axes.set_xlabel("evaluations", size=9)
    figure.supylabel("loss of the chosen set, on batches that no search saw", size=9)
    legend = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    labels = [label for label in (*METHODS, BEST) if label in legend]
    handles = [legend[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)
