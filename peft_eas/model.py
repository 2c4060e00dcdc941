"""`EASModel`: what is done with a model that has adapters: its skip set, its context, and the steps of a search.

How adapters are put in is in `injection.tuner`; how they are merged, in `merging`.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .config import EASConfig
from .injection.checks import check_names
from .layers import AdaptedLayer, RoutedLayer
from .merging import MergingTuner
from .runtime.adapter import RoutedAdapter


class EASModel(MergingTuner):
    """A model with EAS adapters (arXiv 2403.15226). Made by `get_peft_model(model, EASConfig(...))`.

    Beside PEFT's own methods: `active_config`, `candidates`, `skipped_modules`, `set_skipped_modules`,
    `fix_skipped_modules`, `begin_step`, `end_step`, `anneal_context`, `freeze_context`, `sync_context`. One adapter is
    active at a time.

    Raises:
        ValueError: for a config that does not fit the model; the model is left as it was.
    """

    # Of a step that is under way: the adapter's name, what it skips, and its parts that are annealed.
    _step: tuple[str, list[str], list[RoutedAdapter]] | None = None

    # --- one adapter at a time ---------------------------------------------------------------------------------------

    @property
    def _active_name(self) -> str:
        return self.active_adapters[0]

    @property
    def active_config(self) -> EASConfig:
        """The config of the active adapter."""
        return self.peft_config[self._active_name]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one adapter the active one; see PEFT.

        Raises:
            ValueError: for more than one, since two adapters may skip different MHAs.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            raise ValueError(
                f"EAS runs one adapter at a time, but {list(adapter_name)} were to be active together. Set one."
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT enters this around `forward` and `generate`, and then drops `adapter_names`.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']} asks for one adapter per sample, but EAS runs one adapter "
                "at a time. Leave it out, and choose the adapter with set_adapter()."
            )
        yield

    # --- prompt and context ------------------------------------------------------------------------------------------

    def freeze_context(self, is_resumed: bool = False) -> None:
        """Switches the active adapter to context="running" for good: from now on, what is trained is exactly what is
        folded.

        Warns if an adapter has seen no prompt yet, because its running mean is then zero. With `is_resumed` there is
        no warning: the run was frozen before, and the mean comes with the weights. If the context is not the prompt's,
        there is nothing to do.
        """
        config = self.active_config
        if config.context != "prompt":
            return
        if not is_resumed:
            self.sync_context()
            layers = [layer for layer in self._adapted_layers() if isinstance(layer, RoutedLayer)]
            used = [one for layer in layers for one in layer.used_adapters([self._active_name])]
            recorded = [int(adapter.num_contexts) > 0 for adapter in used if adapter.needs_context]
            if not all(recorded):
                warnings.warn(
                    "The context is frozen, but at least one adapter was of use in no training step so far: its "
                    "running mean of the prompts stays zero. A longer training before the freeze makes it known; to "
                    "train on, zero serves as well.",
                    stacklevel=2,
                )
            config.context_recorded = bool(recorded) and all(recorded)
        for adapter in self._contextual_adapters():
            adapter.freeze_context()
        config.context = "running"

    def anneal_context(self, share: float) -> None:
        """Until the next call, mixes the running mean, as it is now, into all contexts, with the weight `share`.

        In this way training passes from each prompt's own context (0.0) to the one that `freeze_context` leaves (1.0).
        It applies to the active adapter, if its context is the prompt's, and is not saved in checkpoints.

        Raises:
            ValueError: for a share out of range.
        """
        _check_share(share)
        for adapter in self._contextual_adapters():
            adapter.anneal(share)

    @torch.no_grad()
    def sync_context(self) -> None:
        """Makes the running contexts equal on all ranks, to their mean. Call once per optimizer step while training.

        Without torch.distributed, or if the context is not the prompt's (any more), there is nothing to do.
        """
        if self.active_config.context != "prompt" or not torch.distributed.is_initialized():
            return
        buffers = [adapter.running_context for adapter in self._contextual_adapters()]
        if not buffers:
            return
        flat = torch.cat(buffers)
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for buffer, mean in zip(buffers, flat.split([len(buffer) for buffer in buffers])):
            buffer.copy_(mean)

    def _contextual_adapters(self) -> list[RoutedAdapter]:
        return [adapter for adapter in self._adapters_named(self._active_name) if adapter.needs_context]

    def _adapters_named(self, adapter_name: str) -> list[RoutedAdapter]:
        """What may read a context in the adapter, whether it is of use with the present skip set or not."""
        held = [layer.adapters for layer in self._adapted_layers() if isinstance(layer, RoutedLayer)]
        return [adapters[adapter_name] for adapters in held if adapter_name in adapters]

    # --- skip set ----------------------------------------------------------------------------------------------------

    @property
    def candidates(self) -> list[str]:
        """Full names of the MHAs that the active adapter may skip, in the model's order."""
        active = self._active_name
        return [name for name, one in self._candidates.items() if active in one.configs and active not in one.kept_by]

    @property
    def skipped_modules(self) -> list[str]:
        """Full names of the MHAs that the active adapter skips now, in the model's order."""
        return [name for name in self.candidates if self._candidates[name].is_skipped_by(self._active_name)]

    def set_skipped_modules(self, names: Sequence[str]) -> None:
        """Skips exactly the MHAs `names`, full names, from the next forward pass on. Cheap; moves no weights.

        Raises:
            ValueError: for a name that is no candidate or is repeated; for an MHA that lacks the adapter it needs,
                because it was dropped; while adapters are merged.
        """
        names = self._checked_skip_set(names, list(self._adapted_layers()))
        self.end_step()
        for name in self.candidates:
            skipped_by = self._candidates[name].skipped_by
            (skipped_by.add if name in names else skipped_by.discard)(self._active_name)
        self.active_config.note_skipped_modules(self.skipped_modules)

    def _checked_skip_set(self, names: Sequence[str], layers: list[AdaptedLayer]) -> list[str]:
        self._check_in_place()
        names = check_names(names, self.candidates)
        if any(layer.merged for layer in layers):
            raise ValueError("The adapters are merged, so the skip set cannot change. Call unmerge_adapter() first.")
        for layer in layers:
            if layer.lacks_adapter(self._active_name, skip=layer.candidate.name in names):
                state = "skipped" if layer.stands_for_skipped else "kept"
                raise ValueError(
                    f"{layer.candidate.name} has no adapter for being {state}: this EAS adapter was made for the skip "
                    f"set {self.active_config.skipped_modules or []} alone. Make one with num_skip, and without "
                    "skipped_modules, to choose among all candidates."
                )
        return names

    def fix_skipped_modules(self, names: Sequence[str]) -> None:
        """Skips the MHAs `names` for good: writes them into the config, and drops the adapters that are not needed any
        more.

        Raises:
            ValueError: as `set_skipped_modules`; nothing is changed then.
        """
        self.set_skipped_modules(names)
        config = self.active_config
        config.skipped_modules = self.skipped_modules
        config.num_skip = len(config.skipped_modules)
        for layer in self._adapted_layers():
            layer.drop_unused_adapter(self._active_name)

    # --- a step of the search ----------------------------------------------------------------------------------------

    def begin_step(self, names: Sequence[str], share: float) -> None:
        """Lets the active adapter train with the MHAs `names` skipped and contexts annealed by `share`; see
        `anneal_context`.

        That is for training alone: from a switch to evaluation mode to the switch back, in checkpoints and under a
        merge, skip set and contexts are those of before, also where an exception has kept `end_step` from being
        called.

        Raises:
            ValueError: as `set_skipped_modules` and `anneal_context`; nothing is changed then.
        """
        layers = list(self._adapted_layers())
        names = self._checked_skip_set(names, layers)
        _check_share(share)
        self.end_step()
        self._step = self._active_name, names, []
        self._put_step_in_force(True)
        for layer in layers:
            for adapter in layer.used_adapters([self._active_name]) if isinstance(layer, RoutedLayer) else ():
                if adapter.needs_context:
                    adapter.anneal(share)
                    self._step[2].append(adapter)

    def end_step(self) -> None:
        """Ends what `begin_step` has begun, if anything."""
        if self._step is not None:
            self._put_step_in_force(False)
            for adapter in self._step[2]:
                adapter.anneal(0.0)
            self._step = None

    def _put_step_in_force(self, in_force: bool) -> None:
        adapter_name, names, adapters = self._step
        for candidate in self._candidates.values():
            candidate.drawn = {adapter_name: candidate.name in names} if in_force else {}
        for adapter in adapters:
            adapter.is_annealing_paused = not in_force

    def train(self, mode: bool = True) -> "EASModel":
        """As of `nn.Module`; see `begin_step`."""
        super().train(mode)
        if self._step is not None:
            self._put_step_in_force(mode)
        return self


def _check_share(share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"anneal_context({share!r}): the share of the running mean must be from 0.0 to 1.0.")
