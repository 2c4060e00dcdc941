"""The fit of one MHA's adapters: what is gathered for it, and how its solution is written into them."""

import torch
from torch import nn

from ..evaluation import from_all_ranks
from ..folding.fold import LowRankMap, exact
from ..layers import Candidate, LowRankAdapter
from ..runtime.adapter import RoutedAdapter
from .recorder import Seen
from .regression import Moments


class AdapterFit:
    """The fit of one MHA's adapters: of PIA first, and of the output adapter behind it."""

    def __init__(self, candidate: Candidate, adapter_name: str, pia: RoutedAdapter, output: LowRankAdapter | None):
        self.candidate, self.adapter_name, self.pia, self.output = candidate, adapter_name, pia, output
        self.left_over = 1.0
        self.count = 0
        self._moments: Moments | None = None
        self._lost = 0.0  # squared error without any adapter, where it was noted

    @property
    def bytes(self) -> int:
        """What its moments take at most."""
        d = self.pia.token_down.in_features
        return max(Moments.bytes(d, d), 0 if self.output is None else Moments.bytes(self.output.down.shape[1], d))

    def add(self, stage: str, with_mha: Seen, without: Seen) -> None:
        """Adds what one pass of the block computed."""
        if stage == "pia":
            x, y = without.ffn_input, with_mha.ffn_input - without.ffn_input
            self.count += len(x)
            if self.output is not None and without.total is not None:
                self._lost += float((with_mha.total - without.total).float().square().sum())
        elif self.output is None or without.total is None:
            return
        else:
            x, y = without.projection_input, with_mha.total - without.total
        if self._moments is None:
            self._moments = Moments(x.shape[1], y.shape[1], x.device)
        self._moments.add(x, y)

    def solve(self, stage: str) -> None:
        """Fits the adapter of a stage."""
        moments, self._moments = self._moments, None
        if moments is None:
            return
        moments.gather()
        if moments.square == 0:  # in a parallel block, the FFN reads the same without the MHA
            return
        if stage == "pia":
            update, error = moments.low_rank_fit(self.pia.token_down.out_features, self.pia.up[0].groups)
            self.left_over = error / moments.square
            _set_routed(self.pia, update)
        else:
            update, error = moments.low_rank_fit(len(self.output.down))
            lost = float(from_all_ranks(update.shift.new_tensor(self._lost)).sum())
            self.left_over = error / lost
            _set_output(self.output, update)


def is_in_parts(adapter: nn.Module) -> bool:
    """Whether only a part of an adapter lies on this rank, as DeepSpeed's ZeRO-3 and FSDP1 have it."""
    affine = adapter.up if isinstance(adapter, LowRankAdapter) else adapter.token_down
    return affine.weight.shape != (affine.out_features, affine.in_features)


@exact
def _set_routed(adapter: RoutedAdapter, update: LowRankMap) -> None:
    """Makes an adapter the map `update`, whatever the context. The context path begins at zero."""
    left, right = _balanced(update, adapter.token_down.weight)
    share = 0.5 if adapter.has_context_path else 1.0
    _write(adapter.token_down.weight, right)
    adapter.token_down.bias.zero_()
    if adapter.has_context_path:
        adapter.context_down.weight.zero_()
        adapter.context_down.bias.zero_()
    groups = adapter.up[0].groups
    blocks = left.unflatten(0, (groups, -1)).unflatten(-1, (groups, -1)).diagonal(dim1=0, dim2=2)
    for up in adapter.up:
        _write(up.weight, blocks.movedim(-1, 0).flatten(0, 1) / (adapter.scale * share))
        _write(up.bias, update.shift / adapter.scale)


@exact
def _set_output(adapter: LowRankAdapter, update: LowRankMap) -> None:
    left, right = _balanced(update, adapter.down)
    _write(adapter.down, right)
    _write(adapter.up.weight, left / adapter.scale)
    _write(adapter.up.bias, update.shift / adapter.scale)


def _balanced(update: LowRankMap, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of its product, each of the same size, so that both learn at one learning rate.

    Where the fit has no use for a unit of the bottleneck, it begins as it was drawn.
    """
    sizes = update.right.norm(dim=1), update.left.norm(dim=0)
    is_used = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = torch.where(is_used, sizes[1] / sizes[0], 1.0).sqrt()
    right = torch.where(is_used[:, None], update.right * ratio[:, None], _whole(drawn).to(update.right))
    return torch.where(is_used, update.left / ratio, 0.0), right


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, put together if it lies in shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
