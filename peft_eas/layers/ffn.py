"""The wrapper around an FFN."""

from typing import Any

import torch
from torch import nn

from ..config import EASConfig
from ..runtime.adapter import PropagationAdapter
from ..runtime.context_cache import cached_length
from .candidate import Candidate
from .output import OutputLayer
from .routed import RoutedLayer


class FFNLayer(RoutedLayer):
    """Around an FFN: puts the PIA in front of it where the block's MHA is skipped.

    If several MHAs stand in front of one FFN, it has a wrapper for each, nested: the first MHA's is the innermost.
    """

    adapter_layer_names = ("eas_pia",)
    adapter_class = PropagationAdapter

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__(base_layer, candidate)
        self.eas_pia = nn.ModuleDict()

    @property
    def has_experts(self) -> bool:
        """As above."""
        return self.candidate.architecture.experts

    def rank(self, config: EASConfig) -> int:
        """As above."""
        return config.r

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """As above; with the wrappers inside the FFN, which PEFT does not find once this one is gone."""
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        for name, inside in list(module.named_modules()):
            if isinstance(inside, OutputLayer) and not name.endswith(".base_layer"):
                own = inside.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
                module.set_submodule(name, own)
        return module

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the FFN does."""
        call, adapter = self.candidate.call.take(), self._adapter_to_apply()
        if self.fold_shift is not None:
            hidden_states = hidden_states + self.fold_shift.to(hidden_states)
        if adapter is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        if call is None:
            raise RuntimeError(
                f"{self.candidate.name} is skipped, but the block went past it, as past a cross-attention that is "
                "given no encoder_hidden_states, so that its adapter has nothing to stand for. Give the model what it "
                "attends to, or take it out of the targets with exclude_modules."
            )
        z = call.as_sequences(hidden_states)
        # The cache has counted this pass's tokens already, as the MHA, or its wrapper, came first.
        seen = cached_length(call.cache, self.candidate.layer_idx) - z.shape[1] if self.needs_prompt else 0
        context = self._context(adapter, z, call, seen)
        self._keep_context(context, call)
        return self.base_layer(call.as_given(adapter(z, context), hidden_states), *args, **kwargs)
