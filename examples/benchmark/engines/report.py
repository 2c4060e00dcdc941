"""What examples.benchmark.engines writes: a table, and a picture of the throughput."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.shared.measure import markdown_table, quartiles

Round = dict[str, dict[str, dict[str, Any]]]  # by variant and number of requests, the figures of `measure`
GREYS, COLOURS = ("#999999", "#666666"), ("#0072B2", "#D55E00")  # of the bases, and of what is merged


def write_report(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes table.md and throughput.png into `folder`, from rounds of the same settings."""
    rounds: list[Round] = [record["figures"] for record in records]
    settings = records[0]["settings"]
    variants = list(rounds[0])
    numbers = sorted(set.intersection(*(set(one[variants[0]]) for one in rounds)), key=int)
    rows = [["", "requests that fit", "first token, s"]]
    rows[0] += [f"{'tokens/s, ' if number == numbers[0] else ''}{number} at once" for number in numbers]
    rows[0] += [f"{'decoding, ' if number == numbers[0] else ''}{number} at once" for number in numbers]
    for name in variants:
        row = [name, str(rounds[0][name][numbers[0]]["fit"]), _cell(rounds, name, numbers[0], "first_token", 2)]
        row += [_cell(rounds, name, number, "tokens_per_second") for number in numbers]
        row += [_cell(rounds, name, number, "decoded_per_second") for number in numbers]
        rows.append(row)
    title = (
        f"{settings['model']} in {settings['engine']}, {settings['dtype']}, threads: {settings['threads']}; prompts "
        f"of {settings['prompt']} tokens, {settings['new']} generated, {settings['cache_mib']} MiB for the KV cache, "
        f"{settings['num_skip']} attentions skipped"
    )
    note = (
        f"Medians of {len(rounds)} rounds; in brackets how many times as fast as the first row, the median and the "
        "quartiles over the rounds. Tokens/s: those generated, the prompts' time included. Decoding: behind the last "
        "request's first token, where all requests fit."
    )
    (folder / "table.md").write_text(f"## {title}\n\n{markdown_table(rows)}\n\n{note}\n")
    draw(rounds, variants, numbers, title, folder / "throughput.png")


def _values(rounds: Sequence[Round], name: str, number: str, figure: str) -> list[float]:
    values = [one[name][number][figure] for one in rounds]
    return [] if None in values else values


def _cell(rounds: Sequence[Round], name: str, number: str, figure: str, digits: int = 1) -> str:
    values, firsts = (_values(rounds, one, number, figure) for one in (name, next(iter(rounds[0]))))
    if not values:
        return "—"
    cell = f"{statistics.median(values):.{digits}f}"
    if values == firsts or not firsts:
        return cell
    pairs = zip(firsts, values) if figure == "first_token" else zip(values, firsts)
    low, median, high = quartiles([one / other for one, other in pairs])
    return f"{cell} ({median:.2f}×, {low:.2f}–{high:.2f})"


def draw(rounds: Sequence[Round], variants: Sequence[str], numbers: Sequence[str], title: str, path: Path) -> None:
    """Draws tokens per second by the number of requests at once; a ring is where the KV cache does not hold all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    places = [int(number) for number in numbers]
    colours = [*GREYS[: sum(name.startswith("base") for name in variants)], *COLOURS]
    for panel, what, label in zip(
        panels, ("tokens_per_second", "decoded_per_second"), ("tokens/s, prompts included", "tokens/s of decoding")
    ):
        for colour, name in zip(colours, variants):
            points = [(int(n), statistics.median(v)) for n in numbers if (v := _values(rounds, name, n, what))]
            fits = [int(n) <= rounds[0][name][n]["fit"] for n in numbers]
            panel.plot(*zip(*points), color=colour, label=name, zorder=2)
            for (x, y), fit in zip(points, fits):
                panel.plot(x, y, "o", color=colour, markerfacecolor=colour if fit else "white", zorder=3)
        panel.set_xscale("log", base=2)
        panel.set_xticks(places, map(str, places))
        panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        panel.set_xlabel("requests at once")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].plot([], [], "o", color="black", markerfacecolor="white", label="some requests wait for the cache")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(title.replace("; ", ";\n"), fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
