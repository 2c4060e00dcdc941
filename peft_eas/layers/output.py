"""The wrapper around the projection that writes an FFN's output, and the adapter beside it."""

import torch
from torch import nn

from ..config import EASConfig
from ..folding.fold import features
from ..folding.offloaded import offload_hook
from .candidate import Candidate
from .low_rank import LowRankLayer


class OutputLayer(LowRankLayer):
    """Around an FFN's output projection: adds what the output adapter writes where the block's MHA is skipped.

    For h of shape (…, d_ffn), which the projection (W, b) reads:

        y = W h + b + s (B dropout(A h) + c)

    PIA changes what the FFN reads, this adapter what it writes, so as to write what the MHA wrote. It folds as
    W' = W + s B A and b' = b + s c.
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

    def widths(self, width: int) -> tuple[int, int]:
        """As above."""
        return features(self.wrapped)

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
