"""The ways to win back what skipping costs that are held against each other."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Variant:
    """How the adapters of skipped attentions are made and trained.

    Attributes:
        output_r: rank of the output adapters. ffn_r: of those in front of kept attentions' FFNs.
        fit: whether the adapters of skipped attentions begin from a fit, else as the identity.
        is_searched: whether the run's own search finds what is skipped, else it is given.
    """

    output_r: int = 0
    ffn_r: int = 0
    fit: bool = False
    is_searched: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of `EASConfig`."""
        return {"output_r": self.output_r, "ffn_r": self.ffn_r}


PAPER = Variant()
VARIANTS = {
    "identity": PAPER,
    "output adapter": replace(PAPER, output_r=32),
    "fit": replace(PAPER, fit=True),
    "fit, output adapter": replace(PAPER, output_r=32, fit=True),
    "fit, output adapter, FFN adapter": replace(PAPER, output_r=32, fit=True, ffn_r=32),
    "searched: identity": replace(PAPER, is_searched=True),
    "searched: output adapter": replace(PAPER, output_r=32, is_searched=True),
    "searched: fit, output adapter": replace(PAPER, output_r=32, fit=True, is_searched=True),
}
# What they are held against, in which nothing is skipped: the same adapters, and LoRA.
NOTHING_SKIPPED, LORA = REFERENCES = "nothing skipped", "LoRA"
