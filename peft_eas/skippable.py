"""`Skippable`: what the search needs of a model, whichever method it is that skips."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from peft import PeftModel
from torch import nn

from .config import EASConfig
from .model import EASModel


@runtime_checkable
class Skippable(Protocol):
    """A `torch.nn.Module` of which `EASSearch` and `EASCallback` choose what to skip.

    `EASModel` is one; its candidates are MHAs. Your own model may be another, such as one that skips whole layers. It
    may be wrapped for distributed training, compiled, or the base of another PEFT method.
    """

    @property
    def active_config(self) -> EASConfig:
        """The search reads `num_skip`, `skipped_modules` (None: to be searched) and `context` from it.

        It writes `scores` there at the end, and calls `note_scores` after each round. A model that has no context to
        freeze says context="none".
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
        """Skips them for good: writes them into the config. Parameters that are of no more use may be dropped."""

    def anneal_context(self, share: float) -> None:
        """Called if `context` is "prompt": before each step and each round of rewards, and with 0.0 after them.

        Until the next call, each context is (1 − share) · the prompt's + share · what `freeze_context` would leave.
        """

    def freeze_context(self, is_resumed: bool = False) -> None:
        """Called once in a run if `context` is "prompt"; turns it to "running".

        `is_resumed`: the run was frozen before it was interrupted, and what it left may come with the weights only
        after this call.
        """

    def sync_context(self) -> None:
        """Called after each optimizer step: makes equal on all ranks what each has gathered for itself."""


def eas_of(model: nn.Module, caller: str, receiver: str) -> Skippable:
    """The `EASModel`, or other `Skippable`, in a model that may be wrapped for distributed training or compiled.

    `receiver` names what `caller` has its model from.

    Raises:
        TypeError: if there is none.
    """
    inner = model
    while inner is not None:
        inner = getattr(inner, "_orig_mod", inner)
        if isinstance(getattr(inner, "base_model", None), EASModel):
            return inner.base_model
        if isinstance(inner, PeftModel):  # of another method, through which its base's attributes shine
            inner = inner.get_base_model()
        if isinstance(inner, Skippable):
            return inner
        inner = getattr(inner, "module", None)
    raise TypeError(
        f"{caller} was given a {type(model).__name__} without EAS adapters. Pass {receiver} the model that "
        "get_peft_model(model, EASConfig(...)) returns, or a module with all that peft_eas.Skippable names."
    )


def needs_search(eas: Skippable) -> bool:
    """Whether the active config leaves it to a search what is skipped."""
    config = eas.active_config
    if config.skipped_modules is not None:
        return False
    return config.budget is not None or 0 < (config.num_skip or 0) < len(eas.candidates)
