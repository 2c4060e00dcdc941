"""The runs of the methods on the problems: each is made once, and is a line of runs.jsonl."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.search_quality.methods import METHODS, choices_at
from examples.search_quality.problem import Problem
from examples.shared.json_lines import append_line, read_lines

BUDGETS = (60, 180, 360)  # evaluations
KEY = ("problem", "k", "method", "seed")  # of a record: what tells a run from others

Record = dict[str, Any]


def read_runs(folder: Path) -> list[Record]:
    """The finished runs."""
    return read_lines(folder / "runs.jsonl")


def run(
    name: str, problem: Problem, num_skip: Sequence[int], methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> None:
    """Makes the runs that are not made, one seed after the other, so that an early table is a fair one.

    A record has the choice at every budget that allows one, as a list of indices, with its score.
    """
    done = {tuple(record[key] for key in KEY) for record in read_runs(folder)}
    points = [(name, k, method, seed) for seed in seeds for k in num_skip for method in methods]
    with tqdm([point for point in points if point not in done], desc=name, unit="run") as bar:
        for point in bar:
            _, k, method, seed = point
            bar.set_postfix_str(f"{method}, {k} skipped, seed {seed}")
            start = time.process_time()
            choices = choices_at(BUDGETS, METHODS[method](problem, k, seed))
            found = {str(budget): {"skipped": list(one), "score": problem.score(one)} for budget, one in choices.items()}
            record = dict(zip(KEY, point)) | {"choices": found, "cpu_seconds": time.process_time() - start}
            append_line(folder / "runs.jsonl", record)
