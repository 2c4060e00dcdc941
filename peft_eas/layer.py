"""The wrappers that take a block's MHA, its norm and its FFN in hand.

A candidate MHA has three kinds of wrappers: `MHALayer` around the attention, which computes it or leaves it out;
`NormLayer` around a norm that only serves it; `FFNLayer` around the FFN, in front of which the PIA stands. What they
must agree on, above all which adapters skip the MHA, they share through one `Candidate`.
"""

import threading
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .adapter import InputAdapter, PropagationAdapter, RoutedAdapter
from .architectures import at_path
from .candidate import Candidate
from .config import EASConfig
from .context_cache import cached_length, read_context, write_context
from .fold import (
    ExpertWeights,
    FoldRecord,
    LowRankMap,
    added,
    check_projection,
    fold,
    fold_is_finite,
    low_rank_map,
    shift_before,
    unfold,
)
from .forward import Attended, Call, replace_hidden_states
from .offloaded import execution_device, fetched, offload_hook
from .prompt import PROMPT_KEY
from .quantised import is_floating, is_quantised
from .skipped import advance_cache, fill_cross_slot, skipped_return, slot_of


class EASLayer(nn.Module, BaseTunerLayer):
    """What the three wrappers have in common: PEFT's switches, and the wrapped module's attributes shining through."""

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
    """Around a norm that only feeds an MHA, or that only the MHA feeds: not computed where the MHA is skipped."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the norm of `hidden_states`; for a skipped MHA, `hidden_states` or nothing, as it was given."""
        return hidden_states if self.is_skipped else self.base_layer(hidden_states)


