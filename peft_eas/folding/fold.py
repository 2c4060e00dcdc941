"""Folds an adapter into the projections that read its output: pure functions on tensors.

With its context m fixed, an adapter is an affine map of low rank, z → z + L (R z) + t. A projection (W, b) behind it
becomes W' = W + (W L) R and b' = b + W t: two thin products, never a d × d matrix. Everything is accumulated in
float32 and written where the weight lies. A quantised weight is dequantised, changed and quantised again; see
quantised.py.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..runtime.adapter import RoutedAdapter
from .quantised import (
    Original,
    dense_weight,
    is_floating,
    is_quantised,
    restore,
    set_aside,
    value_dtype,
    write_dense_weight,
)

P, T = ParamSpec("P"), TypeVar("T")
# Weights below float32 are upcast in blocks of this many elements, so that folding never needs a copy of the weight.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class LowRankMap:
    """The map z → z + left (right z) + shift, in float32. Shapes: left (d, r), right (r, d), shift (d,).

    Beside a projection, left (right h) + shift is what is added to its output. Shapes: left (d_out, r),
    right (r, d_in), shift (d_out,).
    """

    left: torch.Tensor
    right: torch.Tensor
    shift: torch.Tensor

    def to(self, device: torch.device) -> "LowRankMap":
        """The same map on another device."""
        return LowRankMap(self.left.to(device), self.right.to(device), self.shift.to(device))


@dataclass(frozen=True)
class ExpertWeights:
    """The projections of several experts in one parameter, (experts, d_out, d), or (experts, d, d_out) `transposed`.

    They have no bias.
    """

    weight: nn.Parameter
    transposed: bool
    bias: None = None


Projection = nn.Module | ExpertWeights


@dataclass(frozen=True)
class FoldRecord:
    """What one fold added to a projection, enough to take it out again without a copy of the weight.

    Shapes: thin (d_out, r), one per expert where there are several; right (r, d); bias (d_out,), or None where it was
    left out. `had_bias` tells whether the projection had one before. `original` is what a quantised projection held,
    for quantising again does not give it back; else None.
    """

    thin: tuple[torch.Tensor, ...]
    right: torch.Tensor
    bias: torch.Tensor | None
    had_bias: bool
    original: Original | None = None


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """`function` without gradients, and without autocast, which would round its products."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        kinds = {"cpu"} | (
            {torch.accelerator.current_accelerator().type} if torch.accelerator.is_available() else set()
        )
        with ExitStack() as stack:
            for context in (torch.no_grad(), *(torch.autocast(kind, enabled=False) for kind in kinds)):
                stack.enter_context(context)
            return function(*args, **kwargs)

    return wrapped


@exact
def low_rank_map(adapter: RoutedAdapter, context: torch.Tensor | None) -> LowRankMap:
    """The affine map that `adapter` is in evaluation mode when its context is fixed to `context`, shape (d,).

    It may be None for an adapter that needs none.
    """
    left, shift = adapter.affine_map(None if context is None else context[None])
    return LowRankMap(left[0], adapter.token_down.weight.detach().float(), shift[0])


def added(maps: list[LowRankMap]) -> LowRankMap | None:
    """The map z → z + the sum of what each of `maps` adds to z; None where there are none."""
    if len(maps) < 2:
        return maps[0] if maps else None
    left, right = torch.cat([one.left for one in maps], dim=1), torch.cat([one.right for one in maps])
    return LowRankMap(left, right, torch.stack([one.shift for one in maps]).sum(0))


def features(projection: nn.Module) -> tuple[int, int]:
    """Widths of what a projection, `nn.Linear` or `Conv1D`, reads and writes."""
    is_conv1d = isinstance(projection, Conv1D)
    return (projection.nx, projection.nf) if is_conv1d else (projection.in_features, projection.out_features)


def check_projection(projection: Projection, name: str, with_bias: bool = True) -> None:
    """Raises unless `projection` is one that an adapter can be folded into; without a bias, any weight will do.

    Raises:
        TypeError: if the module is neither `nn.Linear` nor `Conv1D`, or if its weight is quantised in a way that
            quantised.py does not know.
    """
    if with_bias and not isinstance(projection, (nn.Linear, Conv1D)):
        raise TypeError(
            f"Cannot fold an adapter into {name}, a {type(projection).__name__}: only torch.nn.Linear and "
            "transformers' Conv1D hold a weight that can be changed in place. Merge other adapters (such as LoRA) "
            "first, or load the base model without quantisation."
        )
    weight = projection.weight
    if is_quantised(projection):
        return
    if not is_floating(weight.dtype) or type(weight) is not nn.Parameter:
        raise TypeError(
            f"Cannot fold an adapter into {name}: its weight is quantised or sharded ({type(weight).__name__} of "
            f"dtype {weight.dtype}) in a way that cannot be written back; bitsandbytes' int8, NF4 and FP4 and "
            "torchao's Int8Tensor can. Load the base model in float32, float16 or bfloat16 on one device, load the "
            "adapter on it with PeftModel.from_pretrained, and merge there."
        )


