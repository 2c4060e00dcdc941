"""Compares EAS with what it competes against: task x method x share of MHAs skipped x seed.

    python -m examples.compare                               # the whole grid; stop it and start it again at will
    python -m examples.compare --tasks lavin-easy-vqa --shares 0.5 --seeds 0
    python -m examples.compare --quick                       # a smoke test of a minute or two
    python -m examples.compare --report                      # only the table and the figure, from the finished runs

Every run tunes the same base with the same data, steps and learning rate, merges what can be merged, and then scores
the deployed model and times it against the base, in turns. A finished run is a line of runs.jsonl in --output-dir and
is not repeated, and one that fails does not keep the others from running. The table (table.md) and the figure
(accuracy_against_speed.png) are written anew after every run. Several processes may work on one grid at a time if they
are given different --tasks or --seeds; --report then makes one table of all.
"""

import argparse
import datetime
import json
import statistics
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from examples.compare.methods import METHODS, SKIPS_NOTHING
from examples.compare.report import headline, write_report
from examples.compare.runs import count_mhas, run, settings_of
from examples.compare.tasks import TASKS
from examples.shared.json_lines import append_line, read_lines
from examples.shared.task import Task

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
        settings = json.loads(json.dumps(settings_of(tasks[record["task"]], record["method"])))
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
