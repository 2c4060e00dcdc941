"""The runs of the methods on the problems, each of which is made once and is a line of runs.jsonl."""

import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.search_quality.methods import METHODS, choices_at
from examples.search_quality.problem import Problem, mask_of
from examples.shared.json_lines import append_line, read_lines

BUDGETS = (60, 180, 360)  # evaluations
KEY = ("problem", "k", "method", "seed")  # of a record: what tells a run from others

Record = dict[str, Any]


def read_runs(folder: Path) -> list[Record]:
    """The finished runs."""
    return read_lines(folder / "runs.jsonl")


def read_scores(folder: Path) -> dict[tuple[str, int], dict[int, float]]:
    """By problem and number skipped: the scores of all sets of that size, by mask, where they were computed."""
    return {
        (line["problem"], line["k"]): {int(mask): score for mask, score in line["scores"].items()}
        for line in read_lines(folder / "scores.jsonl")
    }


def score_sets(name: str, problem: Problem, sizes: Sequence[int], folder: Path) -> None:
    """Computes the scores of all sets of the given sizes, if that is not done: lines of scores.jsonl."""
    done = read_scores(folder)
    for k in sizes:
        if (name, k) not in done:
            sets = list(combinations(range(len(problem.candidates)), k))
            scores = {mask_of(one): problem.score(one) for one in tqdm(sets, desc=f"{name}, all sets of {k}")}
            append_line(folder / "scores.jsonl", {"problem": name, "k": k, "scores": scores})


def run(
    name: str, problem: Problem, sizes: Sequence[int], methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> None:
    """Makes the runs that are not made, one seed after the other, so that an early table is a fair one.

    A record has the choice at every budget that allows one, as a list of indices, with its score.
    """
    done = {tuple(record[key] for key in KEY) for record in read_runs(folder)}
    points = [(name, k, method, seed) for seed in seeds for k in sizes for method in methods]
    with tqdm([point for point in points if point not in done], desc=name, unit="run") as bar:
        for point in bar:
            _, k, method, seed = point
            bar.set_postfix_str(f"{method}, {k} skipped, seed {seed}")
            start = time.process_time()
            choices = choices_at(BUDGETS, METHODS[method](problem, k, seed))
            found = {budget: {"skipped": one, "score": problem.score(one)} for budget, one in choices.items()}
            record = dict(zip(KEY, point)) | {"choices": found, "cpu_seconds": time.process_time() - start}
            append_line(folder / "runs.jsonl", record)
