"""What a round of rewards needs: evaluation mode, random states that stay as they were, and a mean over ranks."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def from_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """(number of ranks, *shape of `values`): what each rank has. All ranks must call it."""
    on_ranks = [values]
    if torch.distributed.is_initialized():
        on_ranks = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(on_ranks, values)
    return torch.stack(on_ranks)


def call_with(model: nn.Module, batch: Any, caller: str) -> None:
    """Passes a batch, a dictionary of the model's arguments, through `model`.

    Raises:
        TypeError: for another batch, given to `caller`.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"{caller} was given a batch of type {type(batch).__name__}. Pass an iterable of batches, each a "
            "dictionary of the model's arguments."
        )
    model(**batch)


def check_reached(counts: Mapping[str, int]) -> None:
    """Raises a ValueError if one of the attentions, by name, has seen no token in all the batches."""
    unreached = [name for name, count in counts.items() if count == 0]
    if unreached:
        raise ValueError(
            f"{len(unreached)} of {len(counts)} attentions were not called, or with hidden tokens alone, such as "
            f"{unreached[0]}. Pass at least one batch, with all the inputs that the model attends to."
        )


def mean_over_ranks(losses: torch.Tensor) -> list[float]:
    # Every rank has the same numbers here and adds them up in the same order: the scores stay equal to the bit.
    return from_all_ranks(losses).cpu().double().mean(0).tolist()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; behind it every module's mode is again what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, mode in modes:  # such as a part of the model that is kept in evaluation mode
            module.training = mode


@contextlib.contextmanager
def preserved_random_state(seed: int) -> Iterator[None]:
    """Seeds all random states inside, and gives them back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
