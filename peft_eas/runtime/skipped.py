"""How a skipped MHA behaves: what it adds to the residual stream, and what it leaves in the KV cache.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

# Of torch 2.7 on; before it, no export is known.
_is_exporting = getattr(torch.compiler, "is_exporting", bool)


class NoUpdate:
    """What a skipped MHA adds to the residual stream: zeros in the shape of `like`, that nobody has to add.

    A sum with it is the other summand itself, and scaling or dropout leave it what it is; so a block's code runs as it
    was written, without a kernel for nothing. For anything else it turns into the zeros that it stands for.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like

    def zeros(self) -> torch.Tensor:
        """The zeros as a tensor, never written out."""
        return self.like.new_zeros(()).expand_as(self.like)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _SUMS and len(args) == 2 and not kwargs and args[0].shape == args[1].shape:
            return args[1] if isinstance(args[0], cls) else args[0]
        if func in _PRODUCTS and isinstance(args[1], cls) and args[0].shape == args[1].shape[-1:]:
            return args[1]  # a scale of each channel
        if func is F.dropout and isinstance(args[0], cls):
            return args[0]
        return func(*_written_out(args), **dict(zip(kwargs or (), _written_out((kwargs or {}).values()))))

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    __radd__ = __iadd__ = __add__

    def __mul__(self, factor: Any) -> Any:
        return self if isinstance(factor, (int, float)) else self.zeros() * factor

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.zeros()[index]

    @property
    def shape(self) -> torch.Size:
        """Shape of the zeros."""
        return self.like.shape

    def __getattr__(self, name: str) -> Any:
        if name == "like" or name.startswith("__"):  # asked for while it is being copied
            raise AttributeError(name)
        return getattr(self.zeros(), name)


def _written_out(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        v.zeros() if isinstance(v, NoUpdate) else _written_out(v) if isinstance(v, (list, tuple)) else v
        for v in values
    )


_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.add_}
_PRODUCTS = {torch.Tensor.mul}


