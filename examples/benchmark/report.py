"""What examples.benchmark prints and draws."""

import statistics
from pathlib import Path
from typing import Any

from examples.benchmark.variants import LABELS
from examples.shared.measure import markdown_table, quartiles

TASKS = ("prefill", "decode")
PAIRS = {
    "The paper's pair, EAS merged over unmerged adapters with nothing skipped": ("eas-merged", "adapters"),
    "EAS merged over the limit": ("eas-merged", "limit"),
}


def ratios(seconds: dict[str, list[float]], name: str, against: str = "base") -> dict[str, float]:
    """Median and quartiles over the rounds of how many times faster `name` is than `against`."""
    low, median, high = quartiles([other / own for other, own in zip(seconds[against], seconds[name])])
    return {"median": median, "low": low, "high": high}


def describe(point: dict[str, Any], title: str) -> str:
    """The tables of one number of skipped attentions."""
    models = point["models"]
    parts = [f"## {point['num_skip']} of {point['num_attentions']} attentions skipped. {title}"]
    rows = [["model", "parameters", "weights, MiB", "KV cache, bytes/token", "checkpoint, MiB", "load, s (× base)"]]
    for name, values in models.items():
        row = [LABELS[name], f"{values['parameters']:,}", f"{values['weights_bytes'] / 2**20:,.1f}"]
        cache = f"{values['kv_bytes_per_token']:,.0f} ({values['kv_ratio']:.3f} of the base)"
        if values["other_cache_bytes_per_sequence"]:
            cache += f" + {values['other_cache_bytes_per_sequence'] / 2**10:,.0f} KiB per sequence"
        row.append(cache)
        if "load_seconds" in values:
            load, speed_up = statistics.median(values["load_seconds"]), values["load_speed_up"]["median"]
            row += [f"{values['checkpoint_bytes'] / 2**20:,.1f}", f"{load:.2f} ({speed_up:.2f}×)"]
        else:
            row += ["not measured"] * 2
        rows.append(row)
    parts.append(markdown_table(rows))
    for setting in point["settings"]:
        parts.append(f"{setting['mode']}, batch {setting['batch']}, prompt of {setting['tokens']} tokens:")
        rows = [["model", "prefill, ms", "tokens/s", "× base", "decode, ms/token", "tokens/s", "× base", "peak, MiB"]]
        for name in setting["speed_up"]["prefill"]:
            row = [LABELS[name]]
            for task, tokens in zip(TASKS, (setting["batch"] * setting["tokens"], setting["batch"])):
                seconds = statistics.median(setting["seconds"][task][name])
                speed_up = setting["speed_up"][task][name]["median"]
                row += [f"{1000 * seconds:.2f}", f"{tokens / seconds:,.0f}", f"{speed_up:.2f}"]
            extra = setting.get("run_bytes", {}).get(name)
            row.append("—" if extra is None else f"{(models[name]['weights_bytes'] + extra) / 2**20:,.1f}")
            rows.append(row)
        parts.append(markdown_table(rows))
        parts += [f"{LABELS[name]}: failed, {message}" for name, message in setting["failed"].items()]
        for label, (name, against) in PAIRS.items():
            if name in setting["speed_up"]["prefill"] and against in setting["speed_up"]["prefill"]:
                pair = [ratios(setting["seconds"][task], name, against)["median"] for task in TASKS]
                parts.append(f"{label}: prefill {pair[0]:.3f}×, decode {pair[1]:.3f}×.")
    differences = ", ".join(f"{what} {value:.1e}" for what, value in point["logits_difference"].items())
    parts.append(f"Largest relative difference of logits: {differences}.")
    return "\n\n".join(parts)


def describe_fold(fold: dict[str, Any], merge: dict[str, Any]) -> str:
    """What folding costs, in two sentences."""
    shapes = ", ".join(f"{name} = {value}" for name, value in fold["shapes"].items())
    thin, dense = (1000 * statistics.median(fold["seconds"][way]) for way in ("thin", "dense"))
    extra = {way: fold["extra_bytes"][way] / 2**20 for way in ("thin", "dense")}
    return (
        f"Fold of one layer ({shapes}): {thin:.1f} ms by thin products, {dense:.1f} ms by the dense way "
        f"({fold['ratio']:.0f}×); extra memory {extra['thin']:.1f} and {extra['dense']:.1f} MiB; relative difference "
        f"{fold['difference']:.0e}.\n"
        f"Merge of the whole model, {merge['num_skip']} attentions skipped: {merge['seconds']:.2f} s, "
        f"{merge['extra_bytes'] / 2**20:.1f} MiB extra memory, {100 * merge['extra_share']:.2f} % of the weights."
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the speed-up over the base against the number of skipped MHAs, a column of panels per setting."""
    from matplotlib.figure import Figure

    styles = {  # from the palette of Okabe and Ito, which is told apart with any colour vision
        "limit": {"color": "black", "linestyle": "--", "linewidth": 1.2, "marker": "_"},
        "eas-merged": {"color": "#0072B2", "marker": "o", "linewidth": 2.0},
        "eas-merged-prompt": {"color": "#009E73", "marker": "s"},
        "eas-unmerged": {"color": "#E69F00", "marker": "^"},
        "lora-merged": {"color": "#808080", "marker": "D", "linewidth": 1.0},
        "adapters": {"color": "#CC79A7", "marker": "v", "linewidth": 1.0},
    }
    points = results["sweep"]
    skips = [point["num_skip"] for point in points]
    columns = range(len(points[0]["settings"]))
    figure = Figure(figsize=(1.8 + 3.0 * max(2, len(columns)), 6.2), layout="constrained")
    panels = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for row, task in enumerate(TASKS):
        for column in columns:
            axes = panels[row][column]
            axes.axhline(1.0, color="#808080", linewidth=0.8)
            for name, style in styles.items():
                values = [point["settings"][column]["speed_up"][task].get(name) for point in points]
                if None in values:
                    continue
                low, median, high = ([value[key] for value in values] for key in ("low", "median", "high"))
                axes.plot(skips, median, label=LABELS[name], markersize=4.5, **style)
                if name == "eas-merged":
                    band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(skips, low, high, label="EAS, merged: quartiles of the rounds", **band)
            axes.set_xticks(skips)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            if row == 0:
                setting = points[0]["settings"][column]
                axes.set_title(f"{setting['mode']}, batch {setting['batch']}, {setting['tokens']} tokens", size=9)
            else:
                axes.set_xlabel(f"attentions skipped of {points[0]['num_attentions']}", size=9)
            if column == 0:
                axes.set_ylabel(f"{task}: speed-up over the base", size=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(results["title"], size=10)
    figure.savefig(path, dpi=160)
