"""The wrapper around the projection that writes an FFN's output, and the adapter beside it."""

import torch
import torch.nn.functional as F
from torch import nn

from ..config import EASConfig
from ..folding.fold import LowRankMap, added, features
from ..folding.offloaded import offload_hook
from ..runtime.adapter import Affine
from .adapted import AdaptedLayer
from .candidate import Candidate


class OutputAdapter(nn.Module):
    """What the FFN behind a skipped MHA writes besides its own output, so as to write what the MHA wrote.

    For h of shape (…, d_ffn), which the FFN's output projection (W, b) reads:

        y = W h + b + s (B dropout(A h) + c)

    Submodules: `down` (A), of shape (r, d_ffn), and `up` (B, c), of shapes (d, r) and (d,). PIA changes what the FFN
    reads, this adapter what it writes; it is no part of the paper. It reads no context, so that its fold,
    W' = W + s B A and b' = b + s c, is exact for every prompt.

    Args:
        d_ffn, d: widths of what the projection reads and writes. r: rank. scale: s. dropout: probability with which a
            bottleneck unit is dropped in training.
        init_weights: True: B and c start at zero, so that nothing is added. False: they are random.
    """

    def __init__(
        self, d_ffn: int, d: int, r: int, scale: float = 1.0, dropout: float = 0.0, init_weights: bool = True
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(r, d_ffn))
        self.up = Affine(r, d)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down)
        if init_weights:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """What is added, of shape (…, d), in the adapter's own dtype, for h of shape (…, d_ffn)."""
        return self.scale * self.up(self.dropout(F.linear(h.to(self.down.dtype), self.down)))

    @torch.no_grad()
    def low_rank_map(self) -> LowRankMap:
        """What it adds, in evaluation mode, as left (right h) + shift."""
        up, bias = self.up.weight.float(), self.up.bias.float()
        return LowRankMap(self.scale * up, self.down.float(), self.scale * bias)


class OutputLayer(AdaptedLayer):
    """Around an FFN's output projection: adds what the output adapter writes where the block's MHA is skipped.

    If several MHAs stand in front of one FFN, it has a wrapper for each, nested; what they add is summed up.
    """

    adapter_layer_names = ("eas_output",)
    stands_beside = True

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__(base_layer, candidate)
        self.eas_output = nn.ModuleDict()

    @property
    def projections(self) -> dict[str, nn.Module]:
        """As above."""
        return {self.candidate.architecture.output_projection: self.wrapped}

    def rank(self, config: EASConfig) -> int:
        """As above."""
        return config.output_r

    def new_adapter(self, config: EASConfig, width: int) -> OutputAdapter:
        """As above."""
        return OutputAdapter(
            *features(self.wrapped),
            config.output_r,
            scale=config.scale,
            dropout=config.dropout,
            init_weights=config.init_weights,
        )

    def low_rank_map(self, adapter_names: list[str]) -> LowRankMap | None:
        """As above."""
        return added([adapter.low_rank_map() for adapter in self.used_adapters(adapter_names)])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As above."""
        super().merge(safe_merge, adapter_names)
        self._fetch()

    def unmerge(self) -> None:
        """As above."""
        super().unmerge()
        self._fetch()

    def _fetch(self) -> None:
        """Brings offloaded weights back: PEFT offloads those of a `base_layer` itself, behind a merge, as they are."""
        hook = offload_hook(self.base_layer)
        if hook is not None:
            hook.pre_forward(self.base_layer)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Takes and returns what the projection does."""
        adapter, output = self._adapter_to_apply(), self.base_layer(h)
        return output if adapter is None else output + adapter(h).to(output.dtype)
