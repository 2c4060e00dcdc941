"""The runs of the methods on the problems, each of which is made once and is a line of runs.jsonl."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Scores:
    """Of all sets of one size, by mask: the mean losses on the batches of the search, and on those held out."""

    search: dict[int, float]
    held_out: dict[int, float]


def read_scores(folder: Path) -> dict[tuple[str, int], Scores]:
    """By problem and number skipped, where they were computed."""
    return {
        (line["problem"], line["k"]): Scores(
            *({int(mask): score for mask, score in line[part].items()} for part in ("search", "held_out"))
        )
        for line in read_lines(folder / "scores.jsonl")
    }


def score_sets(name: str, problem: Problem, sizes: Sequence[int], folder: Path) -> None:
    """Computes the scores of all sets of the given sizes, if that is not done: lines of scores.jsonl."""
    done = read_scores(folder)
    for k in sizes:
        if (name, k) in done:
            continue
        sets = list(combinations(range(len(problem.candidates)), k))
        line: dict[str, Any] = {"problem": name, "k": k, "search": {}, "held_out": {}}
        for one in tqdm(sets, desc=f"{name}, all sets of {k}", unit="set"):
            line["search"][mask_of(one)] = round(problem.search_score(one), 6)
            line["held_out"][mask_of(one)] = round(problem.score(one), 6)
        append_line(folder / "scores.jsonl", line)


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
            found = {
                budget: {"skipped": one, "score": round(problem.score(one), 6)} for budget, one in choices.items()
            }
            record = dict(zip(KEY, point)) | {"choices": found, "cpu_seconds": time.process_time() - start}
            append_line(folder / "runs.jsonl", record)
