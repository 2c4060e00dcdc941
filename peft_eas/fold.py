"""Folds an adapter into the projections that read its output: pure functions on tensors.

With its context m fixed, an adapter is an affine map of low rank, z → z + L (R z) + t. A projection (W, b) behind it
becomes W' = W + (W L) R and b' = b + W t: two thin products, never a d × d matrix. Everything is accumulated in
float32 and written where the weight lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapter import RoutedAdapter

# Weights below float32 are upcast in blocks of this many elements, so that folding never needs a copy of the weight.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LowRankMap:
    """The map z → z + left (right z) + shift, in float32. Shapes: left (d, r), right (r, d), shift (d,)."""

    left: torch.Tensor
    right: torch.Tensor
    shift: torch.Tensor

    def to(self, device: torch.device) -> "LowRankMap":
        """The same map on another device."""
        return LowRankMap(self.left.to(device), self.right.to(device), self.shift.to(device))


@dataclass(frozen=True)
class FoldRecord:
    """What one fold added to a projection, enough to take it out again without a copy of the weight.

    Shapes: thin (d_out, r), right (r, d), bias (d_out,). `had_bias` tells whether the projection had one before.
    """

    thin: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor
    had_bias: bool


@torch.no_grad()
def low_rank_map(adapter: RoutedAdapter, context: torch.Tensor) -> LowRankMap:
    """The affine map that `adapter` is in evaluation mode when its context is fixed to `context`, shape (d,)."""
    left, shift = adapter.affine_map(context[None])
    return LowRankMap(left[0], adapter.token_down.weight.detach().float(), shift[0])


def added(maps: list[LowRankMap]) -> LowRankMap | None:
    """The map z → z + the sum of what each of `maps` adds to z; None where there are none."""
    if len(maps) < 2:
        return maps[0] if maps else None
    left, right = torch.cat([one.left for one in maps], dim=1), torch.cat([one.right for one in maps])
    return LowRankMap(left, right, torch.stack([one.shift for one in maps]).sum(0))


def check_projection(projection: nn.Module, name: str) -> None:
    """Raises unless `projection` is one that an adapter can be folded into.

    Raises:
        TypeError: if the module is neither `nn.Linear` nor `Conv1D`, or if its weight is quantised.
    """
    if not isinstance(projection, (nn.Linear, Conv1D)):
        raise TypeError(
            f"Cannot fold an adapter into {name}, a {type(projection).__name__}: only torch.nn.Linear and "
            "transformers' Conv1D hold a weight that can be changed in place. Merge other adapters (such as LoRA) "
            "first, or load the base model without quantisation."
        )
    weight = projection.weight
    if not weight.is_floating_point() or type(weight.data) is not torch.Tensor:
        raise TypeError(
            f"Cannot fold an adapter into {name}: its weight is quantised or sharded ({type(weight.data).__name__} "
            f"of dtype {weight.dtype}). Load the base model in float32, float16 or bfloat16 on one device, load the "
            "adapter on it with PeftModel.from_pretrained, and merge there."
        )


@torch.no_grad()
def fold(projection: nn.Module, update: LowRankMap) -> FoldRecord:
    """Folds `update` into `projection` in place, creates its bias where it has none, and returns what was added.

    Use `fold_is_finite` first where a NaN must not reach the weights.
    """
    weight, update = _out_by_in(projection), update.to(projection.weight.device)
    columns = torch.cat([update.left, update.shift[:, None]], dim=1)
    thin = columns.new_empty(weight.shape[0], columns.shape[1] - 1)
    bias = columns.new_empty(weight.shape[0])
    for rows in _row_blocks(weight):  # each is read from memory once
        # The bias takes the ORIGINAL weight, hence before the weight changes.
        product = weight[rows].float() @ columns
        thin[rows], bias[rows] = product[:, :-1], product[:, -1]
        _add_product(weight[rows], thin[rows], update.right)
    had_bias = projection.bias is not None
    if had_bias:
        projection.bias.copy_(projection.bias.float() + bias)
    else:
        projection.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=projection.weight.requires_grad)
    return FoldRecord(thin, update.right, bias, had_bias)


@torch.no_grad()
def unfold(projection: nn.Module, record: FoldRecord) -> None:
    """Takes one fold out of `projection` again, to the rounding of the weight's dtype."""
    weight = _out_by_in(projection)
    for rows in _row_blocks(weight):
        _add_product(weight[rows], -record.thin[rows].to(weight.device), record.right.to(weight.device))
    if record.had_bias:
        projection.bias.copy_(projection.bias.float() - record.bias.to(weight.device))
    else:
        projection.bias = None


@torch.no_grad()
def fold_is_finite(projection: nn.Module, update: LowRankMap) -> bool:
    """Whether folding `update` would leave a weight and a bias without NaN and infinity. Changes nothing."""
    weight, update = _out_by_in(projection), update.to(projection.weight.device)
    bias = weight.new_zeros(weight.shape[0]) if projection.bias is None else projection.bias
    for rows in _row_blocks(weight):
        block = weight[rows].float()
        folded = block.addmm(block @ update.left, update.right)
        folded_bias = bias[rows].float() + block @ update.shift
        if not all(bool(torch.isfinite(t.to(weight.dtype)).all()) for t in (folded, folded_bias)):
            return False
    return True


def _out_by_in(projection: nn.Module) -> torch.Tensor:
    """The weight as a view of shape (d_out, d), whichever way the projection stores it."""
    return projection.weight.data.T if isinstance(projection, Conv1D) else projection.weight.data


def _row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices over the rows of `weight`, each of a bounded number of elements."""
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _add_product(block: torch.Tensor, thin: torch.Tensor, right: torch.Tensor) -> None:
    """block += thin @ right, accumulated in float32 and without a temporary where the block is float32 already."""
    if block.dtype == torch.float32:
        block.addmm_(thin, right)
    else:
        block.copy_(torch.addmm(block.float(), thin, right))
