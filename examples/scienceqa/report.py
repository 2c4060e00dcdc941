"""The report of examples.scienceqa, from the figures of its stages."""

import json
import statistics
from pathlib import Path
from typing import Any

from examples.scienceqa.scores import accuracies, accuracy_rows, chance
from examples.shared.measure import markdown_table
from examples.shared.task import Task


def write_report(folder: Path, figures: dict[str, Any], task: Task, data: str, num_mhas: int) -> str:
    """Writes report.md and report.json into `folder`; returns the text.

    Args:
        figures: of all stages, by their names. data: what the problems are, and whether images are shown, in words.
    """
    merge, settings = figures["merge"], figures["settings"]
    labels = {
        "before tuning": "before tuning",
        "adapters": "adapters, nothing skipped",
        "eas": f"EAS, {len(merge['skipped'])} of {num_mhas} attentions skipped",
        "merged": "EAS, merged and reloaded",
    }
    problems = task.test.problems
    tables = {"written": {"guessing": chance(problems)}, "ranked": {"guessing": chance(problems)}}
    for stage, label in labels.items():
        tables["written"][label] = accuracies(problems, figures[stage]["answers"])
        if "ranked" in figures[stage]:
            tables["ranked"][label] = accuracies(problems, figures[stage]["ranked"])
    unread = {label: figures[stage]["answers"].count(None) for stage, label in labels.items()}
    changed = sum(a != b for a, b in zip(figures["eas"]["answers"], figures["merged"]["answers"]))
    runs = {name: figures[f"{name} tuned"] for name in ("adapters", "eas")}
    parts = [
        f"# LaVIN on ScienceQA, {settings['format']}, {figures['finished']['date']}",
        data,
        "Accuracy in percent, of the letters in generated texts:",
        markdown_table(accuracy_rows(problems, tables["written"])),
        "NAT, SOC, LAN: natural, social and language science. TXT, IMG, NO: problems with a hint, with an image (some "
        "have both), with neither. G1-6, G7-12: grades. Guessing: the average of guessing among each problem's "
        "choices. Texts without a letter, which are wrong: "
        + ", ".join(f"{number} ({label})" for label, number in unread.items())
        + f". Merged and reloaded, EAS answers {changed} of {len(problems)} problems otherwise than unmerged; the "
        f"largest difference of a logit is {merge['logits_difference']:.1e}, the largest logit "
        f"{merge['largest_logit']:.1f}.",
    ]
    if len(tables["ranked"]) > 1:
        parts += [
            'The same, of the letters whose logits rank first behind "The answer is":',
            markdown_table(accuracy_rows(problems, tables["ranked"])),
        ]
    parts += [
        f"Skipped: {', '.join(merge['skipped'])}.",
        _speed_table(figures["speed"]),
        f"Prompts of {' × '.join(map(str, figures['speed']['prompts']))} tokens. Times are medians, in brackets the "
        "median speed-up over the base in paired rounds.",
        f"Tuning, {task.steps} steps of {task.batch_size} problems: {runs['adapters']['seconds']:.0f} s with nothing "
        f"skipped ({runs['adapters']['trainable']:,} trained parameters, last loss {runs['adapters']['loss']:.3f}), "
        f"{runs['eas']['seconds']:.0f} s with EAS and its search ({runs['eas']['trainable']:,}, "
        f"{runs['eas']['loss']:.3f}). Answering: "
        + ", ".join(f"{figures[stage]['seconds']:.0f} s ({label})" for stage, label in labels.items())
        + ". What was interrupted counts from where it went on.",
        f"Problems: {len(set(task.train.indices))} trained on, {len(task.reward)} for the search's rewards, "
        f"{len(problems)} for the test. Settings: "
        # Where the data lies says nothing to who reads the report.
        + ", ".join(
            f"{name} {value}" for name, value in settings.items() if value not in (None, False) and name != "data"
        )
        + ".",
    ]
    text = "\n\n".join(parts) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(
        json.dumps({"accuracy": tables, "num_mhas": num_mhas, **figures}, indent=2) + "\n", encoding="utf-8"
    )
    return text


def _speed_table(speed: dict[str, Any]) -> str:
    rows = [["model", "parameters", "prefill, ms", "decode, ms/token", "KV cache, bytes/token"]]
    for name, label in (("base", "base"), ("unmerged", "EAS, unmerged"), ("merged", "EAS, merged")):
        times = [
            f"{1000 * statistics.median(speed['seconds'][task][name]) / steps:.1f} "
            f"({speed['speed_up'][task][name]:.2f}×)"
            for task, steps in (("prefill", 1), ("decode", speed["decode_steps"]))
        ]
        cache = f"{speed['cache_bytes_per_token'][name]:.0f}"
        rows.append([label, f"{speed['parameters'][name]:,}", *times, cache])
    return markdown_table(rows)
