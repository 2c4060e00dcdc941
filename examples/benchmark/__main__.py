"""Speed, memory and size of EAS models against the base, and against the limit: the model written without attentions.

    python -m examples.benchmark                                             # random weights of 160M shapes
    python -m examples.benchmark --model smollm2 --num-skip 4 8 12 16
    python -m examples.benchmark --shape 7b --dtype bfloat16 --device cuda --settings 1x128 1x2048 8x512 --cuda-graphs
    python -m examples.benchmark --model NAME_OR_PATH --compile --fold

For every number of skipped attentions, and every setting "batch x prompt tokens", one process runs all variants in
turns: a round runs each of them once, in a random order, and a ratio is the median over the rounds of base time
/ variant time of the same round. A run is a prefill and then greedy decoding behind it by direct calls of the model
with a KV cache (`generate()` adds the same to all); the decoding time leaves the prefill out. All variants share the
base's weights in memory (see variants.py), so memory is given as each variant's own weights plus what one run takes
above them: what CUDA's allocator says, and on the CPU the tensors that operators return, without what kernels need
for themselves. The adapters' weights are random: neither they nor the choice of the attentions matter for speed.

Writes benchmark.json, with the times of every round, and benchmark.png to --output-dir.
"""

import argparse
import gc
import json
import platform
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from examples.benchmark.fold_cost import layer_fold_cost, model_merge_cost, synchronize
from examples.benchmark.report import TASKS, describe, describe_fold, draw, ratios
from examples.benchmark.runners import RUNNERS, Runner, run_once
from examples.benchmark.variants import (
    BUILDERS,
    SHAPES,
    Recipe,
    adapted,
    choose_skipped,
    limit,
    load_base,
    merged,
)
from examples.shared.peak_memory import peak_memory
from peft_eas.architectures import default_targets


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", help="a decoder's checkpoint, a folder with a config.json alone (random weights), or smollm2"
    )
    source.add_argument("--shape", choices=SHAPES, default="160m", help="a Llama of these shapes with random weights")
    parser.add_argument("--num-skip", type=int, nargs="+", help="(default: a sixth, a third, a half)")
    parser.add_argument(
        "--variants", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="the base is always in"
    )
    parser.add_argument(
        "--settings", type=_setting, nargs="+", default=[(1, 128), (1, 512), (8, 128)], help="batch x prompt tokens"
    )
    parser.add_argument("--decode-steps", type=int, default=16, help="tokens that a run decodes")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count, after one to warm up")
    parser.add_argument("--load-rounds", type=int, default=3, help="0: no load times and checkpoint sizes")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters of skipped MHAs")
    parser.add_argument("--attention-rank", type=int, default=8, help="rank of the adapters of kept MHAs; 0 for none")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads on the CPU; default: torch's own choice")
    parser.add_argument("--compile", action="store_true", help="also under torch.compile, with a static cache")
    parser.add_argument("--cuda-graphs", action="store_true", help="also with decoding as a CUDA graph, static cache")
    parser.add_argument("--fold", action="store_true", help="also the cost of folding and of the whole merge")
    parser.add_argument(
        "--fold-shape", type=int, nargs=3, default=(4096, 11008, 32), metavar=("D", "D_FF", "R"), help="for --fold"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/benchmark"))
    options = parser.parse_args()
    if options.cuda_graphs and torch.device(options.device).type != "cuda":
        parser.error(f"--cuda-graphs needs --device cuda, but the device is {options.device}.")
    options.variants = [name for name in BUILDERS if name == "base" or name in options.variants]
    return options


def _setting(text: str) -> tuple[int, int]:
    batch, _, tokens = text.partition("x")
    return int(batch), int(tokens)


# --- running ---------------------------------------------------------------------------------------------------------


def random_tokens(model: nn.Module, batch: int, tokens: int, device: str) -> torch.Tensor:
    """(batch, tokens), int64: the same each time, without the special tokens that come first."""
    most = min(1000, model.get_input_embeddings().num_embeddings)
    return torch.randint(3, most, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def measure_setting(
    models: dict[str, nn.Module], mode: str, setting: tuple[int, int], options: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """Times of every round in seconds, (per token for decoding), and in eager mode the memory that a run takes."""
    batch, tokens = setting
    prompt = random_tokens(next(iter(models.values())), batch, tokens, options.device)
    # Capturing a graph takes a few steps more.
    runners = {name: RUNNERS[mode](model, tokens + options.decode_steps + 8) for name, model in models.items()}
    names = list(runners)
    times: dict[str, dict[str, list[float]]] = {task: {name: [] for name in names} for task in TASKS}
    failed: dict[str, str] = {}
    for number in range(options.rounds + 1):
        for name in random.sample(names, len(names)):
            bar.update()
            if name in failed:
                continue
            try:
                seconds = run_once(runners[name], prompt, options.decode_steps, options.device)
            except RuntimeError as error:  # what cannot be captured or compiled is left out of the table
                if mode == "eager" or name == "base":
                    raise
                failed[name] = str(error).splitlines()[0]
                continue
            if number > 0:  # the first warms up
                times["prefill"][name].append(seconds[0])
                times["decode"][name].append(seconds[1] / options.decode_steps)
    names = [name for name in names if name not in failed]
    times = {task: {name: times[task][name] for name in names} for task in TASKS}
    result = {"mode": mode, "batch": batch, "tokens": tokens, "seconds": times, "failed": failed}
    result["speed_up"] = {task: {name: ratios(times[task], name) for name in names} for task in TASKS}
    if mode == "eager":
        result["run_bytes"] = {}
        for name, runner in runners.items():
            runner.reset()
            with peak_memory(options.device) as peak:
                run_once(runner, prompt, options.decode_steps, options.device)
            result["run_bytes"][name] = peak.bytes
    return result


# --- sizes, loading, and whether the variants are what they should be ------------------------------------------------


@torch.inference_mode()
def cache_bytes(model: nn.Module, prompt: Tensor) -> tuple[list[int], int]:
    """Bytes of keys and values in each slot of the cache behind `prompt`, and of whatever else the slots hold."""
    runner = Runner(model, 0)
    runner.advance(prompt)
    keys_and_values, others = [], 0
    for slot in runner.cache.layers:
        keys_and_values.append(sum(t.numel() * t.element_size() for t in (slot.keys, slot.values) if t is not None))
        # What a prompt leaves for its adapters is kept by name.
        tensors = [t for value in vars(slot).values() if isinstance(value, dict) for t in value.values()]
        others += sum(t.numel() * t.element_size() for t in tensors)
    return keys_and_values, others


def measure_sizes(models: dict[str, nn.Module], recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """Parameters, bytes of weights and of KV cache.

    Raises:
        RuntimeError: if a cache holds more or less than the slots of the attentions that are computed.
    """
    prompt = random_tokens(recipe.base, 2, 8, options.device)
    names = default_targets(recipe.base)
    base_slots, _ = cache_bytes(recipe.base, prompt)
    sizes = {}
    for name, model in models.items():
        slots, others = cache_bytes(model, prompt)
        computed = names if name in ("base", "lora-merged", "adapters") else set(names) - set(recipe.skipped)
        expected = sum(base_slots[recipe.base.get_submodule(mha).layer_idx] for mha in computed)
        if sum(slots) != expected:
            raise RuntimeError(
                f"The KV cache of {name} holds {sum(slots)} bytes, not the {expected} of its attentions."
            )
        sizes[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "kv_bytes_per_token": sum(slots) / prompt.numel(),
            "kv_ratio": sum(slots) / sum(base_slots),
            "other_cache_bytes_per_sequence": others / len(prompt),
        }
    return sizes


def measure_loading(models: dict[str, nn.Module], options: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Seconds of from_pretrained in turns with the base's, from files that the system has read before, and sizes."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        base_folder = Path(root) / "base"
        models["base"].save_pretrained(base_folder)
        load_stock = _loader(models["base"], base_folder, options)
        for name, model in models.items():
            folder = Path(root) / name
            if name != "base":
                model.save_pretrained(folder)
            loads = {"base": load_stock, name: load_stock if name == "base" else _loader(model, folder, options)}
            seconds: dict[str, list[float]] = {way: [] for way in loads}
            for number in range(options.load_rounds + 1):
                for way, load in loads.items():
                    start = time.perf_counter()
                    load()
                    synchronize(options.device)
                    if number > 0:  # the first warms up
                        seconds[way].append(time.perf_counter() - start)
                gc.collect()
            needed = {base_folder if name == "base" or isinstance(model, PeftModel) else folder, folder}
            size = sum(path.stat().st_size for place in needed for path in place.glob("*.safetensors"))
            speed_up = ratios(seconds, name)
            results[name] = {"checkpoint_bytes": size, "load_seconds": seconds[name], "load_speed_up": speed_up}
            if name != "base":
                shutil.rmtree(folder)  # no more than two checkpoints at a time
            bar.update()
    return results


def _loader(model: nn.Module, folder: Path, options: argparse.Namespace) -> Callable[[], nn.Module]:
    """What loads a model of the kind of `model` from `folder`; an adapter on the base in the folder "base" beside."""
    if isinstance(model, PeftModel):
        load_stock = _loader(model.get_base_model(), folder.parent / "base", options)
        return lambda: PeftModel.from_pretrained(load_stock(), folder)
    return lambda: type(model).from_pretrained(folder, dtype=options.dtype).to(options.device)


@torch.inference_mode()
def check_logits(models: dict[str, nn.Module], recipe: Recipe, device: str) -> dict[str, float]:
    """Largest difference of logits, relative to the largest logit, of variants that compute the same."""
    token_ids = random_tokens(recipe.base, 2, 16, device)

    def difference(actual: nn.Module, expected: nn.Module) -> float:
        a, b = (model(input_ids=token_ids).logits.double() for model in (actual, expected))
        return ((a - b).abs().max() / b.abs().max()).item()

    checks = {
        "merged and unmerged": difference(merged(recipe), adapted(recipe, recipe.skipped)),
        "limit and merged with adapters that change nothing": difference(limit(recipe), merged(recipe, identity=True)),
    }
    if "eas-merged-prompt" in models:
        unmerged = adapted(recipe, recipe.skipped, context="prompt")
        checks["merged and unmerged, prompt context"] = difference(models["eas-merged-prompt"], unmerged)
    return checks


# --- all of it ----------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}), {torch.get_num_threads()} threads"


def main() -> None:
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.dtype = getattr(torch, options.dtype)
    torch._dynamo.config.cache_size_limit = 64  # of recompilations, for all variants have the same code
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    random.seed(0)
    base = load_base(options.model, options.shape, options.dtype, options.device)
    num_attentions = len(default_targets(base))
    skips = options.num_skip or sorted({round(num_attentions * share) for share in (1 / 6, 1 / 3, 1 / 2)})
    modes = ["eager"] + ["torch.compile"] * options.compile + ["CUDA graphs"] * options.cuda_graphs
    title = f"{options.model or 'Llama ' + options.shape}, {str(options.dtype)[6:]}, {device_name(options.device)}"
    results: dict[str, Any] = {
        "title": title,
        "device": device_name(options.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": {key: str(value) for key, value in vars(options).items()},
        "sweep": [],
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)

    runs = len(modes) * len(options.settings) * (options.rounds + 1) + bool(options.load_rounds)
    report = []
    with tqdm(total=len(skips) * len(options.variants) * runs, unit="run", smoothing=0.05) as bar:
        for num_skip in skips:
            bar.set_description(f"{num_skip} skipped")
            recipe = Recipe(base, choose_skipped(base, num_skip), options.rank, options.attention_rank)
            models = {name: BUILDERS[name](recipe) for name in options.variants}
            point = {"num_skip": num_skip, "num_attentions": num_attentions, "skipped_modules": recipe.skipped}
            point["logits_difference"] = check_logits(models, recipe, options.device)
            point["models"] = measure_sizes(models, recipe, options)
            if options.load_rounds:
                for name, values in measure_loading(models, options, bar).items():
                    point["models"][name] |= values
            point["settings"] = [
                measure_setting(models, mode, setting, options, bar) for mode in modes for setting in options.settings
            ]
            results["sweep"].append(point)
            (options.output_dir / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
            report.append(describe(point, title))
            bar.write(report[-1] + "\n")
            del models
            gc.collect()
    if options.fold:
        results["fold"] = layer_fold_cost(*options.fold_shape, options.rounds, options.dtype, options.device)
        results["merge"] = model_merge_cost(recipe, options.device)
        report.append(describe_fold(results["fold"], results["merge"]))
        print(report[-1])
        (options.output_dir / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.output_dir / "benchmark.md").write_text("\n\n".join(report) + "\n")
    draw(results, options.output_dir / "benchmark.png")
    print(f"All of it lies in {options.output_dir}.")


if __name__ == "__main__":
    main()