@exact
def fold(
    projection: Projection, update: LowRankMap, with_bias: bool = True, stands_beside: bool = False
) -> FoldRecord:
    """Folds `update` into `projection` in place, creates its bias where it has none, and returns what was added.

    It stands in front of the projection; or, with `stands_beside`, beside it: left (right h) + shift is then added to
    what the projection makes of h, so that W' = W + left right and b' = b + shift.
    Where the projection cannot have a bias (`with_bias=False`), the vector of `shift_before` belongs in front of it.
    A quantised weight is a dense float32 one meanwhile, and then quantised anew. Use `fold_is_finite` first where a
    NaN must not reach the weights.
    """
    original = set_aside(projection) if is_quantised(projection) else None
    weights, update = _out_by_in(projection), update.to(projection.weight.device)
    columns = torch.cat([update.left, update.shift[:, None]], dim=1)
    thins = []
    for weight in weights:
        thin = columns.new_empty(weight.shape[0], columns.shape[1] - 1)
        bias = columns.new_empty(weight.shape[0])
        for rows in _row_blocks(weight):  # each is read from memory once
            # The bias takes the ORIGINAL weight, hence before the weight changes.
            product = columns[rows] if stands_beside else weight[rows].float() @ columns
            thin[rows], bias[rows] = product[:, :-1], product[:, -1]
            _add_product(weight[rows], thin[rows], update.right)
        thins.append(thin)
    if original is not None:
        write_dense_weight(projection, weights[0])
    if not with_bias:
        return FoldRecord(tuple(thins), update.right, None, had_bias=False, original=original)
    had_bias = projection.bias is not None
    if had_bias:
        projection.bias.copy_(projection.bias.float() + bias)
    else:
        dtype = weights[0].dtype if original is None else value_dtype(projection)
        projection.bias = nn.Parameter(bias.to(dtype), requires_grad=projection.weight.requires_grad)
    return FoldRecord(tuple(thins), update.right, bias, had_bias, original)


@exact
def shift_before(update: LowRankMap) -> torch.Tensor:
    """The vector t' in front of projections that `update` is folded into without a bias; in float32, shape (d,).

    With z → z + L (R z) + t folded as W' = W + (W L) R, W' (z + t') is what W made of it where (1 + L R) t' = t, hence
    t' = t − L (1 + R L)⁻¹ R t.

    Raises:
        ValueError: if 1 + R L has no inverse, to the precision of the weights.
    """
    left, right, shift = (tensor.cpu().double() for tensor in (update.left, update.right, update.shift))
    inner = torch.eye(left.shape[1], dtype=left.dtype, device=left.device) + right @ left
    before = shift - left @ torch.linalg.lstsq(inner, (right @ shift)[:, None]).solution[:, 0]
    error = (before + left @ (right @ before) - shift).abs().max()
    if not error <= 1e-5 * shift.abs().max():
        raise ValueError(
            "This adapter cannot be folded into a mixture of experts: it takes a direction of the hidden states away, "
            "in which its bias lies. Train a few more steps; or, if it was trained with context='prompt' and is not "
            "frozen, merge with context='prompt', which folds nothing."
        )
    return before.float().to(update.shift.device)


@exact
def unfold(projection: Projection, record: FoldRecord) -> None:
    """Takes one fold out of `projection` again, to the rounding of the weight's dtype; exactly if it is quantised."""
    if record.original is not None:
        restore(projection, record.original)
        return
    for weight, thin in zip(_out_by_in(projection), record.thin):
        for rows in _row_blocks(weight):
            _add_product(weight[rows], -thin[rows].to(weight.device), record.right.to(weight.device))
    if record.bias is None:
        return
    if record.had_bias:
        projection.bias.copy_(projection.bias.float() - record.bias.to(projection.bias.device))
    else:
        projection.bias = None


@exact
def fold_is_finite(projection: Projection, update: LowRankMap, stands_beside: bool = False) -> bool:
    """Whether folding `update` would leave a weight and a bias without NaN and infinity. Changes nothing."""
    dtype = value_dtype(projection) if is_quantised(projection) else projection.weight.dtype
    update = update.to(projection.weight.device)
    columns = torch.cat([update.left, update.shift[:, None]], dim=1)
    for weight in _out_by_in(projection):
        bias = getattr(projection, "bias", None)
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        for rows in _row_blocks(weight):
            block = weight[rows].float()
            product = columns[rows] if stands_beside else block @ columns
            folded = block.addmm(product[:, :-1], update.right)
            folded_bias = bias[rows].float() + product[:, -1]
            if not all(bool(torch.isfinite(t.to(dtype)).all()) for t in (folded, folded_bias)):
                return False
    return True


def _out_by_in(projection: Projection) -> list[torch.Tensor]:
    """The weight as a view of shape (d_out, d), however it is stored; one per expert; of a quantised one a copy."""
    if is_quantised(projection):
        return [dense_weight(projection)]
    weight = projection.weight.data
    if isinstance(projection, ExpertWeights):
        return [expert.T if projection.transposed else expert for expert in weight]
    return [weight.T if isinstance(projection, Conv1D) else weight]


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
