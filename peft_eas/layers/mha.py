"""The wrapper around an MHA."""

import threading
from typing import Any

import torch
from torch import nn

from ..architectures import at_path
from ..config import EASConfig
from ..runtime.adapter import InputAdapter
from ..runtime.context_cache import cached_length
from ..runtime.forward import Attended, Call, replace_hidden_states
from ..runtime.prompt import PROMPT_KEY
from ..runtime.skipped import advance_cache, fill_cross_slot, skipped_return, slot_of
from .candidate import Candidate
from .routed import RoutedLayer


class MHALayer(RoutedLayer):
    """Around an MHA: leaves it out where it is skipped, and adapts its input where it is kept."""

    adapter_layer_names = ("eas_input",)
    adapter_class = InputAdapter
    stands_for_skipped = False

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__(base_layer, candidate)
        self.eas_input = nn.ModuleDict()
        names = candidate.architecture.attends
        self.attended = None if names is None else Attended.of(base_layer, names)
        self.cross_slot = slot_of(base_layer) if candidate.layer_idx is None else None

    def rank(self, config: EASConfig) -> int:
        """As above."""
        return config.attention_r

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the MHA does; a skipped one returns zeros and no attention weights."""
        adapter, row = self._adapter_to_apply(), self.candidate.architecture
        if adapter is None and not self.is_skipped:
            kwargs.pop(PROMPT_KEY, None)
            return self.base_layer(*args, **kwargs)
        # What is attended to tells the context, which is known already where it is frozen.
        attended = self.attended if self._takes_prompt(self.adapter_in_force) else None
        call = Call(args, kwargs, self.candidate.current, attended)
        kwargs.pop(PROMPT_KEY, None)
        z = args[0] if args else kwargs["hidden_states"]
        if self.is_skipped:
            self.candidate.call.put(call)
            advance_cache(call.cache, self.candidate.layer_idx, z)
            fill_cross_slot(call.cache, self.cross_slot, z)
            norm = row.kept_norm and at_path(self.base_layer, row.kept_norm.removeprefix(f"{row.mha}."))
            return skipped_return(z, norm, row.returns, kwargs)
        seen = cached_length(call.cache, self.candidate.layer_idx) if self.needs_prompt else 0
        sequences = call.as_sequences(z)
        context = self._context(adapter, sequences, call, seen)
        output = self._call_with_input(call.as_given(adapter(sequences, context), z), args, kwargs)
        self._keep_context(context, call)
        return output

    def _call_with_input(self, z: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls the MHA with z as the input of its projections; a residual inside it keeps the input it was given."""
        core = self.candidate.architecture.core
        if core is None:
            args, kwargs = replace_hidden_states(z, args, kwargs)
            return self.base_layer(*args, **kwargs)
        core = self.base_layer.get_submodule(core.removeprefix(f"{self.candidate.architecture.mha}."))
        thread = threading.get_ident()

        def adapt(_: nn.Module, *inputs: Any) -> tuple[tuple, dict[str, Any]] | None:
            # Another thread may be inside the same module with an input of its own.
            return replace_hidden_states(z, *inputs) if threading.get_ident() == thread else None

        handle = core.register_forward_pre_hook(adapt, with_kwargs=True)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            handle.remove()
