"""Compares EAS with what it competes against: task x method x share of MHAs skipped x seed.

    python examples/compare.py                               # the whole grid; stop it and start it again at will
    python examples/compare.py --tasks lavin-easy-vqa --shares 0.5 --seeds 0
    python examples/compare.py --quick                       # a smoke test of a minute or two
    python examples/compare.py --report                      # only the table and the figure, from the finished runs

Every run tunes the same base with the same data, steps and learning rate, merges what can be merged, and then scores
the deployed model and times it against the base, in turns. A finished run is a line of runs.jsonl in --output-dir and
is not repeated, and one that fails does not keep the others from running. The table (table.md) and the figure
(accuracy_against_speed.png) are written anew after every run. Several processes may work on one grid at a time if they
are given different --tasks or --seeds; --report then makes one table of all.
"""

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from baselines.methods import METHODS, SKIPS_NOTHING, search_of
from compare_report import headline, write_report
from json_lines import append_line, read_lines
from lavin.easy_vqa import lavin_easy_vqa
from measure import cache_bytes_per_token, generates, num_parameters, on_device, speed_up, time_models
from meter.tasks import meter_nlvr2, meter_retrieval, meter_vqa
from peft import get_peft_model
from task import Task, tune
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

import peft_eas
from peft_eas import EASConfig

TASKS: dict[str, Callable[[], Task]] = {
    "lavin-easy-vqa": lavin_easy_vqa,
    "meter-vqa": meter_vqa,
    "meter-nlvr2": meter_nlvr2,
    "meter-retrieval": meter_retrieval,
}
Key = tuple[str, str, float, int, int]
KEY = ("task", "method", "share", "seed", "steps")  # of a record: what tells a run from others


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 0.75], help="of the MHAs to skip")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps per run (default: each task's own)")
    parser.add_argument("--rounds", type=int, default=25, help="paired rounds of timing per run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--output-dir", type=Path, help="(default outputs/compare, or outputs/compare_quick)")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="one share, one seed, 12 steps, 3 rounds")
    arguments = parser.parse_args()
    for share in arguments.shares:
        if not 0 < share < 1:
            parser.error(f"--shares {share}: a share of the MHAs lies between 0 and 1, such as 0.5")
    if arguments.quick:
        arguments.shares, arguments.seeds, arguments.steps, arguments.rounds = [0.5], [0], 12, 3
    if arguments.output_dir is None:
        arguments.output_dir = Path("outputs/compare_quick" if arguments.quick else "outputs/compare")
    return arguments


class SearchTime(TrainerCallback):
    """Notes how long a run took until what it skips was fixed."""

    def __init__(self, model: nn.Module) -> None:
        self.config = getattr(getattr(model, "base_model", model), "active_config", None)
        self.start = time.perf_counter()
        self.seconds = 0.0
        self.is_searching = isinstance(self.config, EASConfig) and self.config.skipped_modules is None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.is_searching and self.config.num_skip:
            self.seconds = time.perf_counter() - self.start
            self.is_searching = self.config.skipped_modules is None


def count_mhas(task: Task) -> int:
    """How many MHAs of the task's base may be skipped."""
    return len(get_peft_model(task.load_base(), EASConfig(num_skip=0, **task.eas)).base_model.candidates)


def settings_of(task: Task) -> dict[str, Any]:
    """What else a run depends on, as values for JSON."""
    search = search_of(task).state()["args"]
    return {"batch_size": task.batch_size, "learning_rate": task.learning_rate, "eas": task.eas, "search": search}


def run(task: Task, num_mhas: int, method: str, share: float, seed: int, rounds: int) -> dict[str, Any]:
    """Tunes, deploys, scores and times one point of the grid; returns its record."""
    start = time.perf_counter()
    base = task.load_base().eval()
    num_skip = round(share * num_mhas)
    set_seed(seed)  # of the adapters' first weights
    prepared = METHODS[method](task.load_base(), task, num_skip, seed)
    search_time = SearchTime(prepared.model)
    callbacks = [*prepared.callbacks, search_time]
    with tempfile.TemporaryDirectory() as folder:
        tuning = time.perf_counter()
        tune(prepared.model, task, Path(folder), seed, callbacks, progress=False)
        tuning = time.perf_counter() - tuning
    trainable = num_parameters(prepared.model, trainable=True)
    skipped = getattr(getattr(prepared.model, "base_model", prepared.model), "skipped_modules", [])
    deployed = prepared.model.merge_and_unload(**prepared.merge_options).eval()
    scores = task.score(deployed)
    batch = on_device(task.deployed_batch(), deployed)
    models = {"base": base.to(deployed.device), "deployed": deployed}
    seconds = time_models(models, batch, rounds)
    record = {
        "task": task.name,
        "method": method,
        "share": share,
        "seed": seed,
        "steps": task.steps,
        "settings": settings_of(task),
        "scores": scores,
        "num_mhas": num_mhas,
        "skipped_modules": skipped,
        "trainable_parameters": trainable,
        "parameters": {name: num_parameters(model) for name, model in models.items()},
        "choice_seconds": prepared.choice_seconds + search_time.seconds,
        "tuning_seconds": tuning,
        "speed_up": {what: speed_up(times, "deployed") for what, times in seconds.items()},
        "seconds": {
            what: {name: statistics.median(own) for name, own in times.items()} for what, times in seconds.items()
        },
    }
    if generates(base):
        record["cache_bytes_per_token"] = {name: cache_bytes_per_token(model, batch) for name, model in models.items()}
    return {**record, "run_seconds": time.perf_counter() - start, **_circumstances()}


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (peft_eas, peft, transformers, torch)},
    }


