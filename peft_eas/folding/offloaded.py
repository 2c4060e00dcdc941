"""Modules whose weights accelerate's hooks (`device_map`) keep on the CPU or on disk until they are called."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def offload_hook(module: Any) -> Any:
    """The accelerate hook (`AlignDevicesHook`) that keeps the weights of `module` elsewhere, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module within `module` is computed whose weights are offloaded; None if none is."""
    hooks = (offload_hook(part) for part in module.modules())
    return next((torch.device(hook.execution_device) for hook in hooks if hook is not None), None)


@contextmanager
def fetched(module: Any, to_change: bool = True) -> Iterator[None]:
    """Has the weights of `module` in place meanwhile; `to_change`, they are offloaded again as they are then.

    Changed weights that were on disk are kept on the CPU from then on, for the files are not ours to write.
    """
    hook = offload_hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        weights, prefix = hook.weights_map, getattr(hook.weights_map, "prefix", "")
        weights = getattr(weights, "dataset", weights)  # of the whole model
        for name, parameter in module.named_parameters(recurse=False) if to_change else ():
            if hasattr(weights, "all_keys") and prefix + name not in weights.all_keys:
                weights.all_keys.append(prefix + name)
            getattr(weights, "state_dict", weights)[prefix + name] = parameter.detach().to("cpu")
        hook.post_forward(module, None)
