"""The wrapper around an FFN that adapts its input where the block's MHA is kept."""

from typing import Any

import torch
from torch import nn

from ..config import EASConfig
from .candidate import Candidate
from .low_rank import LowRankLayer


class KeptFFNLayer(LowRankLayer):
    """Around an FFN, inside of every `FFNLayer`: adds to what the FFN reads where the block's MHA is kept.

        z' = z + s (B dropout(A z) + c)

    It folds into the projections that read z, as PIA does: W' = W + s W B A and b' = b + s W c. If several MHAs stand
    in front of one FFN, it has a wrapper for each, nested: the first MHA's is the innermost.
    """

    adapter_layer_names = ("eas_ffn",)
    stands_for_skipped = False

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__(base_layer, candidate)
        self.eas_ffn = nn.ModuleDict()

    @property
    def projections(self) -> dict[str, nn.Module]:
        """As above."""
        row = self.candidate.architecture
        return self.projections_within(row.ffn, row.ffn_projections)

    def rank(self, config: EASConfig) -> int:
        """As above."""
        return config.ffn_r

    def widths(self, width: int) -> tuple[int, int]:
        """As above."""
        return width, width

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the FFN does."""
        adapter = self._adapter_to_apply()
        if adapter is not None:
            hidden_states = hidden_states + adapter(hidden_states).to(hidden_states.dtype)
        return self.base_layer(hidden_states, *args, **kwargs)
