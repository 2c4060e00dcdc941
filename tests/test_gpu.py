"""The command for rented GPUs, rehearsed on the CPU: what could fail there for no reason of the GPU fails here."""

import importlib
import json
import os
import sys
import time

import pytest
import torch
from test_examples import run

from examples.gpu.parts import Clock, Part, Records, run_part
from examples.gpu.report import TITLES, verdict, write_report


def case_records(folder):
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["case"]]


def run_here(monkeypatch, *options):
    """As `run`, but in this process, which has imported everything already."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr("sys.argv", ["run.py", *options])
    monkeypatch.setattr("sys.path", list(sys.path))
    importlib.import_module("examples.gpu.run").main()


def test_every_part_runs_at_tiny_sizes_and_none_twice(tmp_path, monkeypatch):
    command = ("gpu.run", "--device", "cpu", "--quick", "--output-dir", str(tmp_path))
    printed = run(*command)
    parts = json.loads((tmp_path / "figures.json").read_text())["parts"]
    assert list(parts) == list(TITLES)
    if "error" in parts["compile"]["base"]:  # torch 2.6 does not compile transformers' own model either
        del parts["compile"]
    failed = {(name, case): r["error"] for name, part in parts.items() for case, r in part.items() if "error" in r}
    assert failed == {}
    checks = [check for r in parts["correctness"].values() for check in r["figures"]]
    assert len(checks) > 100
    assert {verdict(difference, tolerance) for _, difference, tolerance in checks} == {"pass", "", "left out"}
    assert set(parts["real"]) == {"", "steps", "nothing_skipped", "eas", "lora"}
    report = (tmp_path / "report.md").read_text()
    assert report in printed
    assert "FAIL" not in report
    assert all(f"## {title}" in report for title in TITLES.values())
    assert (tmp_path / "speed_up.png").stat().st_size > 10_000

    before = case_records(tmp_path)
    run_here(monkeypatch, *command[1:])
    assert case_records(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_rehearsal_is_named(monkeypatch):
    with pytest.raises(SystemExit, match=r"no CUDA GPU here.*--device cpu --quick"):
        run_here(monkeypatch)


def fail():
    raise ValueError("a sentence\nand more")


def test_a_part_that_fails_crashes_or_hangs_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.gpu.parts.GRACE", 0.2)
    records, clock = Records(tmp_path), Clock(time.monotonic() + 300)

    def broken(_):
        yield "before", lambda: 1
        raise RuntimeError("no more cases")

    parts = {
        "correctness": lambda _: iter([("wrong", fail), ("right", lambda: [["it", 0.0, 1.0]])]),
        "capacity": lambda _: iter([("crash", lambda: os._exit(7)), ("next", lambda: 2)]),
        "speed": lambda _: iter([("hang", lambda: time.sleep(60)), ("never", lambda: 3)]),
        "training": broken,
        "real": lambda _: iter([("last", lambda: 4)]),
    }
    for name, cases in parts.items():
        run_part(Part(name, cases, seconds=1.0 if name == "speed" else 60.0), records, clock)
    found = {key: r.get("figures", r.get("error")) for key, r in records.all().items()}
    assert found["correctness", "wrong"] == "ValueError: a sentence"
    assert found["correctness", "right"] == [["it", 0.0, 1.0]]
    assert "did not finish" in found["capacity", "crash"]
    assert found["capacity", "next"] == 2
    assert "did not finish" in found["speed", "hang"]
    assert ("speed", "never") not in found
    assert found["training", "before"] == 1
    assert found["training", ""] == "RuntimeError: no more cases"
    assert found["real", "last"] == 4

    # The same command again does what is left, and tries again what failed.
    again = Records(tmp_path)
    calls = []
    for name in ("correctness", "capacity"):
        cases = [(case, lambda key=(name, case): calls.append(key)) for p, case in found if p == name and case]
        run_part(Part(name, lambda _, cases=cases: iter(cases), seconds=60.0), again, clock, apart=False)
    assert calls == [("correctness", "wrong"), ("capacity", "crash")]


def test_what_there_is_no_time_for_is_left_out_from_the_end(tmp_path):
    records, clock = Records(tmp_path), Clock(time.monotonic() + 2.0)
    parts = [
        ("suite", [("slow", lambda: time.sleep(2.2)), ("late", lambda: 1)]),
        ("compile", [("never", lambda: 1)]),
    ]
    for name, cases in parts:
        run_part(Part(name, lambda _, cases=cases: iter(cases), seconds=60.0), records, clock)
    assert records.figures("suite", "slow") is None  # there are none, but no error either
    found = {key: r.get("error") for key, r in records.all().items()}
    assert found == {
        ("suite", "slow"): None,
        ("suite", "late"): "left out, as the time was over",
        ("suite", ""): None,
        ("compile", ""): "left out, as the time was over",
    }
    write_report(Records(tmp_path / "none"), tmp_path, {"device": "nothing"})
    assert (tmp_path / "report.md").read_text().count("Left out.") == len(TITLES)


def test_a_nan_never_passes():
    assert verdict(float("nan"), 1.0) == "**FAIL**"
    assert verdict(0.0, 0.0) == "pass"
