"""What all wrappers have in common, and the wrapper around a norm."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .candidate import Candidate


class EASLayer(nn.Module, BaseTunerLayer):
    """What the wrappers have in common: PEFT's switches, and access to the wrapped module's attributes."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.candidate = candidate
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        candidate = self.candidate
        if candidate.skipped_by:
            return f"MHA skipped by {sorted(candidate.skipped_by)}"
        is_never = candidate.kept_by and candidate.kept_by == set(candidate.configs)
        return "MHA never skipped" if is_never else "MHA kept"

    @property
    def adapter_in_force(self) -> str | None:
        """Name of the active adapter that has this MHA as a target, or None while adapters are disabled."""
        if self.disable_adapters:
            return None
        for name in self.active_adapters:  # torch 2.6 does not compile next() with a default
            if name in self.candidate.configs:
                return name
        return None

    @property
    def is_skipped(self) -> bool:
        """Whether the adapter in force skips the MHA."""
        return self.candidate.is_skipped_by(self.adapter_in_force)

    def delete_adapter(self, adapter_name: str) -> None:
        self.candidate.configs.pop(adapter_name, None)
        self.candidate.skipped_by.discard(adapter_name)
        self.candidate.kept_by.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        # All wrappers of a candidate answer alike, also those that hold no weights of an adapter.
        return sorted(self.candidate.configs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to fold; see `AdaptedLayer`."""

    def unmerge(self) -> None:
        """Nothing was folded; see `AdaptedLayer`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the wrapped module, with the adapters folded into it or with everything folded taken out again."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        return self.base_layer


class NormLayer(EASLayer):
    """Around a norm that belongs to one MHA alone, at its input or its output. It is skipped with the MHA."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the norm of `hidden_states`; for a skipped MHA, `hidden_states` or nothing, as it was given."""
        return hidden_states if self.is_skipped else self.base_layer(hidden_states)
