"""The benchmark of choices: its methods on a problem that is a table, its files, its report, and the tuned sets."""

import json
import math
import random
import re
import sys
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import build_model
from peft import get_peft_model
from tiny_queries import load_tiny_base, tiny_queries
from transformers.utils import logging

from examples.search_quality import tuned
from examples.search_quality.methods import METHODS, WITHOUT_SEARCH, choices_at, evolution
from examples.search_quality.problem import Problem, Set, problem_of
from examples.search_quality.report import write_report
from examples.search_quality.runs import KEY, read_runs, read_scores, run, score_sets
from examples.search_quality.smollm2 import read_text
from examples.shared import minilm
from examples.shared.json_lines import read_lines
from peft_eas import EASConfig, fit_adapters

COSTS = (2.0, 0.02, 0.5, 0.01, 0.3, 0.04)  # of the log loss, by candidate
NUM_SEARCH, NUM_HELD_OUT = 6, 2
SEARCHES = [method for method in METHODS if method not in WITHOUT_SEARCH]
Measured = list[tuple[Set, int]]


def table(folder: Path, noise: float = 0.0, **settings: object) -> tuple[Problem, Measured]:
    """A problem whose costs add up, each batch with a level of its own; and what was measured of it."""
    folder.mkdir(exist_ok=True)
    measured: Measured = []

    def measure(skipped: Set, batch: int) -> float:
        measured.append((skipped, batch))
        error = random.Random(f"{skipped} {batch}").gauss(0.0, noise)
        return math.exp(sum(COSTS[index] for index in skipped) + 0.1 * batch + error)

    names = [f"layer.{number}" for number in range(len(COSTS))]
    similarities = [1.0 - cost / 4 for cost in COSTS]
    file = folder / "losses.jsonl"
    return Problem(names, similarities, measure, NUM_SEARCH, NUM_HELD_OUT, file, settings), measured


# --- the problem ---------------------------------------------------------------------------------------------------


def test_a_loss_is_measured_once_and_kept(tmp_path: Path) -> None:
    problem, measured = table(tmp_path)
    assert problem.loss((1, 3), 2) == problem.loss((1, 3), 2) == round(math.exp(0.03 + 0.2), 6)
    assert measured == [((1, 3), 2)]
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write("[10, 3, 1.2")  # cut off while it was written
    problem, measured = table(tmp_path)
    assert problem.loss((1, 3), 2) == round(math.exp(0.23), 6)
    assert not measured
    assert problem.loss((1, 3), 3) == round(math.exp(0.33), 6)
    assert read_lines(tmp_path / "losses.jsonl")[1:] == [[0b1010, 2, 1.2586], [0b1010, 3, 1.390968]]


def test_losses_of_other_settings_are_refused(tmp_path: Path) -> None:
    table(tmp_path, tokens=128)
    with pytest.raises(SystemExit, match=r"measured with .*'tokens': 128.*now the settings are .*'tokens': 64"):
        table(tmp_path, tokens=64)


def test_scores_are_of_the_batches_held_out(tmp_path: Path) -> None:
    problem, measured = table(tmp_path)
    assert problem.score((3,)) == pytest.approx((math.exp(0.61) + math.exp(0.71)) / 2)
    assert {batch for _, batch in measured} == {6, 7}
    measured.clear()
    assert problem.search_score(()) == pytest.approx(sum(math.exp(0.1 * batch) for batch in range(6)) / 6)
    assert {batch for _, batch in measured} == set(range(6))


def test_a_models_loss_is_that_without_the_attentions(tmp_path: Path) -> None:
    base, dropped = build_model("llama").eval(), build_model("llama").eval()
    for layer in (0, 2):
        dropped.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.arange(1, 25).view(3, 1, 8)]
    with torch.no_grad():
        expected = [dropped(**batch).loss.item() for batch in batches]
    problem = problem_of(base, batches, 1, tmp_path / "losses.jsonl", {}, task_type="CAUSAL_LM")
    assert [problem.loss((0, 2), batch) for batch in range(3)] == pytest.approx(expected, abs=2e-6)
    assert problem.score((0, 2)) == pytest.approx((expected[1] + expected[2]) / 2, abs=2e-6)
    assert problem.loss((), 0) != problem.loss((0, 2), 0)
    assert len(problem.similarities) == len(problem.candidates) == 4


