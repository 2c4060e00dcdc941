"""What a merge costs and gains at full size: seconds and memory of merging, the largest batch, prefill and decoding.

The weights are random, in bfloat16, of the shapes named (7B: 32 layers, d = 4096): neither they nor the choice of the
attentions matter for speed. Decoding is timed behind a cache that is filled to a depth, as in a long conversation.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from examples.benchmark.fold_cost import seconds_of, synchronize
from examples.benchmark.runners import GraphRunner, Runner
from examples.benchmark.variants import (
    LABELS,
    Recipe,
    adapted,
    choose_skipped,
    load_base,
    lora_merged,
    merged,
    new_cache,
    share,
    take_attention_out,
)
from examples.gpu.parts import Case, Clock
from examples.shared.peak_memory import peak_memory
from peft_eas.architectures import default_targets

# Tokens that are filled in at once, of all sequences together, to bound what a pass takes beside the cache.
CHUNK_TOKENS = 8192
ADAPTERS = "adapters at all attentions, as LaVIN's"


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape: of the model, a name of `SHAPES`. skips: numbers of attentions that EAS skips.
        prefills: (batch, prompt tokens). decodes: (batch, depth). depth: of the largest batch. rounds, steps: of a
            timing, and decoding steps in each. The first of a list is the most important one.
    """

    shape: str = "7b"
    dtype: torch.dtype = torch.bfloat16
    skips: tuple[int, ...] = (16, 12)
    prefills: tuple[tuple[int, int], ...] = (
        *((1, 512), (1, 2048), (8, 512), (1, 128), (8, 2048), (8, 128), (32, 128), (32, 512), (32, 2048)),
    )
    decodes: tuple[tuple[int, int], ...] = ((1, 512), (8, 4096), (8, 512), (1, 4096), (32, 512), (32, 4096))
    eager_decodes: tuple[tuple[int, int], ...] = ((1, 512), (8, 4096))
    depth: int = 4096
    rounds: int = 5
    steps: int = 16
    memory: int | None = None  # bytes for the largest batch; default: what the GPU has


QUICK = Sizes(
    shape="tiny",
    dtype=torch.float32,
    skips=(2, 1),
    prefills=((1, 8), (2, 8)),
    decodes=((1, 8), (2, 8)),
    eager_decodes=((1, 8),),
    depth=8,
    rounds=2,
    steps=2,
    memory=17_300_000,  # little more than the weights
)


def free_memory() -> None:
    """Gives back what nothing holds any longer."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def fill(model: nn.Module, cache: Any, batch: int, depth: int, device: str) -> None:
    """Runs a random prompt of `depth` tokens per sequence into `cache`, in chunks."""
    ids = torch.randint(3, 1000, (batch, depth), generator=torch.Generator().manual_seed(0)).to(device)
    for chunk in ids.split(max(1, CHUNK_TOKENS // batch), dim=1):
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)


# --- the merge, and the largest batch --------------------------------------------------------------------------------


def capacity_cases(sizes: Sizes, device: str) -> Callable[[Clock], Iterator[Case]]:
    """The merge in place, and the largest batch that decodes at `sizes.depth`, of the base and of merged models."""

    def cases(_: Clock) -> Iterator[Case]:
        for num_skip in (0, *sizes.skips):
            name = f"EAS, merged, {num_skip} skipped" if num_skip else "base"
            yield name, lambda num_skip=num_skip: measure_capacity(sizes, num_skip, device)
            free_memory()

    return cases


def measure_capacity(sizes: Sizes, num_skip: int, device: str) -> dict[str, Any]:
    """Merges into a fresh base, the only model in memory, and decodes in as large a batch as there is room for."""
    model = load_base(None, sizes.shape, sizes.dtype, device)
    figures: dict[str, Any] = {"num_skip": num_skip, "num_attentions": len(default_targets(model))}
    if num_skip:
        model, figures["merge"] = merge_in_place(model, num_skip, device)
    free_memory()
    weights = weights_bytes(model)
    per_sequence = cache_bytes(model, sizes.depth + sizes.steps, device)
    figures |= {"weights_bytes": weights, "depth": sizes.depth, "cache_bytes_per_sequence": per_sequence}
    if sizes.memory is not None:
        free = sizes.memory - weights
    else:
        free = torch.cuda.mem_get_info()[0] if torch.device(device).type == "cuda" else 0
    batch = max(1, int(free // per_sequence))  # more cannot fit
    while batch:
        try:
            seconds = time_decoding(model, batch, sizes, device)
        except torch.OutOfMemoryError:
            batch -= max(1, batch // 32)
        else:
            return figures | {"batch": batch, "seconds_per_step": seconds, "tokens_per_second": batch / seconds}
        free_memory()
    return figures


def merge_in_place(base: PreTrainedModel, num_skip: int, device: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merges adapters into the base's own weights; returns the model, and what the merge took."""
    skipped = choose_skipped(base, num_skip)
    model = adapted(Recipe(base, skipped), skipped)  # shares the base's weights
    base_bytes = weights_bytes(base)
    with peak_memory(device) as peak:
        start = time.perf_counter()
        result = model.merge_and_unload()
        synchronize(device)
        seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "extra_bytes": peak.bytes, "base_bytes": base_bytes}


