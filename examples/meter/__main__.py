"""Tune a small METER on three tasks, skip half of its co-attention layers' attentions, merge, and see what was gained.

    python -m examples.meter                        # all three tasks
    python -m examples.meter --task vqa --skip 0.75 # one of them, 18 of 24 attentions skipped
    python -m examples.meter --quick                # the same flow as a smoke test

The base is METER in small (see pretrain.py), with 6 co-attention layers in each of its two towers, so with 24
attentions, half of them self-attentions, half to the other modality. The tasks, made from easy-VQA's images (see
meter/tasks.py), are visual question answering, statements about two images as in NLVR2, and retrieval. For each the
base is tuned twice with the same data and number of steps: with adapters at all attentions (nothing skipped), and with
EAS, which searches for those that the task does not need. --output-dir gets report.md and report.json, and a folder
for each task with skip_map.png, search_curve.png, the adapter, and the merged checkpoint, which is loaded again and
compared.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from examples.meter.tasks import AUTO_CLASSES, TASKS, blind_score
from examples.shared.measure import markdown_table, num_parameters, on_device, size_on_disk, speed_up, time_models
from examples.shared.task import Task, plot_search, search_share, tune
from peft_eas import EASCallback, EASConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--skip", type=float, default=0.5, help="share of the 24 attentions to skip")
    parser.add_argument("--steps", type=int, help="optimizer steps of each of the two runs (default: the task's)")
    parser.add_argument("--search-steps", type=search_share, default=0.3, help="share of the steps for the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/meter_easy_vqa"))
    parser.add_argument("--quick", action="store_true", help="a smoke test: few steps")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (20 if arguments.quick else None)
    return arguments


def tune_with_eas(task: Task, num_skip: int, folder: Path, arguments: argparse.Namespace) -> tuple[PeftModel, float]:
    """The task's base, tuned with `num_skip` attentions skipped, and the seconds that training took."""
    torch.manual_seed(arguments.seed)
    model = get_peft_model(task.load_base(), EASConfig(**task.eas, num_skip=num_skip))
    steps = arguments.steps or task.steps
    callback = EASCallback(
        reward_dataset=task.reward,
        search_steps=arguments.search_steps,
        seed=arguments.seed,
        fit_tokens=0,  # the paper's start
    )
    start = time.perf_counter()
    tune(model, task, folder, arguments.seed, [callback], max_steps=steps)
    return model.eval(), time.perf_counter() - start


def run(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Tunes, searches, merges, saves and reloads for one task; returns its figures."""
    task, folder = TASKS[name](), arguments.output_dir / name
    base = task.load_base().eval()
    before = task.score(base)
    scores = {"without looking": {next(iter(before)): blind_score(name)}, "base, before tuning": before}
    full, full_seconds = tune_with_eas(task, 0, folder / "nothing_skipped", arguments)
    scores["adapters, nothing skipped"] = task.score(full)
    num_mhas = len(full.base_model.candidates)
    num_skip = round(arguments.skip * num_mhas)
    eas, eas_seconds = tune_with_eas(task, num_skip, folder / "eas", arguments)
    scores[f"EAS, {num_skip} of {num_mhas} skipped"] = task.score(eas)
    skipped = eas.base_model.skipped_modules
    eas.save_pretrained(folder / "adapter")

    device = next(eas.parameters()).device
    batch = on_device(task.deployed_batch(), eas)
    with torch.no_grad():
        unmerged_logits = eas(**batch).logits
    merged = copy.deepcopy(eas).merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder / "merged")
    reloaded = AUTO_CLASSES[name].from_pretrained(folder / "merged").to(device)
    with torch.no_grad():
        difference = (reloaded(**batch).logits - unmerged_logits).abs().max().item()
    base.to(device).save_pretrained(folder / "base")
    seconds = time_models({"base": base, "merged": reloaded}, batch, 3 if arguments.quick else 25)["prefill"]
    if 0 < num_skip < num_mhas:
        plot_search(folder)
    return {
        "scores": scores,
        "skipped": skipped,
        "logits_difference": difference,
        "speed_up": speed_up(seconds, "merged"),
        "trainable": {"nothing skipped": num_parameters(full, True), "EAS": num_parameters(eas, True)},
        "parameters": {"base": num_parameters(base), "merged": num_parameters(reloaded)},
        "bytes": {kind: size_on_disk(folder / kind) for kind in ("base", "merged")},
        "training_seconds": {"nothing skipped": full_seconds, "EAS": eas_seconds},
    }


def describe(name: str, figures: dict) -> str:
    """One task's part of the report."""
    columns = list(dict.fromkeys(column for scores in figures["scores"].values() for column in scores))
    rows = [[name, *columns]]
    for model, scores in figures["scores"].items():
        rows.append([model, *(f"{100 * scores[key]:.2f} %" if key in scores else "" for key in columns)])
    parameters, seconds = figures["parameters"], figures["training_seconds"]
    sizes = [f"{figures['bytes'][kind] / 1e6:.2f}" for kind in ("base", "merged")]
    return "\n\n".join(
        [
            f"## {name}",
            markdown_table(rows),
            f"Parameters: {parameters['base']:,} of the base, {parameters['merged']:,} of the merged model "
            f"({sizes[0]} and {sizes[1]} MB on disk), which is {figures['speed_up']:.2f}× as fast (a batch of 16, "
            f"median of paired rounds). Trained: {figures['trainable']['nothing skipped']:,} parameters with nothing "
            f"skipped in {seconds['nothing skipped']:.0f} s, {figures['trainable']['EAS']:,} with EAS and its search "
            f"in {seconds['EAS']:.0f} s. Largest difference between the logits of the merged model, reloaded, and of "
            f"the unmerged one: {figures['logits_difference']:.1e}.",
            f"Skipped: {', '.join(figures['skipped']) or 'nothing'}.",
        ]
    )


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    figures = {name: run(name, arguments) for name in arguments.task}
    report = "\n\n".join(describe(name, values) for name, values in figures.items())
    print(f"\n{report}\n\nIt lies in {arguments.output_dir}.")
    (arguments.output_dir / "report.md").write_text(report + "\n")
    options = {key: str(value) for key, value in vars(arguments).items()}
    (arguments.output_dir / "report.json").write_text(json.dumps({**figures, "options": options}, indent=2) + "\n")


if __name__ == "__main__":
    main()
