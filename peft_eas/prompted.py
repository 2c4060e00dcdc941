"""Adapters that stay in a merged model because their context is each prompt's own: any batch, any padding, exact.

An adapter depends on the token only through z → z + left (C z) + shift, where left and shift follow from the prompt
alone (arXiv 2403.15226, section 3.3). Both are computed once per sequence, with the prompt, and kept in the layer's
slot of the KV cache; every later token costs two thin products. They stay in front of the projections, where they are
of the model's width: behind them, folded into the weights but for what the router decides, there would be one pair of
thin factors per projection, each of the FFN's width, to read for every token.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .adapter import RoutedAdapter
from .prompt import PROMPT_KEY, Prompt, cached_length, read_context, write_context

ADAPTER_NAME = "eas_adapter"


class Carrier:
    """Pre-hook on a deleted MHA: takes the prompt and the cache from there to the FFN, which is given neither."""

    prompt: Prompt | None = None
    cache: Cache | None = None

    def __call__(self, mha: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.prompt, self.cache = kwargs.get(PROMPT_KEY), kwargs.get("past_key_values")

    def take(self) -> tuple[Prompt | None, Cache | None]:
        """The prompt and the cache, which are not held any longer."""
        taken = self.prompt, self.cache
        self.prompt = self.cache = None
        return taken


class PromptedInput:
    """Hooks on a module that put an adapter in front of it, the submodule `eas_adapter`.

    Args:
        layer_idx: slot of the KV cache, or None for models without one.
        of_text: whether the prompt is marked; otherwise (vision) every token is of the prompt.
        carrier: what brings prompt and cache where the module is an FFN; None for an MHA, which is given them.
    """

    def __init__(self, layer_idx: int | None, of_text: bool, carrier: Carrier | None = None) -> None:
        self.layer_idx = layer_idx
        self.of_text = of_text
        self.carrier = carrier
        self.side = "mha" if carrier is None else "ffn"
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, module: nn.Module, adapter: RoutedAdapter) -> None:
        """Puts `adapter` in front of `module`."""
        adapter.running_context = adapter.num_contexts = None  # of no use here, hence not in the checkpoint
        adapter.dropout.p = 0.0
        module.add_module(ADAPTER_NAME, adapter)
        module.register_forward_pre_hook(self, with_kwargs=True)
        if self.carrier is None and self.layer_idx is not None:
            module.register_forward_hook(self._keep, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        z = args[0] if args else kwargs["hidden_states"]
        if self.carrier is None:
            kwargs = dict(kwargs)
            prompt, cache = kwargs.pop(PROMPT_KEY, None), kwargs.get("past_key_values")
            seen = cached_length(cache, self.layer_idx)
        else:  # behind the MHA, which has counted this pass's tokens already
            prompt, cache = self.carrier.take()
            seen = cached_length(cache, self.layer_idx) - z.shape[1]
        adapter = getattr(module, ADAPTER_NAME)
        if seen > 0:
            left, shift = self._kept(cache, seen)
        else:
            left, shift = self._compute(adapter, z, prompt or Prompt(None))
            self._new = (left, shift)
            if self.carrier is not None:
                self._write(cache)
        z = torch.baddbmm(z + shift, F.linear(z, adapter.token_down.weight), left)
        return ((z, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": z})

    def _compute(self, adapter: RoutedAdapter, z: torch.Tensor, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """left, transposed to (B, r, d), and shift, (B, 1, d), of the prompt in z, (B, T, d)."""
        left, shift = adapter.affine_map(prompt.mean(z) if self.of_text else z.float().mean(1))
        return left.transpose(1, 2).to(z.dtype).contiguous(), shift[:, None].to(z.dtype)

    def _kept(self, cache: Cache | None, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        kept = tuple(read_context(cache, self.layer_idx, (self.side, part)) for part in ("left", "shift"))
        if any(value is None for value in kept):
            raise ValueError(
                f"The KV cache holds {seen} tokens of layer {self.layer_idx}, but not what their prompt makes of its "
                "adapter: it was filled by another model. Start with a new cache."
            )
        return kept

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After an MHA, which has made its slot of the cache by now."""
        self._write(kwargs.get("past_key_values"))

    def _write(self, cache: Cache | None) -> None:
        if self._new is not None and self.layer_idx is not None:
            for part, value in zip(("left", "shift"), self._new):
                write_context(cache, self.layer_idx, (self.side, part), value)
        self._new = None
