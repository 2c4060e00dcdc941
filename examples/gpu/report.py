"""What run.py writes: report.md, figures.json and speed_up.png, from the records as far as there are any."""

import json
import statistics
from pathlib import Path
from typing import Any

from examples.benchmark.variants import LABELS
from examples.compare.methods import LABELS as METHODS
from examples.gpu.parts import Records
from examples.gpu.speed import ADAPTERS
from examples.shared.measure import markdown_table

GIB = 2**30
# Titles by part, in the report's order.
TITLES = {
    "correctness": "Correctness",
    "capacity": "The merge, and the largest batch",
    "speed": "Prefill and decoding",
    "training": "Training",
    "real": "A real model on BANKING77",
    "compile": "Decoding under torch.compile",
    "suite": "The test suite on the device",
}
BASE, EAS = LABELS["base"], LABELS["eas-merged"]


def write_report(records: Records, folder: Path, about: dict[str, Any]) -> None:
    """Writes the report, the figures, and the picture, if there is something to draw."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in TITLES}
    for (part, case), record in records.all().items():
        parts[part][case] = record
    (folder / "figures.json").write_text(json.dumps({"about": about, "parts": parts}, indent=1) + "\n")
    lines = ["# peft_eas on " + about["device"], *(f"{key}: {value}" for key, value in about.items())]
    picture = folder / "speed_up.png"
    if draw(parts, about["device"], picture):
        lines.append(f"![Speed-up over the base against the share of attentions skipped]({picture.name})")
    for name, title in TITLES.items():
        lines.append(f"## {title}")
        done = {case: record["figures"] for case, record in parts[name].items() if case and "figures" in record}
        if done:
            lines += DESCRIBE[name](done)
        lines += [f"{case or 'The whole part'}: {r['error']}." for case, r in parts[name].items() if "error" in r]
        if not parts[name]:
            lines.append("Left out.")
    (folder / "report.md").write_text("\n\n".join(lines) + "\n")


# --- the parts -------------------------------------------------------------------------------------------------------


def verdict(difference: float | None, tolerance: float | None) -> str:
    """What is made of a difference; a NaN never passes."""
    if tolerance is None:
        return "" if difference is not None else "left out"
    return "pass" if difference <= tolerance else "**FAIL**"


def correctness(done: dict[str, Any]) -> list[str]:
    """A line for each case with its worst check, and one for each check that failed or was left out."""
    rows, notes, failed, total = (
        [["case", "checks", "largest difference, share of its tolerance", "verdict"]],
        [],
        0,
        0,
    )
    for case, checks in done.items():
        judged = [(what, d, t) for what, d, t in checks if t is not None]
        bad = [check for check in judged if verdict(check[1], check[2]) != "pass"]
        total, failed = total + len(judged), failed + len(bad)
        notes += [f"{case}: {what} {d:.1e}, tolerance {t:.0e}: **FAIL**" for what, d, t in bad]
        notes += [f"{case}: {what}" for what, d, t in checks if d is None]
        if judged:
            what, d, t = max(judged, key=lambda check: check[1] / check[2] if check[2] else check[1])
            rows.append([case, str(len(judged)), f"{what}: {d:.1e} of {t:.0e}", "**FAIL**" if bad else "pass"])
    return [f"{total - failed} of {total} checks passed.", markdown_table(rows), *notes]


def capacity(done: dict[str, Any]) -> list[str]:
    """What the merge took; the largest batch and its tokens per second."""
    merges = [["model", "merge, s", "extra memory, MiB", "of the base's weights"]]
    rows = [["model", "weights, GiB", "KV cache per sequence, MiB", "largest batch", "tokens/s there", "× base"]]
    base = done.get(BASE, {}).get("tokens_per_second")
    for name, figures in done.items():
        merge = figures.get("merge")
        if merge:
            extra = merge["extra_bytes"]
            share = f"{100 * extra / merge['base_bytes']:.2f} %"
            merges.append([name, f"{merge['seconds']:.2f}", f"{extra / 2**20:.1f}", share])
        speed = figures.get("tokens_per_second")
        cells = [f"{figures['weights_bytes'] / GIB:.2f}", f"{figures['cache_bytes_per_sequence'] / 2**20:.1f}"]
        if speed is None:
            cells += ["not one fits", "", ""]
        else:
            cells += [str(figures["batch"]), f"{speed:,.0f}", f"{speed / base:.2f}" if base else ""]
        rows.append([name, *cells])
    depth = next(iter(done.values()))["depth"]
    return [
        *([markdown_table(merges)] if len(merges) > 1 else []),
        f"Decoding in the largest batch that fits, behind {depth} tokens each, eagerly with a static cache:",
        markdown_table(rows),
    ]


def speed(done: dict[str, Any]) -> list[str]:
    """A table for each task and mode: a row for each model, a column for each setting."""
    parts = []
    for task, mode in dict.fromkeys((f["task"], f["mode"]) for f in done.values()):
        settings = [f for f in done.values() if (f["task"], f["mode"]) == (task, mode)]
        settings.sort(key=lambda f: (f["batch"], f["tokens"]))
        names = list(dict.fromkeys(name for f in settings for name in (*f["seconds"], *f["failed"])))
        behind = "prompt" if task == "prefill" else "depth"
        rows = [["model", *(f"{f['batch']} × {f['tokens']}" for f in settings)]]
        rows += [[name, *(_timing(f, name) for f in settings)] for name in names]
        parts.append(f"{task}, {mode}: ms (× base), batch × {behind}")
        parts.append(markdown_table(rows))
        parts += [f"{EAS} over {ADAPTERS}, the paper's pair: {pairs}." for pairs in [_pairs(settings)] if pairs]
        parts += [
            f"{f['batch']} × {f['tokens']}: {name}: {message}."
            for f in settings
            for name, message in f["failed"].items()
        ]
    return parts


def _pairs(settings: list[dict[str, Any]]) -> str:
    """How many times faster the first merged EAS model is than adapters in place, by setting."""
    pairs = []
    for f in settings:
        merged = next((times for name, times in f["seconds"].items() if name.startswith(EAS)), None)
        if merged and ADAPTERS in f["seconds"]:
            ratio = statistics.median(f["seconds"][ADAPTERS]) / statistics.median(merged)
            pairs.append(f"{f['batch']} × {f['tokens']}: {ratio:.2f}×")
    return ", ".join(pairs)


def _timing(figures: dict[str, Any], name: str) -> str:
    seconds = figures["seconds"]
    if name not in seconds:
        return "—"
    own = statistics.median(seconds[name])
    if BASE not in seconds:
        return f"{1000 * own:.2f}"
    return f"{1000 * own:.2f} ({statistics.median(seconds[BASE]) / own:.2f})"


def training(done: dict[str, Any]) -> list[str]:
    """A row for each method, and one for what EAS is after its search."""
    rows = [["method", "tokens/s", "ms per step", "memory beside the weights, GiB", "trained parameters"]]
    shares = []
    for name, figures in done.items():
        stages = {name: figures}
        if "tuning" in figures:
            stages = {f"{name}, searching": figures, f"{name}, after it": figures["tuning"]}
            shares.append(f"{name}: the search takes {100 * figures['share_of_the_search']:.1f} % of a step's time.")
        for label, f in stages.items():
            cells = [f"{f['tokens_per_second']:,.0f}", f"{1000 * f['seconds_per_step']:.1f}"]
            rows.append([label, *cells, f"{f['extra_bytes'] / GIB:.2f}", f"{f['trainable_parameters']:,}"])
    return [markdown_table(rows), *shares]


def real(done: dict[str, Any]) -> list[str]:
    """Accuracy and speed of each method."""
    rows = [
        ["method", "accuracy, %", "skipped", "trained parameters", "tuning, s", "prefill, × base", "decode, × base"]
    ]
    runs = {name: figures for name, figures in done.items() if "scores" in figures}
    for name, f in runs.items():
        cells = [f"{100 * f['scores']['accuracy']:.2f}", f"{len(f['skipped_modules'])} of {f['num_mhas']}"]
        cells += [f"{f['trainable_parameters']:,}", f"{f['tuning_seconds']:.0f}"]
        rows.append([METHODS[name], *cells, *(f"{f['speed_up'][task]:.2f}" for task in ("prefill", "decode"))])
    steps = done.get("steps", {}).get("steps")
    return [
        f"{steps} steps each, one seed, all merged. Speed is that of the merged model over the base.",
        *([markdown_table(rows)] if runs else []),
    ]


def compiled(done: dict[str, Any]) -> list[str]:
    """Milliseconds per step, and how long compiling took."""
    base = statistics.median(done[BASE]["seconds"]) if BASE in done else None
    rows = [["model", "ms per step", "× base", "compiling and the first steps, s"]]
    for name, f in done.items():
        own = statistics.median(f["seconds"])
        rows.append([name, f"{1000 * own:.2f}", f"{base / own:.2f}" if base else "", f"{f['compile_seconds']:.1f}"])
    first = next(iter(done.values()))
    return [f"Batch {first['batch']}, behind {first['tokens']} tokens.", markdown_table(rows)]


def suite(done: dict[str, Any]) -> list[str]:
    """How many tests passed, and the names of those that did not."""
    rows = [["file", "passed", "failed", "skipped"]]
    failed = []
    for name, figures in done.items():
        counts = figures["counts"]
        bad = sum(counts.get(kind, 0) for kind in ("failed", "error", "errors"))
        rows.append([name, str(counts.get("passed", 0)), str(bad), str(counts.get("skipped", 0))])
        failed += figures["failed"]
    return [markdown_table(rows), *failed]


DESCRIBE = {
    "correctness": correctness,
    "capacity": capacity,
    "speed": speed,
    "training": training,
    "real": real,
    "compile": compiled,
    "suite": suite,
}


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(parts: dict[str, dict[str, Any]], device: str, path: Path) -> bool:
    """Draws the speed-up over the base against the share skipped, the limit as a line; False for want of figures.

    A panel for each setting: of prefill, of decoding, and, in the last, of decoding in the largest batch that fits.
    """
    from matplotlib.figure import Figure

    panels: list[tuple[str, dict[str, list[tuple[float, float]]]]] = []
    sizes = {name: r["figures"] for name, r in parts["capacity"].items() if name and "figures" in r}
    num_mhas = next((f["num_attentions"] for f in sizes.values()), None)
    for record in parts["speed"].values():
        f = record.get("figures") or {}
        seconds = f.get("seconds", {})
        if not seconds.get(BASE) or num_mhas is None:
            continue
        base = statistics.median(seconds[BASE])
        lines: dict[str, list[tuple[float, float]]] = {EAS: [(0, 1)], "limit": [(0, 1)]}
        for name, times in seconds.items():
            kind, _, skipped = name.rpartition(", ")
            if kind in lines and skipped.endswith(" skipped"):
                share = int(skipped.removesuffix(" skipped")) / num_mhas
                lines[kind].append((share, base / statistics.median(times)))
        title = f"{f['task']}, {f['mode']}\n{f['batch']} × {f['tokens']} tokens"
        panels.append((title, {kind: sorted(points) for kind, points in lines.items()}))
    if sizes.get(BASE, {}).get("tokens_per_second"):
        base = sizes[BASE]["tokens_per_second"]
        points = [
            (f["num_skip"] / f["num_attentions"], f["tokens_per_second"] / base)
            for f in sizes.values()
            if "tokens_per_second" in f
        ]
        panels.append((f"decode, largest batch\nbehind {sizes[BASE]['depth']} tokens", {EAS: sorted(points)}))
    if not panels:
        return False
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.3 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    styles = {
        "limit": {"color": "black", "linestyle": "--", "linewidth": 1.2},
        EAS: {"color": "#0072B2", "marker": "o", "linewidth": 2.0},
    }
    for one, (title, lines) in zip(axes, panels):
        one.axhline(1.0, color="#808080", linewidth=0.8)
        for kind, points in lines.items():
            one.plot([100 * x for x, _ in points], [y for _, y in points], label=kind, **styles[kind])
        one.set_title(title, size=8)
        one.tick_params(labelsize=8)
        one.spines[["top", "right"]].set_visible(False)
    for one in axes[len(panels) :]:
        one.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.supxlabel("attentions skipped, %", size=9)
    figure.supylabel("speed-up over the base", size=9)
    figure.suptitle(device, size=9, x=0.02, ha="left")
    figure.savefig(path, dpi=150)
    return True