def test_fitted_adapters_stand_for_what_is_dropped(tmp_path: Path) -> None:
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.arange(1, 49).view(3, 2, 8)]
    expected = get_peft_model(build_model("llama").eval(), EASConfig(num_skip=1, attention_r=0, context="none"))
    fit_adapters(expected.eval(), batches[:2])
    expected.base_model.set_skipped_modules([expected.base_model.candidates[index] for index in (0, 2)])
    base = build_model("llama").eval()
    problem = problem_of(base, batches, 2, tmp_path / "losses.jsonl", {}, True, task_type="CAUSAL_LM")
    with torch.no_grad():
        assert problem.loss((0, 2), 2) == pytest.approx(expected(**batches[2]).loss.item(), rel=1e-4)


# --- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("method", [method for method in METHODS if method != "random"])
def test_methods_find_the_cheapest_where_costs_add_up(method: str, seed: int, tmp_path: Path) -> None:
    problem, measured = table(tmp_path, noise=0.005)
    choices = choices_at([240], METHODS[method](problem, 3, seed))
    assert choices == {240: (1, 3, 5)}
    assert all(batch < NUM_SEARCH for _, batch in measured)
    assert {len(skipped) for skipped, _ in measured} <= {1 if method == "single drops" else 3}


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_to_their_budgets_and_seeds(method: str, tmp_path: Path) -> None:
    problem, _ = table(tmp_path, noise=0.1)
    asked: Measured = []
    loss = problem.loss
    problem.loss = lambda *one: (asked.append(one), loss(*one))[1]
    whole = choices_at([30, 60], METHODS[method](problem, 2, 0))
    assert all(len(set(choice)) == 2 and choice == tuple(sorted(choice)) for choice in whole.values())
    for budget, choice in whole.items():
        asked.clear()
        last = None
        for spent, last_choice in METHODS[method](problem, 2, 0):
            assert spent == len(asked)  # each evaluation counts, whether its loss was known or not
            if spent > budget:
                break
            last = last_choice
            if spent == budget or method in WITHOUT_SEARCH:
                break
        assert last == choice


@pytest.mark.parametrize("method", SEARCHES)
def test_seeds_take_the_batches_in_other_orders(method: str, tmp_path: Path) -> None:
    orders = set()
    for seed in range(4):
        problem, measured = table(tmp_path / str(seed))
        choices_at([3 * len(COSTS)], METHODS[method](problem, 2, seed))
        orders.add(tuple(dict.fromkeys(batch for _, batch in measured)))
    assert len(orders) > 1


def test_a_budget_that_reaches_no_choice_is_left_out() -> None:
    steps: Iterator[tuple[int, Set]] = iter([(30, (0,)), (60, (1,)), (90, (2,)), (95, (3,))])
    assert choices_at([20, 60, 80, 90], steps) == {60: (1,), 80: (1,), 90: (2,)}
    assert next(steps) == (95, (3,))  # which was not asked for


def test_evolution_starts_from_cosine_similarity_and_swaps(tmp_path: Path) -> None:
    problem, measured = table(tmp_path)
    problem.similarities = [0.0, 0.9, 0.8, 0.1, 0.7, 0.2]
    steps = evolution(problem, 3, 0)
    assert next(steps) == (0, (1, 2, 4))
    next(steps)
    first = [skipped for skipped, batch in measured if batch == measured[0][1]]
    assert 1 <= len(first) <= 6
    assert len({len(set(skipped) - {1, 2, 4}) for skipped in first}) > 1  # one swap, and more


# --- runs and their report -----------------------------------------------------------------------------------------


def test_runs_are_made_once(tmp_path: Path) -> None:
    problem, _ = table(tmp_path)
    run("table", problem, [2], ["cosine", "bandit"], [0], tmp_path)
    run("table", problem, [2, 3], ["cosine", "bandit"], [0, 1], tmp_path)
    records = read_runs(tmp_path)
    keys = [tuple(record[key] for key in KEY) for record in records]
    assert len(keys) == len(set(keys)) == 2 * 2 * 2
    best = {"skipped": [1, 3], "score": round(math.exp(0.03) * (math.exp(0.6) + math.exp(0.7)) / 2, 6)}
    assert records[0]["choices"] == {"60": best, "180": best, "360": best}
    again, measured = table(tmp_path)
    run("table", again, [2, 3], ["cosine", "bandit"], [0, 1], tmp_path)
    score_sets("table", again, [2], tmp_path)
    scores = read_scores(tmp_path)["table", 2]
    assert len(scores.held_out) == len(scores.search) == math.comb(6, 2)
    assert min(scores.search, key=scores.search.get) == 0b1010
    measured.clear()
    score_sets("table", again, [2], tmp_path)
    assert not measured
    assert len(read_runs(tmp_path)) == len(keys)


