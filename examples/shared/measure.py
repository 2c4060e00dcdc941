"""What the examples measure of a model, and the table in which they show it."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@torch.no_grad()
def prefill(model: nn.Module, batch: Batch) -> Any:
    """One pass over a batch; returns the output, of a model that generates with its filled KV cache."""
    options = {"use_cache": True, "logits_to_keep": 1} if generates(model) else {}
    return model(**batch, **options)


@torch.no_grad()
def decode(model: nn.Module, batch: Batch, num_tokens: int) -> float:
    """Seconds for `num_tokens` decoding steps behind the prompts of `batch`, without their prefill."""
    output, mask = prefill(model, batch), batch["attention_mask"]
    synchronize(batch)
    start = time.perf_counter()
    for _ in range(num_tokens):
        mask = nn.functional.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=output.logits[:, -1:].argmax(-1),
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    synchronize(batch)
    return time.perf_counter() - start


def on_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch with its tensors where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def generates(model: nn.Module) -> bool:
    """Whether the model generates text, so that it has a KV cache and is decoded from."""
    return bool(getattr(model, "can_generate", lambda: False)())


def synchronize(batch: Batch) -> None:
    """Waits until the device of `batch` has done what it was given."""
    if next(iter(batch.values())).is_cuda:
        torch.cuda.synchronize()


def time_models(
    models: dict[str, nn.Module], batch: Batch, rounds: int, num_tokens: int = 16
) -> dict[str, dict[str, list[float]]]:
    """Seconds of "prefill" and, of models that generate, of "decode" per round.

    The models take turns, so that a slow moment hits them all. Decoding is of `num_tokens` tokens per sequence.
    """

    def time_prefill(model: nn.Module) -> float:
        synchronize(batch)
        start = time.perf_counter()
        prefill(model, batch)
        synchronize(batch)
        return time.perf_counter() - start

    tasks: dict[str, Callable[[nn.Module], float]] = {"prefill": time_prefill}
    if all(map(generates, models.values())):
        tasks["decode"] = lambda model: decode(model, batch, num_tokens)
    seconds: dict[str, dict[str, list[float]]] = {task: {name: [] for name in models} for task in tasks}
    for task, run in tasks.items():
        for round_number in range(rounds + 1):
            for name, model in models.items():
                elapsed = run(model)
                if round_number > 0:  # the first warms up
                    seconds[task][name].append(elapsed)
    return seconds


def speed_up(seconds: dict[str, list[float]], name: str, against: str = "base") -> float:
    """Median over the rounds of how many times faster than `against` a model is."""
    return statistics.median(other / own for other, own in zip(seconds[against], seconds[name], strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of a single value, that value."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, median, high


def cache_bytes_per_token(model: nn.Module, batch: Batch) -> float:
    """Bytes of keys and values that one token of one sequence leaves in the KV cache."""
    layers = prefill(model, batch).past_key_values.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / batch["input_ids"].numel()


def num_parameters(model: nn.Module, trainable: bool = False) -> int:
    """Number of the model's parameters, or of those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def size_on_disk(folder: Path) -> int:
    """Bytes of the weights in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as an aligned markdown table, the first one as its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
