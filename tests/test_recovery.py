"""The ablation of what wins accuracy back: its runs on a tiny model, its files, its report."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
from scienceqa_data import write_llm, write_many
from tiny_queries import load_tiny_base, tiny_queries

from examples.recovery import __main__ as program
from examples.recovery import fit_cost, scienceqa
from examples.recovery.report import write_report
from examples.recovery.runs import KEY, read_runs, run
from examples.recovery.variants import LORA, NOTHING_SKIPPED, REFERENCES, VARIANTS
from examples.shared import minilm
from examples.shared.json_lines import append_line


def tiny_task(monkeypatch: pytest.MonkeyPatch, *_: object) -> minilm.Task:
    monkeypatch.setattr(minilm, "load_base", load_tiny_base)
    return minilm.minilm_task(tiny_queries(), Path(), steps=12, batch_size=8, learning_rate=2e-2)


def test_every_variant_is_tuned_once_and_with_the_same_set_unless_it_searches(monkeypatch, tmp_path):
    task = tiny_task(monkeypatch)
    run(task, [1, 2], [*VARIANTS, *REFERENCES], [0], tmp_path)
    records = read_runs(tmp_path)
    points = [(task.name, k, name, 0) for k in (1, 2) for name in VARIANTS]
    points += [(task.name, 0, name, 0) for name in REFERENCES]
    assert [tuple(record[key] for key in KEY) for record in records] == points
    for k in (1, 2):
        sets = {record["variant"]: record["skipped"] for record in records if record["num_skip"] == k}
        assert all(len(one) == k for one in sets.values())
        assert all(sets[name] == sets["fit"] for name, variant in VARIANTS.items() if not variant.is_searched)
    by_name = {record["variant"]: record for record in records if record["num_skip"] == 1}
    assert by_name["output adapter"]["trainable"] == by_name["fit, output adapter"]["trainable"]
    assert by_name["output adapter"]["trainable"] > by_name["identity"]["trainable"] == by_name["fit"]["trainable"]
    assert by_name["fit, output adapter, FFN adapter"]["trainable"] > by_name["fit, output adapter"]["trainable"]
    assert len({record["loss"] for record in by_name.values()}) == len(VARIANTS)
    run(task, [1, 2], [*VARIANTS, *REFERENCES], [0], tmp_path)
    assert read_runs(tmp_path) == records


def test_scienceqa_without_its_test_problems(monkeypatch, tmp_path):
    monkeypatch.setattr(scienceqa, "LOADING", {"llm": str(write_llm(tmp_path / "llm"))})
    monkeypatch.setattr(scienceqa, "MAX_TOKENS", 250)
    task = scienceqa.scienceqa_task(write_many(tmp_path / "data", num_val=12), steps=2, batch_size=4)
    problems = task.test.problems
    assert {problem.id for problem in problems} < {str(100 + i) for i in range(24, 36)}
    run(task, [2], ["fit, output adapter", LORA], [0], tmp_path)
    for one in read_runs(tmp_path):
        assert one["accuracy"] * len(problems) == pytest.approx(round(one["accuracy"] * len(problems)), abs=1e-3)
        assert 0 < one["loss"] < 10


def record(variant: str, accuracy: float, seed: int = 0, num_skip: int = 2) -> dict:
    point = dict(zip(KEY, ("tiny", num_skip, variant, seed)))
    return {
        **point,
        "skipped": [],
        "trainable": 1000,
        "steps": 9,
        "cpu_seconds": 3.2,
        "accuracy": accuracy,
        "loss": 0.5,
    }


def test_the_report_tells_what_is_won_back(tmp_path):
    for one in (
        record(NOTHING_SKIPPED, 0.9, num_skip=0),
        record("identity", 0.8),
        record("fit", 0.84, seed=0),
        record("fit", 0.86, seed=1),
    ):
        append_line(tmp_path / "runs.jsonl", one)
    write_report(tmp_path)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "table.md").read_text().split("\n")
    ]
    rows = {row[0]: row[1:] for row in rows if len(row) > 1}
    assert rows[NOTHING_SKIPPED] == ["90.00", "—", "0.500", "1,000", "3", "1"]
    assert rows["identity"] == ["80.00", "—", "0.500", "1,000", "3", "1"]
    assert rows["fit"] == ["85.00 ± 1.41", "50 %", "0.500", "1,000", "3", "2"]
    assert (tmp_path / "accuracy.png").stat().st_size > 0


def test_the_report_without_a_run(tmp_path):
    write_report(tmp_path)
    assert (tmp_path / "table.md").read_text() == "No run is finished yet.\n"
    assert not (tmp_path / "accuracy.png").exists()


def test_the_program(monkeypatch, tmp_path, capsys):
    load = partial(tiny_task, monkeypatch)
    monkeypatch.setattr(program.transformers.utils.logging, "set_verbosity_error", lambda: None)  # for other tests
    monkeypatch.setattr(program, "MODELS", {"minilm": program.Model(load, (1,))})
    argv = ["recovery", "--data", str(tmp_path), "--variants", "fit", "--seeds", "0", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    assert "| fit " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["recovery"])
    with pytest.raises(SystemExit):
        program.main()
    assert "--data DIR is needed for minilm" in capsys.readouterr().err


def test_what_a_fit_costs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fit_cost", "--shape", "tiny", "--tokens", "600", "--device", "cpu"])
    fit_cost.main()
    assert re.search(r"shape tiny, float32, cpu: \d+ s for 600 tokens, .* The 4 blocks", capsys.readouterr().out)
