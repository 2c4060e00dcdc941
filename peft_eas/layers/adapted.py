"""What the wrappers have in common that hold adapters: which is in use, and its fold."""

from abc import abstractmethod
from collections.abc import Iterable
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
    check_projection,
    fold,
    fold_is_finite,
    shift_before,
    unfold,
)
from ..folding.offloaded import execution_device, fetched, offload_hook
from ..folding.quantised import is_floating, is_quantised
from .base import EASLayer
from .candidate import Candidate


class AdaptedLayer(EASLayer):
    """A wrapper that holds an adapter in front of the projections of what it wraps, or beside what it wraps."""

    # Whether the adapter is in use where the MHA is skipped (PIA, the output adapter) or where it is kept.
    stands_for_skipped: ClassVar[bool] = True
    # Whether the adapter stands beside the projection that is wrapped, and adds to its output.
    stands_beside: ClassVar[bool] = False
    # Whether the next forward pass takes this layer's context from the prompt.
    needs_prompt: bool = False
    # Whether the projections have no bias, so that `fold_shift` takes its place.
    has_experts: bool = False

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
    @abstractmethod
    def projections(self) -> dict[str, nn.Module | ExpertWeights]:
        """By name within the block, the projections that the adapter is folded into."""

    def projections_within(self, root: str, names: Iterable[str]) -> dict[str, nn.Module | ExpertWeights]:
        """The projections at the paths `names` within the block, of which what is wrapped is at `root`."""
        transposed = self.candidate.architecture.transposed
        found = {name: at_path(self.wrapped, name.removeprefix(root).removeprefix(".")) for name in names}
        return {
            name: ExpertWeights(module, name in transposed) if isinstance(module, nn.Parameter) else module
            for name, module in found.items()
        }

    @abstractmethod
    def rank(self, config: EASConfig) -> int:
        """The rank that `config` gives the adapter here; 0 for none."""

    @abstractmethod
    def new_adapter(self, config: EASConfig, width: int) -> nn.Module:
        """An adapter by `config`, for a model of width `width`."""

    def add_adapter(self, adapter_name: str, config: EASConfig, width: int) -> None:
        """Creates the adapter `adapter_name` for a model of width `width` if `config` can ever use it here."""
        if self._has_use(adapter_name, config):
            self.adapters[adapter_name] = self.new_adapter(config, width)
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
        needed = config is not None and skip == self.stands_for_skipped and self.rank(config) > 0
        return needed and adapter_name not in self.adapters

    def could_use(self, adapter_name: str) -> bool:
        """Whether some skip set gives the adapter `adapter_name` a use here."""
        is_open = not self.stands_for_skipped or adapter_name not in self.candidate.kept_by
        return is_open and self.rank(self.candidate.configs[adapter_name]) > 0

    def drop_unused_adapter(self, adapter_name: str) -> None:
        """Deletes the adapter `adapter_name` if the MHA, as it is skipped or kept now, has no use for it."""
        if adapter_name in self.adapters and self.used_adapter(adapter_name) is None:
            del self.adapters[adapter_name]

    def used_adapter(self, adapter_name: str | None) -> nn.Module | None:
        """The adapter `adapter_name` if the MHA, as it is skipped or kept now, has a use for it; else None."""
        is_skipped = self.candidate.is_skipped_by(adapter_name)
        if is_skipped != self.stands_for_skipped or adapter_name not in self.adapters:
            return None
        return self.adapters[adapter_name]

    def _adapter_to_apply(self) -> nn.Module | None:
        if self.disable_adapters and self.merged:
            self.unmerge()
        return None if self.merged else self.used_adapter(self.adapter_in_force)

    def used_adapters(self, adapter_names: list[str]) -> list[nn.Module]:
        """Those of the adapters `adapter_names` that the MHA, as it is skipped or kept now, has a use for."""
        return [adapter for name in adapter_names if (adapter := self.used_adapter(name)) is not None]

    @abstractmethod
    def low_rank_map(self, adapter_names: list[str]) -> LowRankMap | None:
        """What the adapters `adapter_names` are together, as it is folded, or None without a use here."""

    def uses_prompt(self, adapter_name: str | None) -> bool:
        """Whether the adapter is of use here and takes its context from the prompt."""
        return False

    def _check_recorded(self, name: str) -> None:
        """Raises a ValueError where the running mean of the adapter `name` was recorded, but is not there."""

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
                is_finite = not finite or fold_is_finite(projection, update, self.stands_beside)
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
                    self.fold_records[path] = fold(projection, update, has_bias, self.stands_beside)
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
