"""The adapter of low rank that reads no context, and what its wrappers have in common."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from ..config import EASConfig
from ..folding.fold import LowRankMap, added
from ..runtime.adapter import Affine
from .adapted import AdaptedLayer


class LowRankAdapter(nn.Module):
    """Adds to what an FFN writes, or to what it reads:

        s (B dropout(A h) + c)

    h, of shape (…, d_in), is what the FFN's output projection reads, or what the FFN itself reads.
    Submodules: `down` (A), of shape (r, d_in), and `up` (B, c), of shapes (d, r) and (d,). It is no part of the paper.
    It reads no context, so that its fold is exact for every prompt.

    Args:
        d_in, d: widths of what it reads and adds to. r: rank. scale: s. dropout: probability with which a bottleneck
            unit is dropped in training.
        init_weights: True: B and c start at zero, so that nothing is added. False: they are random.
    """

    def __init__(
        self, d_in: int, d: int, r: int, scale: float = 1.0, dropout: float = 0.0, init_weights: bool = True
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(r, d_in))
        self.up = Affine(r, d)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down)
        if init_weights:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What is added, of shape (…, d), in the adapter's own dtype, for h of shape (…, d_in)."""
        return self.scale * self.up(self.dropout(F.linear(h.to(self.down.dtype), self.down)))

    @torch.no_grad()
    def low_rank_map(self) -> LowRankMap:
        """What it adds, in evaluation mode, as left (right h) + shift."""
        up, bias = self.up.weight.float(), self.up.bias.float()
        return LowRankMap(self.scale * up, self.down.float(), self.scale * bias)


class LowRankLayer(AdaptedLayer):
    """A wrapper whose adapters are `LowRankAdapter`s."""

    @abstractmethod
    def widths(self, width: int) -> tuple[int, int]:
        """Of what the adapter reads and adds to, in a model of width `width`."""

    def new_adapter(self, config: EASConfig, width: int) -> LowRankAdapter:
        """As above."""
        options = {"scale": config.scale, "dropout": config.dropout, "init_weights": config.init_weights}
        return LowRankAdapter(*self.widths(width), self.rank(config), **options)

    def low_rank_map(self, adapter_names: list[str]) -> LowRankMap | None:
        """As above."""
        return added([adapter.low_rank_map() for adapter in self.used_adapters(adapter_names)])
