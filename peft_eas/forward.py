"""How a merged model's blocks run: without the MHAs that are deleted, and behind the adapters that stay, if any do.

Adapters stay where their context is to be each prompt's own, for any batch and any padding.

An adapter depends on the token only through z → z + left (C z) + shift, where left and shift follow from the prompt
alone (arXiv 2403.15226, section 3.3). Both are computed once per sequence, with the prompt, and kept in the layer's
slot of the KV cache; every later token costs two thin products. They stay in front of the projections, where they are
of the model's width: behind them, folded into the weights but for what the router decides, there would be one pair of
thin factors per projection, each of the FFN's width, to read for every token.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import inspect
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .adapter import RoutedAdapter
from .prompt import PROMPT_KEY, Prompt, cached_length, read_context, write_context
from .skipped import advance_cache

ADAPTER_NAME = "eas_adapter"


class PromptedAdapter:
    """An adapter whose context is each prompt's: what it does to z, and what it keeps of the prompt meanwhile.

    Args:
        adapter: the adapter. layer_idx: slot of the KV cache, or None for models without one.
        of_text: whether the prompt is marked; otherwise (vision) every token is of the prompt.
    """

    def __init__(self, adapter: RoutedAdapter, layer_idx: int | None, of_text: bool) -> None:
        adapter.running_context = adapter.num_contexts = None  # of no use here, hence not in the checkpoint
        adapter.dropout.p = 0.0
        self.adapter = adapter
        self.layer_idx = layer_idx
        self.of_text = of_text
        self.keys = tuple((type(adapter).__name__, part) for part in ("left", "shift"))

    def __call__(
        self, z: torch.Tensor, prompt: Prompt | None, cache: Cache | None, counted: int = 0
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Takes z, (B, T, d), of which the cache's slot has counted `counted` tokens already.

        Returns what the projections read instead of z, and what a new prompt has decided, to `keep`, or None.

        Raises:
            ValueError: if the cache was filled by another model.
        """
        # Whether the slot holds what the prompt has decided tells more than its length, a tensor in a static cache.
        left, shift = (read_context(cache, self.layer_idx, key) for key in self.keys)
        new = None
        if left is None:
            self._check_is_new(cache, counted)
            context = (prompt or Prompt(None)).mean(z) if self.of_text else z.float().mean(1)
            left, shift = self.adapter.affine_map(context)
            left, shift = left.transpose(1, 2).to(z.dtype).contiguous(), shift[:, None].to(z.dtype)
            new = left, shift
        return torch.baddbmm(z + shift, F.linear(z, self.adapter.token_down.weight), left), new

    def _check_is_new(self, cache: Cache | None, counted: int) -> None:
        seen = 0 if torch.compiler.is_compiling() else cached_length(cache, self.layer_idx) - counted
        if cache is not None and seen > 0:
            raise ValueError(
                f"The KV cache holds {seen} tokens of layer {self.layer_idx}, but not what their prompt makes of its "
                "adapter: it was filled by another model. Start with a new cache."
            )

    def keep(self, new: tuple[torch.Tensor, ...] | None, cache: Cache | None) -> None:
        """Writes what a new prompt has decided into the layer's slot of `cache`, once there is one."""
        if new is not None and cache is not None and self.layer_idx is not None:
            for key, value in zip(self.keys, new):
                write_context(cache, self.layer_idx, key, value)


class Carrier:
    """Pre-hook on a deleted MHA: takes the prompt and the cache from there to the FFN, which is given neither."""

    def __init__(self) -> None:
        self._carried: dict[int, tuple[Prompt | None, Cache | None]] = {}  # by thread, as servers run several

    def __call__(self, mha: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._carried[threading.get_ident()] = kwargs.get(PROMPT_KEY), kwargs.get("past_key_values")

    def take(self) -> tuple[Prompt | None, Cache | None]:
        """The prompt and the cache, which are not held any longer.

        Raises:
            RuntimeError: if the MHA was not called before, as by a copy of the FFN alone.
        """
        try:
            return self._carried.pop(threading.get_ident())
        except KeyError:
            raise RuntimeError(
                "An FFN with an adapter that takes each prompt's context was called without the deleted attention in "
                "front of it. It cannot be copied or called on its own (PEFT's modules_to_save does); leave it out, "
                "or merge the model with a frozen context."
            ) from None


def replace_hidden_states(z: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with z as the hidden states, which come first or by name."""
    return ((z, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": z})


class AdaptedForward:
    """The forward pass of an MHA or FFN behind an adapter; it stands in the place of the module's own.

    Args:
        module: the module. prompted: the adapter.
        carrier: what brings prompt and cache where the module is an FFN; None for an MHA, which is given them.
    """

    def __init__(self, module: nn.Module, prompted: PromptedAdapter, carrier: Carrier | None) -> None:
        self.module = module
        self.prompted = prompted
        self.carrier = carrier

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the module does."""
        z = args[0] if args else kwargs["hidden_states"]
        prompt, cache = kwargs.pop(PROMPT_KEY, None), kwargs.get("past_key_values")
        counted = 0
        if self.carrier is not None:
            (prompt, cache), counted = self.carrier.take(), z.shape[1]  # the MHA's slot has counted this pass already
        z, new = self.prompted(z, prompt, cache, counted)
        args, kwargs = replace_hidden_states(z, args, kwargs)
        output = type(self.module).forward(self.module, *args, **kwargs)
        self.prompted.keep(new, cache)
        return output


class BranchForward:
    """The forward pass of a pre-norm block without its MHA, y = x + branch(x) (arXiv 2403.15226, section 3.3).

    It stands in the place of the block's own, which would call the stub, and norms that are gone.

    Args:
        block: the block. branch: names of its children that make up the branch, in order.
        layer_idx: slot of the KV cache, or None for models without one.
    """

    def __init__(self, block: nn.Module, branch: list[str], layer_idx: int | None) -> None:
        self.block = block
        self.branch = branch
        self.layer_idx = layer_idx
        self.prompted: dict[str, PromptedAdapter] = {}  # by the child in front of which it stands
        names = list(inspect.signature(type(block).forward).parameters)[2:]
        self.cache_position = names.index("past_key_values") if "past_key_values" in names else len(names)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes what the block does and returns its output, in the shape of `hidden_states`, (B, T, d)."""
        cache = args[self.cache_position] if self.cache_position < len(args) else kwargs.get("past_key_values")
        advance_cache(cache, self.layer_idx, hidden_states)
        children, update = self.block._modules, hidden_states
        for name in self.branch:
            if name in self.prompted:
                prompted = self.prompted[name]
                update, new = prompted(update, kwargs.get(PROMPT_KEY), cache, counted=hidden_states.shape[1])
                prompted.keep(new, cache)
            update = children[name](update)
        return hidden_states + update
