"""The examples run as their users run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, WIDTH, build_model, needs_easy_vqa

ROOT = Path(__file__).parents[1]
ANSWERS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow", "circle", "rectangle", "triangle"}


def run(program: str, *options: str, folder: Path = ROOT, **environment: str) -> str:
    """What the example prints, run in `folder`; fails with its error output if it fails."""
    process = subprocess.run(
        [sys.executable, "-m", f"examples.{program}", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=570,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@needs_easy_vqa
def test_main_job_smoke(tmp_path: Path) -> None:
    printed = run("easy_vqa", "--quick", "--device", "cpu", "--output-dir", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.md").read_text() in printed
    assert len(report["skipped_modules"]) == 4
    assert report["logits_difference"] < 1e-4
    for name in ("skip_map.png", "search_curve.png", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
    merged_config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert len(merged_config["eas"]["skipped"]) == 4


@needs_easy_vqa
def test_base_never_sees_an_answer_of_the_task() -> None:
    from examples.easy_vqa import data as vqa
    from examples.easy_vqa import pretrain as pretrain_base

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


def test_benchmark(tmp_path: Path) -> None:
    config = build_model("llama").config
    config.vocab_size, config.architectures = 1000, ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    options = [
        "--model",
        tmp_path / "base",
        "--rank",
        8,
        "--attention-rank",
        4,
        "--num-skip",
        1,
        3,
        "--settings",
        "2x8",
    ]
    options += ["--rounds", 1, "--load-rounds", 1, "--decode-steps", 2, "--threads", 1, "--device", "cpu"]
    options += ["--fold", "--fold-shape", 64, 96, 4, "--output-dir", out]
    printed = run("benchmark", *map(str, options))
    results = json.loads((out / "benchmark.json").read_text())
    assert (out / "benchmark.md").read_text().splitlines()[0] in printed
    assert (out / "benchmark.png").stat().st_size > 0
    assert results["device"].startswith("CPU")

    assert [point["num_skip"] for point in results["sweep"]] == [1, 3]
    for point in results["sweep"]:
        num_skip, models = point["num_skip"], point["models"]
        kept = LAYERS - num_skip
        # float32 keys and values of 2 heads of 8 channels
        assert models["base"]["kv_bytes_per_token"] == LAYERS * 2 * 2 * 8 * 4
        for name, values in models.items():
            is_whole = name in ("base", "lora-merged", "adapters")
            assert values["kv_ratio"] == (1.0 if is_whole else kept / LAYERS)
            assert values["checkpoint_bytes"] > values["weights_bytes"]
            # The limit is compared with a folded model whose cache it has, but for what each prompt leaves there.
            assert (values["other_cache_bytes_per_sequence"] > 0) == (name == "eas-merged-prompt")
        attention = 2 * WIDTH * WIDTH + 2 * WIDTH * 16 + WIDTH  # with its norm
        assert models["lora-merged"]["parameters"] == models["base"]["parameters"]
        assert models["limit"]["parameters"] == models["base"]["parameters"] - num_skip * attention
        # Of what is folded, only biases remain.
        biases = num_skip * (2 * 48 + WIDTH) + kept * (WIDTH + 2 * 16)
        assert models["eas-merged"]["parameters"] == models["limit"]["parameters"] + biases
        assert point["logits_difference"]["merged and unmerged"] < 1e-5
        assert point["logits_difference"]["merged and unmerged, prompt context"] < 1e-5
        assert point["logits_difference"]["limit and merged with adapters that change nothing"] < 1e-6
        (setting,) = point["settings"]
        for task in ("prefill", "decode"):
            assert set(setting["seconds"][task]) == set(models)
            assert setting["speed_up"][task]["base"]["median"] == 1.0
        assert setting["run_bytes"]["eas-merged"] < setting["run_bytes"]["base"]

    fold = results["fold"]
    assert fold["difference"] < 1e-5
    assert fold["extra_bytes"]["thin"] < fold["extra_bytes"]["dense"]
    assert results["merge"]["extra_bytes"] > 0


def test_peak_memory() -> None:
    from examples.shared.peak_memory import peak_memory

    start = torch.ones(256, 1024)  # 1 MiB
    with peak_memory("cpu") as peak:
        product = start * 2  # 1
        view = product.view(-1)[5:]
        total = torch.cat([start, product])  # 3
        del product
        total += 1
        assert view[0] == 2
        del view  # 2
        total = total * 2  # 4
        del total
        start.add_(1)
    assert peak.bytes == pytest.approx(4 * 2**20, abs=64)


def run_short(name: str, folder: Path, *options: str) -> str:
    """What a short example prints; it writes to the working directory."""
    printed = run(f"short.{name}", *options, folder=folder, OMP_NUM_THREADS="1")
    record = json.loads((folder / "outputs" / "short" / name / "eas_search.json").read_text())
    assert len(record["strategy"]["rounds"]) == 12  # enough to choose by
    assert (folder / "outputs" / "short" / name / "merged" / "model.safetensors").is_file()
    return printed


def test_short_language_model(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the package trl (extra `test`)")
    from examples.gpu.real import write_stand_in

    write_stand_in(tmp_path)
    printed = run_short("text_llm", tmp_path, str(tmp_path))
    assert "1 of 4" in printed
    assert re.search(r"The merged model, reloaded, answers \d+ of 24 right\.", printed)


def test_short_encoder(tmp_path: Path) -> None:
    from examples.gpu.real import write_stand_in

    write_stand_in(tmp_path)  # for its tokenizer
    build_model("bert", model_class="BertModel").save_pretrained(tmp_path)
    printed = run_short("encoder", tmp_path, str(tmp_path))
    assert "2 of 4" in printed
    assert re.search(r"The merged model, reloaded, classifies \d+ of 100 right\.", printed)


@needs_easy_vqa
def test_short_vision_language_model(tmp_path: Path) -> None:
    printed = run_short("vlm", tmp_path)
    assert "4 of 8" in printed
    share = float(re.search(r"The merged model, reloaded, answers ([\d.]+)% of the questions right\.", printed)[1])
    assert share > 25  # always the most frequent answer: 18 %
