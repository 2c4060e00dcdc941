"""What the wrappers around an MHA and an FFN have in common: adapters, their context, and their fold."""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import nn

from ..architectures import at_path
from ..config import EASConfig
from ..folding.fold import (
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
from ..folding.offloaded import execution_device, fetched, offload_hook
from ..folding.quantised import is_floating, is_quantised
from ..runtime.adapter import InputAdapter, RoutedAdapter
from ..runtime.context_cache import read_context, write_context
from ..runtime.forward import Call
from .base import EASLayer
from .candidate import Candidate


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
            return config.is_to_skip or not self.stands_for_skipped
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