def weights_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.inference_mode()
def cache_bytes(model: nn.Module, length: int, device: str) -> int:
    """Bytes of the keys and values of one sequence of `length` tokens."""
    runner = Runner(model, 0)
    runner.advance(torch.full((1, 8), 3, device=device))
    tensors = [tensor for slot in runner.cache.layers for tensor in (slot.keys, slot.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) * length // 8


@torch.inference_mode()
def time_decoding(model: nn.Module, batch: int, sizes: Sizes, device: str) -> float:
    """Median seconds of a decoding step of `batch` sequences at `sizes.depth`."""
    cache = new_cache(model, sizes.depth + sizes.steps)
    fill(model, cache, batch, sizes.depth, device)
    token = torch.full((batch, 1), 5, device=device)

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    return statistics.median([seconds_of(step, device) for _ in range(sizes.steps)][1:])


# --- prefill and decoding --------------------------------------------------------------------------------------------


def build_variants(sizes: Sizes, device: str) -> dict[str, nn.Module]:
    """The models, which share the base's weights; by the names of the report."""
    base = load_base(None, sizes.shape, sizes.dtype, device)
    models: dict[str, nn.Module] = {LABELS["base"]: base}
    recipes = {num: Recipe(base, choose_skipped(base, num)) for num in sizes.skips}
    first = recipes[sizes.skips[0]]
    models[ADAPTERS] = adapted(first, [])
    for num, recipe in recipes.items():
        models[f"{LABELS['eas-merged']}, {num} skipped"] = merged(recipe)
        limit = share(base)
        take_attention_out(limit, recipe.skipped)
        models[f"limit, {num} skipped"] = limit
    models[f"{LABELS['eas-merged-prompt']}, {sizes.skips[0]} skipped"] = merged(first, context="prompt")
    models[LABELS["lora-merged"]] = lora_merged(first)
    return models


def speed_cases(sizes: Sizes, device: str) -> Callable[[Clock], Iterator[Case]]:
    """Prefill and decoding of all variants, a case for each setting."""

    def cases(_: Clock) -> Iterator[Case]:
        models = build_variants(sizes, device)
        graphs = torch.device(device).type == "cuda"
        mode = "CUDA graphs" if graphs else "static cache"
        todo: list[Case] = [
            (f"decode, {mode}, {b}x{d}", lambda b=b, d=d: measure_decoding(models, b, d, sizes, device, graphs))
            for b, d in sizes.decodes
        ]
        prefills: list[Case] = [
            (f"prefill, {b}x{t}", lambda b=b, t=t: measure_prefill(models, b, t, sizes, device))
            for b, t in sizes.prefills
        ]
        eager: list[Case] = [
            (f"decode, eager, {b}x{d}", lambda b=b, d=d: measure_decoding(models, b, d, sizes, device, None))
            for b, d in sizes.eager_decodes
        ]
        for group in (todo[:2], prefills[:3], eager[:1], todo[2:4], prefills[3:7], eager[1:], todo[4:], prefills[7:]):
            for case in group:
                yield case
                free_memory()

    return cases


@torch.inference_mode()
def measure_prefill(
    models: dict[str, nn.Module], batch: int, tokens: int, sizes: Sizes, device: str
) -> dict[str, Any]:
    """Seconds of a pass over a prompt that fills a cache, of all models in turns; those that fit."""
    ids = torch.randint(3, 1000, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    rounds = sizes.rounds if batch * tokens <= 16384 else max(2, sizes.rounds // 2)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            if name in failed:
                continue
            with _failure_noted(name, failed):
                elapsed = seconds_of(lambda model=model: Runner(model, 0).advance(ids), device)
                seconds[name] += [elapsed] if number else []  # the first warms up
    return {"task": "prefill", "mode": "eager", "batch": batch, "tokens": tokens, "failed": failed} | _kept(seconds)


@torch.inference_mode()
def measure_decoding(
    models: dict[str, nn.Module], batch: int, depth: int, sizes: Sizes, device: str, graphs: bool | None
) -> dict[str, Any]:
    """Seconds per decoding step behind a cache of `depth` tokens, of one model after the other, for caches are large.

    The base comes first and last, so that a drift of the device shows. `graphs`: whether a step is a CUDA graph; None
    for eager steps on a growing cache.
    """
    order = [*models, next(iter(models))]
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    # A capture takes some steps more; a growing cache is copied by each step, as in any eager loop.
    length = depth + (sizes.rounds + 1) * sizes.steps + 8
    for position, name in enumerate(order):
        label = name if position < len(models) else f"{name}, again"
        with _failure_noted(label, failed):
            runner = (GraphRunner if graphs else Runner)(models[name], length)
            if graphs is False:
                runner.cache = new_cache(models[name], length)
            fill(models[name], runner.cache, batch, depth, device)
            token = torch.full((batch, 1), 5, device=device)

            def steps(runner: Runner = runner, token: Tensor = token) -> None:
                for _ in range(sizes.steps):
                    token = runner.advance(token)

            times = [seconds_of(steps, device) / sizes.steps for _ in range(sizes.rounds + 1)]
            seconds[label] = times[1:]
        runner = None
        free_memory()
    mode = {True: "CUDA graphs", False: "static cache", None: "eager"}[graphs]
    return {"task": "decode", "mode": mode, "batch": batch, "tokens": depth, "failed": failed} | _kept(seconds)


@contextlib.contextmanager
def _failure_noted(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Notes what does not fit into memory, or cannot be captured; a broken device breaks the whole case."""
    try:
        yield
    except torch.OutOfMemoryError:
        failed[name] = "does not fit into memory beside the others"
    except RuntimeError as error:
        failed[name] = str(error).strip().splitlines()[0]
    if name in failed:
        free_memory()


def _kept(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {"seconds": {name: times for name, times in seconds.items() if times}}


# --- torch.compile ---------------------------------------------------------------------------------------------------


def compile_cases(sizes: Sizes, device: str) -> Callable[[Clock], Iterator[Case]]:
    """Decoding under torch.compile, a case for each model, since compiling takes long."""

    def cases(_: Clock) -> Iterator[Case]:
        base = load_base(None, sizes.shape, sizes.dtype, device)
        recipe = Recipe(base, choose_skipped(base, sizes.skips[0]))
        builders = {
            LABELS["base"]: lambda: base,
            f"{LABELS['eas-merged']}, {sizes.skips[0]} skipped": lambda: merged(recipe),
            ADAPTERS: lambda: adapted(recipe, []),
        }
        for name, build in builders.items():
            yield name, lambda build=build: measure_compiled(build(), sizes, device)
            torch._dynamo.reset()
            free_memory()

    return cases


@torch.inference_mode()
def measure_compiled(model: nn.Module, sizes: Sizes, device: str) -> dict[str, Any]:
    """Seconds per decoding step of one sequence, and of compiling; on the CPU, a rehearsal, of tracing alone."""
    batch, depth = sizes.decodes[0]
    is_rehearsal = torch.device(device).type == "cpu"
    cache = new_cache(model, depth + (sizes.rounds + 2) * sizes.steps)
    fill(model, cache, batch, depth, device)
    call = torch.compile(model, **({"backend": "eager"} if is_rehearsal else {"mode": "reduce-overhead"}))
    token = torch.full((batch, 1), 5, device=device)

    def steps() -> None:
        for _ in range(sizes.steps):
            call(input_ids=token, past_key_values=cache, use_cache=True)

    first = seconds_of(steps, device)
    times = [seconds_of(steps, device) / sizes.steps for _ in range(sizes.rounds)]
    return {"batch": batch, "tokens": depth, "seconds": times, "compile_seconds": first}