def test_the_report_tells_losses_and_regrets(tmp_path: Path) -> None:
    write_report(tmp_path)
    assert (tmp_path / "table.md").read_text() == "No run is finished yet.\n"

    def line(file: str, **values: object) -> None:
        with (tmp_path / file).open("a") as lines:
            lines.write(json.dumps(values) + "\n")

    for seed, (mask, score) in enumerate([([0], 2.0), ([1], 4.0)]):
        for problem in ("large", "small"):
            choices = {"360": {"skipped": mask, "score": score}}
            line("runs.jsonl", problem=problem, k=1, method="thompson", seed=seed, choices=choices)
    line("scores.jsonl", problem="large", k=0, search={"0": 1.2}, held_out={"0": 1.25})
    held_out = {"1": 2.0, "2": 4.0, "4": 3.0, "8": 7.0}  # mean 4, variance (4 + 0 + 1 + 9) / 4
    line("scores.jsonl", problem="small", k=1, search={"1": 5.0, "2": 3.0, "4": 2.0, "8": 9.0}, held_out=held_out)
    for given, loss in (([0], 0.5), ([1], 0.4), ([2], 0.7)):
        line("tuned.jsonl", strategy=None, seed=0, given=given, skipped=given, steps=9, accuracy=0.5, loss=loss)
    line("tuned.jsonl", strategy="bandit", seed=0, given=None, skipped=[0], steps=9, accuracy=0.25, loss=0.6)
    write_report(tmp_path)
    text = re.sub(" +", " ", (tmp_path / "table.md").read_text())
    assert "## large: 1 skipped (loss with nothing skipped 1.250)" in text
    assert "| thompson | — | — | 3.000 ± 1.414 | 2 |" in text
    assert "## small: 1 skipped, 4 sets (loss of the best 2.000, of the second 3.000, of the third 4.000" in text
    assert f"| 1.0000 ({1 / math.sqrt(3.5):.4f} sd); 1, 1 of 2 | 2 |" in text
    assert f"| every set on all batches of the search | 1.0000 ({1 / math.sqrt(3.5):.4f} sd); 1, 1 of 1 |" in text
    assert "| bandit, seed 0 | 0 | 25.00 | 0.6000 | 2 of 3 | 0.5000 |" in text
    assert (tmp_path / "loss_against_evaluations.png").stat().st_size > 0


@pytest.fixture
def program() -> Iterator[ModuleType]:
    from examples.search_quality import __main__ as program

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()  # its `main` sets them for its process
    yield program
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def test_the_program_runs_its_parts(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = program.Part(lambda args: table(args.output_dir)[0], (2,), (0, 1), True)
    monkeypatch.setitem(program.PROBLEMS, "meter", part)
    argv = ["search_quality", "--parts", "meter", "--methods", "bandit", "random", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    assert "## meter: 2 skipped, 15 sets" in capsys.readouterr().out
    assert {(record["method"], record["seed"]) for record in read_runs(tmp_path)} == {
        (method, seed) for method in ("bandit", "random") for seed in (0, 1)
    }
    monkeypatch.setattr(sys, "argv", ["search_quality", "--parts", "smollm2", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        program.main()
    assert "the part smollm2 needs --data DIR" in capsys.readouterr().err


def test_a_text_has_each_lecture_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"problems.json is missing. Give the folder"):
        read_text(tmp_path)
    problems = {str(number): {"lecture": "L", "question": f"Q{number}", "solution": "S"} for number in range(2)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    assert read_text(tmp_path) == "L\n\nQ0 S\n\nQ1 S"


# --- sets that are tuned -------------------------------------------------------------------------------------------


def test_searches_and_every_set_are_tuned_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuned, "load_queries", lambda folder: tiny_queries())
    monkeypatch.setattr(minilm, "load_base", load_tiny_base)
    monkeypatch.setattr(tuned, "minilm_task", partial(minilm.minilm_task, steps=30, batch_size=4))
    for name, value in {"NUM_SKIP": 1, "SEEDS": (0,)}.items():
        monkeypatch.setattr(tuned, name, value)
    tuned.run(tmp_path, tmp_path)
    records = tuned.read_tuned(tmp_path)
    assert [record["given"] for record in records] == [None, None, *([index] for index in range(3))]
    assert [record["strategy"] for record in records] == ["thompson", "bandit", None, None, None]
    assert all(record["skipped"] == record["given"] for record in records[2:])
    assert all(len(record["skipped"]) == 1 and 0 <= record["accuracy"] <= 1 for record in records)
    assert len({record["loss"] for record in records}) == 5
    tuned.run(tmp_path, tmp_path)
    assert tuned.read_tuned(tmp_path) == records
    assert list(combinations(range(3), 1)) == [tuple(record["given"]) for record in records[2:]]