class AdaptedLayer(EASLayer):
    """A wrapper that holds an adapter in front of the projections of what it wraps."""

    adapter_class: ClassVar[type[RoutedAdapter]]
    # Whether the adapter is in use where the MHA is skipped (PIA) or where it is kept.
    stands_for_skipped: ClassVar[bool]

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__(base_layer, candidate)
        self.fold_records: dict[str, FoldRecord] = {}
        self.fold_shift: torch.Tensor | None = None

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters by adapter name."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def wrapped(self) -> nn.Module:
        """The model's own module, beneath this wrapper and those of other MHAs in front of the same FFN."""
        return self.base_layer.wrapped if isinstance(self.base_layer, AdaptedLayer) else self.base_layer

    @property
    def projections(self) -> dict[str, nn.Module | ExpertWeights]:
        """By name within the block, the projections that read what the adapter returns."""
        row = self.candidate.architecture
        root, names = (row.ffn, row.ffn_projections) if self.stands_for_skipped else (row.mha, row.mha_projections)
        found = {name: at_path(self.wrapped, name.removeprefix(root).removeprefix(".")) for name in names}
        return {
            name: ExpertWeights(module, name in row.transposed) if isinstance(module, nn.Parameter) else module
            for name, module in found.items()
        }

    @property
    def has_experts(self) -> bool:
        """Whether the projections have no bias, so that `fold_shift` takes its place."""
        return self.stands_for_skipped and self.candidate.architecture.experts

    def add_adapter(self, adapter_name: str, config: EASConfig, width: int) -> None:
        """Creates the adapter `adapter_name` for a model of width `width` if `config` can ever use it here."""
        if not self._has_use(adapter_name, config):
            return
        adapter_class = InputAdapter if config.context == "none" else self.adapter_class
        self.adapters[adapter_name] = adapter_class(
            width,
            config.r if self.stands_for_skipped else config.attention_r,
            groups=config.groups,
            scale=config.scale,
            router_temperature=config.router_temperature,
            dropout=config.dropout,
            init_weights=config.init_weights,
            paths=config.paths,
        )
        if config.context == "running":
            self.adapters[adapter_name].freeze_context()
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _has_use(self, adapter_name: str, config: EASConfig) -> bool:
        if not self.could_use(adapter_name):
            return False
        if config.skipped_modules is None:
            return bool(config.num_skip) or not self.stands_for_skipped
        return (self.candidate.name in config.skipped_modules) == self.stands_for_skipped

    def lacks_adapter(self, adapter_name: str, skip: bool) -> bool:
        """Whether an adapter would be missing here if the MHA were skipped (`skip`) or kept."""
        config = self.candidate.configs.get(adapter_name)
        needed = config is not None and skip == self.stands_for_skipped and (skip or config.attention_r > 0)
        return needed and adapter_name not in self.adapters

    def could_use(self, adapter_name: str) -> bool:
        """Whether some skip set gives the adapter `adapter_name` a use here."""
        if self.stands_for_skipped:
            return adapter_name not in self.candidate.kept_by
        return self.candidate.configs[adapter_name].attention_r > 0

    def drop_unused_adapter(self, adapter_name: str) -> None:
        """Deletes the adapter `adapter_name` if the MHA, as it is skipped or kept now, has no use for it."""
        if adapter_name in self.adapters and self.used_adapter(adapter_name) is None:
            del self.adapters[adapter_name]

    def used_adapter(self, adapter_name: str | None) -> RoutedAdapter | None:
        """The adapter `adapter_name` if the MHA, as it is skipped or kept now, has a use for it; else None."""
        is_skipped = self.candidate.is_skipped_by(adapter_name)
        if is_skipped != self.stands_for_skipped or adapter_name not in self.adapters:
            return None
        return self.adapters[adapter_name]

    @property
    def needs_prompt(self) -> bool:
        """Whether the next forward pass takes this layer's context from the prompt."""
        return not self.merged and self.uses_prompt(self.adapter_in_force)

    def uses_prompt(self, adapter_name: str | None) -> bool:
        """Whether the adapter is of use here and takes its context from the prompt."""
        return self.used_adapter(adapter_name) is not None and self._takes_prompt(adapter_name)

    def _takes_prompt(self, adapter_name: str) -> bool:
        config = self.candidate.configs[adapter_name]
        # A kept MHA's adapter without a router reads no context.
        return config.context == "prompt" and (self.candidate.is_skipped_by(adapter_name) or config.paths > 1)

    def _adapter_to_apply(self) -> RoutedAdapter | None:
        if self.disable_adapters and self.merged:
            self.unmerge()
        return None if self.merged else self.used_adapter(self.adapter_in_force)

    def _context(self, adapter: RoutedAdapter, z: torch.Tensor, call: Call, seen: int) -> torch.Tensor | None:
        """The context for z, (B, T, d), of which the cache has seen `seen` tokens before: (B, d), or (1, d).

        None for an adapter that needs none.
        """
        name, candidate = self.adapter_in_force, self.candidate
        if not adapter.needs_context:
            return None
        if not self._takes_prompt(name):
            self._check_recorded(name)
            return adapter.running_context.detach()[None]
        if seen > 0:
            context = read_context(call.cache, candidate.layer_idx, (name, self.stands_for_skipped))
            if context is None:
                raise ValueError(
                    f"The KV cache holds {seen} tokens, but no context of the EAS adapter {name!r} for "
                    f"{candidate.name}: it was filled with other adapters or another skip set. Start with a new "
                    "cache after changing them, or use context='running'."
                )
            return context
        context = call.context(z, candidate.context_tokens)
        if self.training and call.prompt is not None and id(adapter) not in call.prompt.recorded:
            adapter.record(context.detach())
            call.prompt.recorded.add(id(adapter))
        return adapter.annealed(context)

    def _check_recorded(self, name: str) -> None:
        """Raises a ValueError where the running mean of the adapter `name` was recorded, but is not there."""
        adapter, config = self.used_adapter(name), self.candidate.configs[name]
        if config.context != "running" or not config.context_recorded or torch.compiler.is_compiling():
            return
        if adapter.needs_context and adapter.has_lost_context():
            raise ValueError(
                f"The running mean of the EAS adapter {name!r} for {self.candidate.name} is zero, but its config says "
                "that one was recorded (context_recorded=True): the weights were copied or loaded without "
                "running_context, or the skip set has changed since. Copy all of named_parameters(), or load the "
                "whole state dict; to train a new adapter by this config, set context='prompt'."
            )

    def _keep_context(self, context: torch.Tensor | None, call: Call) -> None:
        name = self.adapter_in_force
        if self.candidate.layer_idx is not None and self._takes_prompt(name):
            write_context(call.cache, self.candidate.layer_idx, (name, self.stands_for_skipped), context)

    def used_adapters(self, adapter_names: list[str]) -> list[RoutedAdapter]:
        """Those of the adapters `adapter_names` that the MHA, as it is skipped or kept now, has a use for."""
        return [adapter for name in adapter_names if (adapter := self.used_adapter(name)) is not None]

    def low_rank_map(self, adapter_names: list[str]) -> LowRankMap | None:
        """What the adapters `adapter_names` are together with their running contexts, or None without a use here."""
        adapters = self.used_adapters(adapter_names)
        return added([low_rank_map(adapter, adapter.running_context) for adapter in adapters])

    def check_fold(self, adapter_names: list[str], finite: bool) -> None:
        """Raises if the adapters `adapter_names` cannot be folded, or with `finite` if they would leave a NaN.

        Raises:
            TypeError: for a projection that `check_projection` refuses. ValueError: for a NaN or an infinity; for a
                frozen running mean that was lost.
        """
        for name in adapter_names:
            if self.used_adapter(name) is not None:
                self._check_recorded(name)
        update = self.low_rank_map(adapter_names)
        if update is not None and self.has_experts:
            shift_before(update)
        for name, projection in self.projections.items() if update is not None else ():
            full_name = f"{self.candidate.block}.{name}"
            check_projection(projection, full_name, with_bias=not self.has_experts)
            if projection.weight.is_meta and offload_hook(projection) is None:
                raise ValueError(
                    f"The weights of {full_name} are not in memory, so that nothing can be folded into them: they are "
                    "offloaded in a way that is not known here, or on the meta device. Load the base with a "
                    "device_map that offloads nothing, such as 'cpu', and the adapter on it, and merge there."
                )
            with fetched(projection, to_change=False) if finite else nullcontext():
                is_finite = not finite or fold_is_finite(projection, update)
            if not is_finite:
                raise ValueError(  # begins as PEFT's own
                    f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be "
                    f"broken: folding it would put NaN or infinity into {full_name}. Nothing was changed. Train again "
                    "with a lower learning rate, or merge in a wider dtype."
                )

    def folds_into_quantised(self, adapter_names: list[str]) -> bool:
        """Whether folding the adapters `adapter_names` quantises a projection anew."""
        return bool(self.used_adapters(adapter_names)) and any(map(is_quantised, self.projections.values()))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds the adapters `adapter_names`, by default the one in force, unless something is folded already."""
        names = adapter_names or [name for name in [self.adapter_in_force] if name is not None]
        if self.merged or not names:
            return
        self.check_fold(names, finite=safe_merge)
        if isinstance(self.base_layer, AdaptedLayer):  # it stands between this adapter and the projections
            self.base_layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        update = self.low_rank_map(names)
        if update is not None:
            has_bias = not self.has_experts
            for path, projection in self.projections.items():
                with fetched(projection):
                    self.fold_records[path] = fold(projection, update, has_bias)
            self.fold_shift = None if has_bias else shift_before(update)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Takes what was folded out of the projections again."""
        for path, record in self.fold_records.items():
            with fetched(self.projections[path]):
                unfold(self.projections[path], record)
        self.fold_records, self.fold_shift = {}, None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """As above; what was folded need not be taken out again, so no record of it takes memory."""
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        self.fold_records = {}
        if isinstance(module, AdaptedLayer):
            return module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return module

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        parameters = list(base_layer.parameters())
        dtype = next((p.dtype for p in parameters if is_floating(p.dtype)), None)  # float8 is no dtype to train in
        return execution_device(base_layer) or (parameters[0].device if parameters else None), dtype


class MHALayer(AdaptedLayer):
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


class FFNLayer(AdaptedLayer):
    """Around an FFN: puts the PIA in front of it where the block's MHA is skipped.

    An FFN behind several MHAs has one wrapper for each, the first MHA's inside.
    """

    adapter_layer_names = ("eas_pia",)
    adapter_class = PropagationAdapter
    stands_for_skipped = True

    def __init__(self, base_layer: nn.Module, candidate: Candidate) -> None:
        super().__init__(base_layer, candidate)
        self.eas_pia = nn.ModuleDict()

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
