"""`Skippable`: what the search needs of a model, whichever method it is that skips."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from .config import EASConfig


@runtime_checkable
class Skippable(Protocol):
    """A `torch.nn.Module` of which `EASSearch` and `EASCallback` choose what to skip.

    `EASModel` is one, whose candidates are MHAs; a model of one's own may be another, such as one that skips whole
    layers. It may be wrapped for distributed training, compiled, or the base of another PEFT method.
    """

    @property
    def active_config(self) -> EASConfig:
        """The search reads `num_skip`, `skipped_modules` (None: to be searched) and `context`, and writes `scores`.

        Where nothing is to be frozen at the end of a run, `context` is "none".
        """

    @property
    def candidates(self) -> Sequence[str]:
        """Names of what may be skipped, always in the same order."""

    @property
    def skipped_modules(self) -> list[str]:
        """Names of what is skipped now, in the order of the candidates."""

    def set_skipped_modules(self, names: Sequence[str]) -> None:
        """Skips exactly the candidates `names` from the next forward pass on; called in every step of a search."""

    def fix_skipped_modules(self, names: Sequence[str]) -> None:
        """The same for good: writes them into the config; parameters that are of no use any longer may be dropped."""

    def freeze_context(self) -> None:
        """Called once, towards the end of a run; turns `context` from "prompt" to "running", if it is that."""

    def sync_context(self) -> None:
        """Called after each optimizer step; makes what the ranks have gathered each for itself equal."""
