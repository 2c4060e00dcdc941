"""What is done with a merged folder in vLLM's backend: prefixes kept, prompts in chunks, LoRA, quantised, a server."""

import json
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import merged_smollm2
import pytest
import torch
from engines import interpreter, own_environment, vllm_jobs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from vllm_models import GEMMA3, LLAMA, job, merge, prompts, save, tokens, word_tokenizer

NEW = 16
VARIABLE = "PEFT_EAS_VLLM_PYTHON"


def continuations(model: PreTrainedModel, asked: list[list[int]]) -> list[list[int]]:
    """The tokens of transformers."""
    return [merged_smollm2.greedy(model, prompt, NEW) for prompt in asked]


@pytest.mark.parametrize("row", [LLAMA, GEMMA3], ids=["llama", "gemma3"])
def test_a_cache_of_prefixes_and_chunks(row, tmp_path):
    """The second prompt begins like the first, of which two blocks of 128 tokens are kept."""
    interpreter(VARIABLE)
    model = merge(row, [0, 2])
    first, other = prompts(300, 40)
    asked = [first, first[:280] + other]
    options = {"model_impl": "transformers", "enable_prefix_caching": True, "max_num_seqs": 1}
    options |= {"enable_chunked_prefill": True, "max_num_batched_tokens": 32}
    folder = save(model, tmp_path / "m")
    request = {"folder": folder, "prompts": asked, "num_tokens": NEW, "options": options}
    (result,) = vllm_jobs([request], tmp_path)
    assert result["tokens"] == continuations(model, asked)
    assert result["cached"] == [0, 256]


def test_lora(tmp_path):
    """An adapter that PEFT makes on the merged model."""
    interpreter(VARIABLE)
    model = merge(LLAMA, [0, 2])
    request = job(model, tmp_path / "m", enable_lora=True)
    expected = tokens(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=names, init_lora_weights=False)
    torch.manual_seed(5)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    without, with_it = vllm_jobs([request, {**request, "lora": str(tmp_path / "lora")}], tmp_path)
    assert without["tokens"] == expected
    assert with_it["tokens"] == tokens(adapted) != expected


def to_int8(folder: Path) -> None:
    """Quantises a saved model by channel, in the format of compressed-tensors; activations are quantised by token."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if name.endswith("_proj.weight") and weight.dim() == 2:  # not a marker
            weights[f"{name}_scale"] = weight.abs().amax(-1, keepdim=True) / 127
            weights[name] = (weight / weights[f"{name}_scale"]).round().to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        **{"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"},
        **{"ignore": ["lm_head"], "config_groups": {"group_0": scheme}},
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_quantised(tmp_path):
    """FP8 and INT8 say what the model says, nearly: the stock model as often."""
    interpreter(VARIABLE)
    asked, jobs, expected = prompts(*[8] * 64), [], []
    for name, model in (("stock", LLAMA.build()), ("merged", merge(LLAMA, [0, 2]))):
        request = {"prompts": asked, "num_tokens": 1}
        options = {"model_impl": "transformers", "dtype": "bfloat16"}
        save(model, tmp_path / name / "fp8")
        to_int8(Path(save(model, tmp_path / name / "int8")))
        fp8 = {**options, "quantization": "fp8_per_channel"}
        jobs.append({"folder": str(tmp_path / name / "fp8"), **request, "options": fp8})
        jobs.append({"folder": str(tmp_path / name / "int8"), **request, "options": options})
        with torch.no_grad():
            expected += 2 * [model(torch.tensor(asked)).logits[:, -1].argmax(-1).tolist()]
    results = vllm_jobs(jobs, tmp_path)
    same = [
        sum([token] == said for token, said in zip(row, result["tokens"])) for row, result in zip(expected, results)
    ]
    assert min(same) >= 48, same


# --- a server --------------------------------------------------------------------------------------------------------

_OPTIONS = ["--trust-remote-code", "--model-impl", "transformers", "--dtype", "float32", "--enforce-eager"]
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
BENCHMARK = """
from vllm.benchmarks.throughput import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def saved(folder: Path) -> PreTrainedModel:
    """A merged model, written with the tokenizer that a server asks for."""
    model = merge(LLAMA, [0, 2])
    word_tokenizer().save_pretrained(save(model, folder))
    return model


@contextmanager
def served(folder: Path):
    """The URL of a server of the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [interpreter(VARIABLE), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *_OPTIONS]
    command += ["--served-model-name", "merged", "--max-model-len", "512", "--host", "127.0.0.1", "--port", port]
    log = folder.with_name("server.log")
    with log.open("w") as file:
        server = subprocess.Popen(command, env=own_environment(**_ENVIRONMENT), stdout=file, stderr=subprocess.STDOUT)
        try:
            end, url = time.monotonic() + 400, f"http://127.0.0.1:{port}"
            while True:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            server.terminate()
            server.wait()


def test_the_server_for_openais_clients(tmp_path):
    interpreter(VARIABLE)
    model, asked = saved(tmp_path / "m"), prompts(5, 17, 100)
    with served(tmp_path / "m") as url:
        answers = []
        for prompt in asked:
            question = {"model": "merged", "prompt": prompt, "max_tokens": NEW, "temperature": 0}
            body = json.dumps({**question, "return_token_ids": True}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                answers.append(json.load(response)["choices"][0]["token_ids"])
    assert answers == continuations(model, asked)


def test_the_benchmark_of_throughput(tmp_path):
    """What `vllm bench throughput` runs."""
    interpreter(VARIABLE)
    saved(tmp_path / "m")
    sizes = ["--dataset-name", "random", "--num-prompts", "4", "--random-input-len", "32", "--random-output-len", "8"]
    command = [interpreter(VARIABLE), "-c", BENCHMARK, "--model", str(tmp_path / "m"), *_OPTIONS, *sizes]
    environment = own_environment(**_ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    command += ["--max-model-len", "512"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Total num output tokens:  32" in done.stdout