def key_of(record: dict[str, Any]) -> Key:
    """The values of `KEY`."""
    return tuple(record[name] for name in KEY)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs, each once.

    Raises:
        SystemExit: for a line of something else.
    """
    runs: dict[Key, dict[str, Any]] = {}
    for record in read_lines(path):
        if not isinstance(record, dict) or not {*KEY, "settings", "scores"} <= record.keys():
            raise SystemExit(f"{path} holds a line that is no run: {str(record)[:80]}. Delete it.")
        runs.setdefault(key_of(record), record)  # two processes may have made the same run
    return list(runs.values())


def grid(arguments: argparse.Namespace, tasks: dict[str, Task]) -> list[Key]:
    """The runs to make, one seed after the other, so that an early table is a fair one."""
    return [
        (task.name, method, share, seed, task.steps)
        for seed in arguments.seeds
        for task in tasks.values()
        for method in arguments.methods
        for share in ([0.0] if method in SKIPS_NOTHING else arguments.shares)
    ]


def check_settings(records: list[dict[str, Any]], tasks: dict[str, Task], path: Path) -> None:
    """Raises a SystemExit where a finished run was made with other settings than its task has now."""
    for record in records:
        settings = json.loads(json.dumps(settings_of(tasks[record["task"]])))
        if record["settings"] != settings:
            raise SystemExit(
                f"{path} holds runs of {record['task']} with the settings {record['settings']}; now they are "
                f"{settings}. The two do not compare: give another --output-dir, or delete those lines."
            )


def check_shares(shares: list[float], num_mhas: dict[str, int]) -> None:
    """Raises a SystemExit for a share of a task's MHAs that is none, or all, of them."""
    for name, number in num_mhas.items():
        for share in shares:
            if not 0 < round(share * number) < number:
                raise SystemExit(
                    f"--shares {share}: of the {number} MHAs of {name} that is {round(share * number)}. Give a share "
                    f"from {1 / number:.2g} to {1 - 1 / number:.2g}."
                )


def remaining_time(points: list[Key], records: list[dict[str, Any]]) -> str:
    """How long the runs `points` will take, by the mean of the finished ones of their tasks, or of all."""
    seconds = {name: [r["run_seconds"] for r in records if r["task"] == name] for name, *_ in points}
    known = [record["run_seconds"] for record in records]
    total = sum(statistics.mean(seconds[name] or known) for name, *_ in points)
    return str(datetime.timedelta(seconds=round(total)))


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "runs.jsonl"
    tasks = {task.name: task for task in (TASKS[name]() for name in arguments.tasks)}
    if arguments.steps:
        tasks = {name: replace(task, steps=arguments.steps) for name, task in tasks.items()}
    points = grid(arguments, tasks)

    def finished() -> list[dict[str, Any]]:
        records = [record for record in read_runs(path) if key_of(record) in points]
        return sorted(records, key=lambda record: points.index(key_of(record)))  # processes may have taken turns

    check_settings(finished(), tasks, path)
    failed: list[str] = []
    if not arguments.report:
        num_mhas = {name: count_mhas(task) for name, task in tasks.items()}
        check_shares(arguments.shares, num_mhas)
        with tqdm(points, desc="runs", unit="run") as bar:
            for point in bar:
                if point in map(key_of, finished()):
                    continue
                name, method, share, seed, _ = point
                bar.set_postfix_str(f"{name}, {method}, {share:.0%}, seed {seed}")
                try:
                    record = run(tasks[name], num_mhas[name], method, share, seed, arguments.rounds)
                except Exception:
                    failed.append(f"{name}, {method}, {share:.0%}, seed {seed}")
                    bar.write(f"{failed[-1]} failed:\n{traceback.format_exc()}")
                    continue
                append_line(path, record)
                records = finished()
                write_report(records, arguments.output_dir)
                done = set(map(key_of, records))
                left = remaining_time([point for point in points if point not in done], records)
                bar.write(f"{name}, {method}, {share:.0%}, seed {seed}: {headline(record):.2%}; about {left} to go")
    write_report(finished(), arguments.output_dir)
    print((arguments.output_dir / "table.md").read_text())
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, as told above: {'; '.join(failed)}. Start again to retry them.")


if __name__ == "__main__":
    main()
