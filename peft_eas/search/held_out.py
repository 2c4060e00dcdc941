"""`HeldOutLosses`: what a search is rewarded on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..evaluation import evaluation_mode, mean_over_ranks, preserved_random_state
from ..skippable import Skippable


class HeldOutLosses:
    """The losses of a model on held-out batches, with one set skipped after another; the mean over all ranks.

    Args:
        model, batch_loss, batches, seed: as of `EASSearch`.
        eas: what of the model can skip.
    """

    def __init__(
        self,
        model: nn.Module,
        eas: Skippable,
        batch_loss: Callable[[Any], torch.Tensor | float] | None,
        batches: Sequence[Any] | None,
        seed: int,
    ) -> None:
        self.model = model
        self.eas = eas
        self.batch_loss = batch_loss
        self.batches = batches
        # Until one comes again; None if that is not known.
        self.num_batches = None if batches is None else len(batches)
        self.seed = seed

    def check(self) -> None:
        """Raises a ValueError where there is nothing to compute rewards from, or gradients cannot be reduced."""
        if self.batch_loss is None or (self.batches is not None and len(self.batches) == 0):
            what = "batch_loss is missing" if self.batch_loss is None else "batches is empty"
            raise ValueError(
                f"EASSearch has nothing to compute rewards from: {what}. Pass batch_loss, a function that returns "
                "the loss of the model on a held-out batch, and at least one batch or none of batches=, or name the "
                "MHAs to skip in EASConfig(skipped_modules=...)."
            )
        ddp = next((module for module in self.model.modules() if isinstance(module, DistributedDataParallel)), None)
        if ddp is not None and (not ddp.find_unused_parameters or ddp.static_graph):
            raise ValueError(
                f"DistributedDataParallel was made with find_unused_parameters={ddp.find_unused_parameters} and "
                f"static_graph={ddp.static_graph}, but each step of the search leaves other parameters unused. Set "
                "find_unused_parameters=True and static_graph=False (with accelerate: "
                "Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]))."
            )

    def __call__(self, sets: Sequence[Sequence[str]], number: int) -> list[float]:
        """The loss with each set skipped, on the batch of a number. Modes and random states are afterwards what they
        were; the skip set is the last."""
        batch = number if self.batches is None else self.batches[number % len(self.batches)]
        losses = []
        with preserved_random_state(self.seed + number), torch.no_grad(), evaluation_mode(self.model):
            for names in sets:
                self.eas.set_skipped_modules(names)
                losses.append(self._loss(batch))
        return mean_over_ranks(torch.stack(losses))

    def _loss(self, batch: Any) -> torch.Tensor:
        loss = self.batch_loss(batch)
        if not isinstance(loss, (int, float)) and not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"type {type(loss).__name__}"
            raise ValueError(
                f"EASSearch(batch_loss=...) returned a value of {what}; it must return the loss on the held-out "
                "batch, a tensor of one element or a number. Do the batches have labels?"
            )
        return as_scalar(loss, self.model)


def as_scalar(loss: torch.Tensor | float, model: nn.Module) -> torch.Tensor:
    """A loss as a tensor of no dimensions, in float32 and without a gradient."""
    if not isinstance(loss, torch.Tensor):
        loss = torch.tensor(float(loss), device=next(model.parameters()).device)
    return loss.detach().float().reshape(())