def find_cache(args: Iterable[Any], kwargs: dict[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a call, whatever its name."""
    for value in (*args, *kwargs.values()):  # torch 2.6 does not compile next() with a default
        if isinstance(value, Cache):
            return value
    return None


def skipped_return(
    hidden_states: torch.Tensor, norm: nn.Module | None, returns: Iterable[str | None] | None, kwargs: dict[str, Any]
) -> Any:
    """What a skipped MHA returns: what it adds, alone or in front of what `returns` names of its arguments.

    It adds nothing, but for a kept `norm` of `hidden_states`.
    """
    update = skipped_output(hidden_states) if norm is None else norm(hidden_states)
    return update if returns is None else (update, *(kwargs.get(name) for name in returns))


def skipped_output(hidden_states: torch.Tensor) -> NoUpdate | torch.Tensor:
    """What a skipped MHA adds to the residual stream: nothing, in the shape of `hidden_states`."""
    update = NoUpdate(hidden_states)
    # A compiler sees through the zeros, but not through the class.
    return update.zeros() if torch.compiler.is_compiling() else update


class EmptyLayer(DynamicLayer):
    """A growing cache layer of no heads: like any other, but that its length does not depend on its size.

    Once it is reset, it can serve an MHA that is not skipped.
    """

    @property
    def is_empty(self) -> bool:
        """Whether it has seen tokens of a skipped MHA: its keys are (B, 0, length, 0)."""
        return self.is_initialized and self.keys.dim() == 4 and self.keys.shape[1] == 0

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.keys.shape[-2] if self.is_empty else super().get_seq_length()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts the tokens of keys and values of no heads, (B, 0, T, 0); takes others where it has seen none.

        Raises:
            ValueError: for keys of an MHA behind those of a skipped one.
        """
        if key_states.shape[1] > 0 and self.is_empty:
            raise ValueError(
                "The KV cache was filled while the attention of one of its layers was skipped, which it is no longer: "
                "by another model, or with another skip set. Start with a new cache."
            )
        if key_states.shape[1] > 0:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_empty:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length() + key_states.shape[-2]
        self.keys = self.values = key_states.new_empty((key_states.shape[0], 0, length, 0))
        return self.keys, self.values


def advance_cache(cache: Cache | None, layer_idx: int | None, hidden_states: torch.Tensor) -> None:
    """Lets the cache's slot of a skipped MHA count the tokens of `hidden_states`, (B, T, d), and hold nothing else.

    The slot gets keys and values of no heads: they take no memory, and there is nothing to quantise, but lengths,
    masks, sliding windows, beams and cropping go on as for any other layer, whichever layer is asked.

    Raises:
        ValueError: if the slot holds keys already, from a time when the MHA was not skipped; or a linear attention's
            state as well; or if a cache is exported that may hold no such slot.
    """
    if cache is None or layer_idx is None:
        return
    cache = getattr(cache, "self_attention_cache", cache)
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:  # made without a config
        cache.layers.append(cache.layer_class_to_replicate())
    slot = cache.layers[layer_idx]
    if isinstance(slot, LinearAttentionCacheLayerMixin):
        raise ValueError(
            f"The attention of layer {layer_idx} is skipped, but shares its slot of the KV cache with a linear "
            "attention, so that nothing would count its tokens. Leave it out with exclude_modules, or set "
            "use_cache=False."
        )
    batch, num_tokens = hidden_states.shape[:2]
    is_static = isinstance(slot, StaticLayer) and slot.is_initialized and not (slot.is_sliding or cache.offloading)
    if is_static and _is_exporting():  # whose cache is made beforehand, with heads, which then nothing reads
        slot.cumulative_length.add_(num_tokens)
        return
    if slot.is_initialized and (slot.keys.shape[1] if slot.keys.dim() == 4 else slot.get_seq_length()) > 0:
        raise ValueError(
            f"The KV cache holds keys of layer {layer_idx}, whose attention is skipped now. It was filled by "
            "another model, with another skip set, or by early_initialization(). Start with a new cache."
        )
    if isinstance(slot, DynamicLayer) and not slot.is_sliding and not isinstance(slot, EmptyLayer):
        if slot.is_initialized and slot.keys.dim() == 4 and slot.keys.shape[-2] > 0:
            raise ValueError(
                f"The KV cache's slot of layer {layer_idx}, whose attention is skipped, was made anew from its keys "
                "and values, and so has lost its length. Copy the cache with copy.deepcopy()."
            )
        _check_export(cache)
        cache.layers[layer_idx] = EmptyLayer()
    if is_static:
        slot.cumulative_length.add_(num_tokens)  # all that an update would do but for copying nothing
        return
    nothing = hidden_states.new_empty((batch, 0, num_tokens, 0))
    cache.update(nothing, nothing, layer_idx)  # not the slot alone: an offloaded cache then fetches the next one


def _check_export(cache: Cache) -> None:
    """Raises ValueError while a cache is exported in a way that takes no layers but transformers' own."""
    node = torch.utils._pytree.SUPPORTED_NODES.get(type(cache)) if _is_exporting() else None
    if node is not None and node.flatten_fn.__module__ == "transformers.integrations.executorch":
        raise ValueError(
            f"export_with_dynamic_cache() was called, which takes no {type(cache).__name__} with the layer of a "
            "skipped attention in it. Start a new process, and before anything is exported there call "
            "transformers.exporters.exporter_dynamo.register_cache_pytrees_for_model(model), after which it takes "
            "any; or use DynamoExporter() of transformers.exporters, or a static cache "
            "(convert_and_export_with_cache)."
        )


def slot_of(mha: nn.Module) -> int | None:
    """The MHA's slot of the KV cache, which the attention itself knows."""
    indices = (getattr(module, "layer_idx", None) for module in mha.modules())
    return next((index for index in indices if isinstance(index, int)), None)


def fill_cross_slot(cache: Cache | None, slot: int | None, hidden_states: torch.Tensor) -> None:
    """Fills a skipped cross-attention's slot with nothing, for who reads every slot, as Whisper's generate() does."""
    advance_cache(getattr(cache, "cross_attention_cache", None), slot, hidden_states[:, :0])


class SkippedMHA(nn.Module):
    """Stands where a deleted MHA was. It has no parameters and computes nothing, but for a post-norm's kept norm.

    Args:
        layer_idx: slot of the KV cache, or None for models without one, and for a cross-attention.
        marker: name of the first weight of the deleted MHA; an empty tensor takes its place in the checkpoint.
        kept_norm: name of the norm inside the MHA that a post-norm block still applies, or None. norm: that norm.
        returns: what the MHA returned behind its output: for each the argument that is handed on, or None; or None
            as a whole if it returned its output alone.
        cross_slot: slot of the KV cache of a cross-attention, or None.
    """

    def __init__(
        self,
        layer_idx: int | None,
        marker: str,
        kept_norm: str | None = None,
        norm: nn.Module | None = None,
        returns: Sequence[str | None] | None = (None,),
        cross_slot: int | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.cross_slot = cross_slot
        self.returns = returns
        self.kept_norm = kept_norm
        *parents, last = marker.split(".")
        _container(self, parents, Marker).register_buffer(last, torch.empty(0))
        if kept_norm is not None:
            *parents, last = kept_norm.split(".")
            _container(self, parents, nn.Module).add_module(last, norm)

    def __repr__(self) -> str:
        return f"SkippedMHA({'deleted' if self.kept_norm is None else f'deleted but for {self.kept_norm}'})"

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`, without the marker, whose place other methods would take for a projection."""
        return (item for item in super().named_modules(*args, **kwargs) if not isinstance(item[1], Marker))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block adds to its residual, and no attention weights; shapes as the deleted MHA's."""
        advance_cache(find_cache(args, kwargs), self.layer_idx, hidden_states)
        fill_cross_slot(find_cache(args, kwargs), self.cross_slot, hidden_states)
        norm = None if self.kept_norm is None else self.get_submodule(self.kept_norm)
        return skipped_return(hidden_states, norm, self.returns, kwargs)


class Marker(nn.Module):
    """Leads to the marker of a deleted MHA, under the names that lead to the MHA's first weight."""

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """None: who moves a model's tensors about, as accelerate does, has nothing to move here."""
        return iter(())


def _container(module: nn.Module, path: list[str], kind: type[nn.Module]) -> nn.Module:
    for name in path:
        if not hasattr(module, name):
            module.add_module(name, kind())
        module = getattr(module, name)
    return module
