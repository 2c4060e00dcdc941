"""Projections whose weight a library has quantised: read as dense ones, and quantised again as they were.

One projection is dequantised at a time, into float32; all others stay as they are. Neither bitsandbytes nor torchao is
imported before a weight of its kind is met.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Scheme:
    """How one class of quantised weights is read and written. Each function takes the projection.

    Attributes:
        is_ready: whether its weight can be read, and quantised again, as this class usually can.
        dense: its weight in float32, shape (d_out, d), a tensor of its own.
        quantised: a parameter that holds a given dense float32 weight, quantised as the projection's own is.
        dtype: the floating dtype that it stands for.
    """

    is_ready: Callable[[nn.Module], bool]
    dense: Callable[[nn.Module], torch.Tensor]
    quantised: Callable[[nn.Module, torch.Tensor], nn.Parameter]
    dtype: Callable[[nn.Module], torch.dtype]


@dataclass(frozen=True)
class Original:
    """The weight and the bias of a quantised projection before a fold, untouched."""

    weight: nn.Parameter
    bias: torch.Tensor | None


def is_quantised(projection: nn.Module) -> bool:
    """Whether the weight of `projection` is quantised in a way that this module can read and write."""
    scheme = _scheme(projection)
    return scheme is not None and scheme.is_ready(projection)


def dense_weight(projection: nn.Module) -> torch.Tensor:
    """What the quantised weight of `projection` stands for: (d_out, d) in float32, a tensor of its own."""
    return _scheme(projection).dense(projection)


def value_dtype(projection: nn.Module) -> torch.dtype:
    """The floating dtype that the quantised weight of `projection` stands for, and that a new bias beside it has."""
    return _scheme(projection).dtype(projection)


def is_floating(dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype holds its values without a scale beside it; float8 needs one."""
    return dtype.is_floating_point and dtype.itemsize > 1


def set_aside(projection: nn.Module) -> Original:
    """The quantised weight of `projection` and a copy of its bias, to `restore` them bit by bit."""
    weight = projection.weight
    if hasattr(weight, "SCB"):  # bitsandbytes' int8 layer takes the scales from the weight when it is first called
        weight.SCB, weight.CB = _scales(projection), weight.data
    return Original(weight, None if projection.bias is None else projection.bias.detach().clone())


def write_dense_weight(projection: nn.Module, weight: torch.Tensor) -> None:
    """Quantises `weight`, (d_out, d) in float32, as the weight of `projection` is, and puts it in its place."""
    _put(projection, _scheme(projection).quantised(projection, weight))


def restore(projection: nn.Module, original: Original) -> None:
    """Puts the weight and the bias of `original` back into `projection`."""
    _put(projection, original.weight)
    if original.bias is None:
        projection.bias = None
    else:
        projection.bias.data = original.bias


def _scheme(projection: nn.Module) -> Scheme | None:
    kind = type(getattr(projection, "weight", None))
    return _SCHEMES.get((kind.__module__.partition(".")[0], kind.__name__))


def _put(projection: nn.Module, weight: nn.Parameter) -> None:
    projection.weight = weight
    if hasattr(weight, "quant_state"):
        projection.quant_state = weight.quant_state
    if hasattr(weight, "SCB"):
        projection.state.reset_grads()  # what it holds beside gradients are the former weight and scales


# --- bitsandbytes, LLM.int8() ----------------------------------------------------------------------------------------


def _scales(projection: nn.Module) -> torch.Tensor:
    return projection.weight.SCB if projection.state.SCB is None else projection.state.SCB


def _dense_int8(projection: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(projection.weight.data, _scales(projection))


def _quantised_int8(projection: nn.Module, weight: torch.Tensor) -> nn.Parameter:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn import Int8Params

    data, scales, _ = int8_vectorwise_quant(weight.half())
    return Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scales)


# --- bitsandbytes, NF4 and FP4 ---------------------------------------------------------------------------------------


def _is_packed_for_cpu(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _dtype_4bit(projection: nn.Module) -> torch.dtype:
    state = projection.weight.quant_state
    return state.original_dtype if _is_packed_for_cpu(state) else state.dtype


def _dense_4bit(projection: nn.Module) -> torch.Tensor:
    from bitsandbytes import functional

    data, state = projection.weight.data, copy.copy(projection.weight.quant_state)
    if _is_packed_for_cpu(state):
        # Evaluation on a CPU with AVX512-BF16 has transposed weights and scales. The library's own way back leaves
        # scales that are not quantised themselves transposed.
        scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales
    state.dtype = torch.float32
    return functional.dequantize_4bit(data, state)


def _quantised_4bit(projection: nn.Module, weight: torch.Tensor) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    old = projection.weight
    new = Params4bit(
        weight,
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=projection,
    ).to(weight.device)  # which quantises it
    new.quant_state.dtype = _dtype_4bit(projection)
    return new


# --- torchao, int8 ---------------------------------------------------------------------------------------------------


def _dense_torchao(projection: nn.Module) -> torch.Tensor:
    return projection.weight.dequantize(torch.float32)


def _quantised_torchao(projection: nn.Module, weight: torch.Tensor) -> nn.Parameter:
    from torchao.quantization import Int8Tensor
    from torchao.quantization.granularity import PerBlock

    old = projection.weight
    new = Int8Tensor.from_hp(weight, PerBlock(tuple(old.block_size)), reduce_range=old.reduce_range)
    new = Int8Tensor(
        new.qdata,
        new.scale,
        new.block_size,
        old.dtype,  # which `to` would not change
        zero_point=new.zero_point,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_quant_kwargs=old.act_quant_kwargs,
        reduce_range=old.reduce_range,
    )
    return nn.Parameter(new, requires_grad=False)


# By the library and the name of the weight's class.
_SCHEMES = {
    ("bitsandbytes", "Int8Params"): Scheme(
        is_ready=lambda projection: projection.weight.dtype == torch.int8,  # not so with has_fp16_weights
        dense=_dense_int8,
        quantised=_quantised_int8,
        dtype=lambda projection: torch.float16,  # from which the library quantises
    ),
    ("bitsandbytes", "Params4bit"): Scheme(
        is_ready=lambda projection: projection.weight.quant_state is not None,
        dense=_dense_4bit,
        quantised=_quantised_4bit,
        dtype=_dtype_4bit,
    ),
    ("torchao", "Int8Tensor"): Scheme(
        is_ready=lambda projection: projection.weight.act_pre_scale is None,  # SmoothQuant, AWQ: of its own input
        dense=_dense_torchao,
        quantised=_quantised_torchao,
        dtype=lambda projection: projection.weight.dtype,
    ),
}
