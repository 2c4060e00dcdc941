"""Where what a prompt decides is kept while a model generates.

Each layer's context lives in that layer's own slot of the KV cache, so that it follows the sequence through beam
search, reordering, and copies.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers.cache_utils import Cache


@torch.compiler.assume_constant_result
def _slot_class(base: type) -> type:
    """`_new_slot_class`, called as it is where a compiler would look into it."""
    return _new_slot_class(base)


@functools.cache
def _new_slot_class(base: type) -> type:
    """A class of cache layer that carries contexts beside what `base` holds, so that they follow the sequences.

    `eas_contexts` holds, by key, what the prompt alone decides, of shape (B, …): a context, or what follows from it.
    """

    class ContextSlot(base):
        eas_contexts: dict[Hashable, torch.Tensor]

        def _change_contexts(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.eas_contexts = {key: change(context) for key, context in self.eas_contexts.items()}

        def reset(self) -> None:
            super().reset()
            self.eas_contexts = {}

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)
            if int(self.get_seq_length()) == 0:
                self.eas_contexts = {}

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._change_contexts(lambda context: context.index_select(0, beam_idx.to(context.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._change_contexts(lambda context: context.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._change_contexts(lambda context: context[indices])

    ContextSlot.__name__ = ContextSlot.__qualname__ = base.__name__
    return ContextSlot


def cached_length(cache: Cache | None, layer_idx: int | None) -> int:
    """Number of tokens that layer `layer_idx` has seen before, by its slot in `cache`."""
    return 0 if cache is None or layer_idx is None else int(cache.get_seq_length(layer_idx))


def read_context(cache: Cache | None, layer_idx: int | None, key: Hashable) -> torch.Tensor | None:
    """What layer `layer_idx` keeps in `cache` under `key` for each sequence, shape (B, …), or None."""
    if cache is None or layer_idx is None:
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    slot = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    return getattr(slot, "eas_contexts", {}).get(key)


def write_context(cache: Cache | None, layer_idx: int, key: Hashable, context: torch.Tensor) -> None:
    """Keeps `context`, shape (B, …), in the slot that layer `layer_idx` has in `cache`."""
    if cache is None:
        return
    slot = getattr(cache, "self_attention_cache", cache).layers[layer_idx]
    if not hasattr(slot, "eas_contexts"):
        slot.__class__ = _slot_class(type(slot))
        slot.eas_contexts = {}
    slot.eas_contexts[key] = context
