"""What the search asks of an optimizer, whose parameters it drops on the way."""

from collections.abc import Set
from typing import Any

import torch


def begin_all_states(optimizer: torch.optim.Optimizer) -> None:
    """Lets the next step of the optimizer begin a state for every parameter, also of adapters that were not drawn yet:
    torch refuses to load a sharded optimizer's states where some are missing."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's has it inside

    def give_gradients(*_: Any) -> None:
        for group in inner.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and parameter.grad is None and not inner.state.get(parameter):
                    parameter.grad = torch.zeros_like(parameter)
        handle.remove()

    handle = inner.register_step_pre_hook(give_gradients)


def forget(optimizer: torch.optim.Optimizer, parameters: Set[torch.nn.Parameter]) -> None:
    """Takes the parameters out of the optimizer, and what it keeps of them."""
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in parameters]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
