"""What folding costs: a layer by thin products and by the dense way, and the merge of a whole model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmark.variants import Recipe, adapted
from examples.shared.peak_memory import peak_memory
from peft_eas.folding.fold import fold, low_rank_map
from peft_eas.runtime.adapter import PropagationAdapter

Projections = list[nn.Linear]


@torch.no_grad()
def fold_thin(adapter: PropagationAdapter, context: Tensor, projections: Projections) -> None:
    """Folds `adapter` into `projections` as this library does."""
    update = low_rank_map(adapter, context)
    for projection in projections:
        fold(projection, update)


@torch.no_grad()
def fold_dense(adapter: PropagationAdapter, context: Tensor, projections: Projections) -> None:
    """Folds `adapter` into `projections` by the matrix I + L R of shape (d, d), as the paper's released code does.

    The products run in the dtype of the weights. What comes before them, L, R and the bias, is the same as above.
    """
    update = low_rank_map(adapter, context)
    for projection in projections:
        weight = projection.weight.data
        bias = weight @ update.shift.to(weight.dtype)  # of the original weight, which the released code gets wrong
        dense = update.left.to(weight.dtype) @ update.right.to(weight.dtype)
        dense = dense + torch.eye(len(dense), dtype=weight.dtype, device=weight.device)
        projection.weight.data = weight @ dense
        projection.bias = nn.Parameter(bias, requires_grad=False)


def layer_fold_cost(
    width: int, ffn_width: int, rank: int, rounds: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Seconds and extra bytes of folding one PIA into the two projections of a Llama FFN, both ways in turns."""
    torch.manual_seed(0)
    adapter = PropagationAdapter(width, rank, init_weights=False).to(device).eval()
    context = torch.randn(width).to(device)

    start = torch.randn(2, ffn_width, width).to(device, dtype) / width**0.5

    def projections() -> Projections:
        targets = [nn.Linear(1, 1, bias=False).requires_grad_(False) for _ in start]
        for target, weight in zip(targets, start):
            target.weight.data = weight.clone()
        return targets

    ways = {"thin": fold_thin, "dense": fold_dense}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results, extra = {}, {}
    for number in range(rounds + 1):
        for way, run in ways.items():
            targets = projections()
            elapsed = seconds_of(lambda run=run, targets=targets: run(adapter, context, targets), device)
            if number > 0:  # the first warms up
                seconds[way].append(elapsed)
            results[way] = targets[0].weight.float()
    for way, run in ways.items():
        targets = projections()
        with peak_memory(device) as peak:
            run(adapter, context, targets)
        extra[way] = peak.bytes
    difference = (results["thin"] - results["dense"]).abs().max() / results["dense"].abs().max()
    return {
        "shapes": {"d": width, "d_ff": ffn_width, "r": rank},
        "seconds": seconds,
        "ratio": statistics.median(d / t for d, t in zip(seconds["dense"], seconds["thin"])),
        "extra_bytes": extra,
        "weights_bytes": start.numel() * start.element_size(),
        "difference": difference.item(),
    }


def model_merge_cost(recipe: Recipe, device: str) -> dict[str, Any]:
    """Seconds and extra bytes of `merge_and_unload()` on the whole model."""
    weights = sum(p.numel() * p.element_size() for p in recipe.base.parameters())
    model = adapted(recipe, recipe.skipped, own_targets=True)
    seconds = seconds_of(model.merge_and_unload, device)
    model = adapted(recipe, recipe.skipped, own_targets=True)
    with peak_memory(device) as peak:
        model.merge_and_unload()
    return {
        "num_skip": len(recipe.skipped),
        "seconds": seconds,
        "extra_bytes": peak.bytes,
        "weights_bytes": weights,
        "extra_share": peak.bytes / weights,
    }


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds until the device has done what `run` asks of it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for what was asked of a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
