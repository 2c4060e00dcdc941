"""`EASModel`: puts the wrappers into a model, keeps the skip set, marks the prompt, and merges."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from .architectures import join, rows_of
from .config import EASConfig
from .injection.checks import (
    check_base,
    check_names,
    check_other_methods,
    check_skip_fields,
    check_state_dict,
    warn_of_untrained_head,
)
from .injection.targets import Targets, block_width, find_targets, matches, prompt_root, skippable_mhas
from .injection.trained_tokens import check_trained_tokens, complete_wrappers, copy_tokens
from .layers import AdaptedLayer, EASLayer, FFNLayer, MHALayer, NormLayer
from .layers.candidate import Candidate
from .merging import MergingTuner
from .runtime.adapter import RoutedAdapter
from .runtime.prompt_hook import PromptHook
from .runtime.skipped import slot_of

# Tasks whose labels are not tokens of the input, so that they do not tell prompt from answer.
_TASKS_WITHOUT_ANSWER = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class EASModel(MergingTuner):
    """A model with EAS adapters (arXiv 2403.15226). Made by `get_peft_model(model, EASConfig(...))`.

    Beside PEFT's own methods: `active_config`, `candidates`, `skipped_modules`, `set_skipped_modules`,
    `fix_skipped_modules`, `begin_step`, `end_step`, `anneal_context`, `freeze_context`, `sync_context`. One adapter is
    active at a time.

    Raises:
        ValueError: for a config that does not fit the model; the model is left as it was.
    """

    prefix = "eas_"
    tuner_layer_cls = EASLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # Whether a search trains the model that will freeze the context.
    awaits_freeze = False
    _step: tuple[str, list[str]] | None = None

    # --- injection -------------------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_other_methods(model)  # PEFT enters the config into that of a PeftModel, before it injects
        super().__init__(model, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """See PEFT. If another adapter already has this config object, it is copied, because each has its own skip
        set.

        Trained tokens then begin as that adapter's: so TRL makes its reference, and then copies all but these.
        """
        config = self.peft_config[adapter_name]
        layers = (module for module in model.modules() if isinstance(module, EASLayer))
        taken = [*self.peft_config.items(), *(item for layer in layers for item in layer.candidate.configs.items())]
        copied = next((name for name, other in taken if other is config and name != adapter_name), None)
        if copied is not None:
            self.peft_config[adapter_name] = replace(config)
        if state_dict is not None:
            parts = ((*key.rpartition(f".{self.prefix}"), value) for key, value in state_dict.items())
            mhas = skippable_mhas(model)
            state_dict = {"".join((_mha_of(path, mhas), dot, end)): value for path, dot, end, value in parts}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        complete_wrappers(model)
        if copied is not None:
            copy_tokens(model, copied, adapter_name)

    def _prepare_adapter_config(self, peft_config: EASConfig, model_config: dict) -> EASConfig:
        return peft_config  # `_prepare_model` finds the targets, because it has the model to look at

    def _prepare_model(self, peft_config: EASConfig, model: nn.Module) -> None:
        """Checks the config against the model before any change, and writes the targets and base shape into it."""
        targets = find_targets(peft_config, model)
        check_skip_fields(peft_config, targets)
        shape = check_base(peft_config, model, targets)
        root = prompt_root(peft_config, model, targets)
        # Another EASModel, such as transformers makes for each adapter, may have wrapped the model before.
        present = {layer.candidate.name: layer.candidate for layer in model.modules() if isinstance(layer, EASLayer)}
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        self._check_name_is_free(name, peft_config, present)
        check_trained_tokens(peft_config, model)
        warn_of_untrained_head(peft_config, model)
        peft_config.base_shape = shape
        self._targets = set(targets)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(targets)
        if not hasattr(self, "_candidates"):
            self._candidates: dict[str, Candidate] = present
            self._trainable_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
            hooks = (hook for hook in root._forward_pre_hooks.values() if isinstance(hook, PromptHook))
            self._prompt_hook = next(hooks, None) or PromptHook(
                root, [], self._needs_prompt, self.answer_in_input, self._keeps_context
            )
            self.register_load_state_dict_pre_hook(EASModel._refuse_unfit_weights)
        self._newest_adapter, self._prompt_hook.was_used = name, False
        order = list(skippable_mhas(model))
        for name in dict.fromkeys(block for block, _ in targets.values()):
            block = model.get_submodule(name)
            for row in rows_of(block):  # also one that is no target: its adapters' place is among the others'
                mha = join(name, row.mha)
                if mha in order and mha not in self._candidates:
                    layer_idx = slot_of(block.get_submodule(row.mha))
                    self._candidates[mha] = Candidate(mha, name, row, layer_idx, self._prompt_hook.current)
        self._candidates = dict(sorted(self._candidates.items(), key=lambda item: order.index(item[0])))
        of_prompt = (one for one in self._candidates.values() if one.context_tokens in ("prompt", "input"))
        self._prompt_hook.add_entries(model.get_submodule(candidate.block) for candidate in of_prompt)

    def _check_name_is_free(self, name: str, config: EASConfig, present: dict[str, Candidate]) -> None:
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"adapter_name={name!r} was received. Choose a name without dots that is no attribute of "
                "torch.nn.ModuleDict, such as 'default'."
            )
        taken = next((c.configs[name] for c in present.values() if c.configs.get(name, config) is not config), None)
        if taken is not None:
            self.peft_config[name] = taken  # PEFT has entered the new config already
            raise ValueError(
                f"The model has an EAS adapter {name!r} already. Choose another adapter_name, or take the adapters "
                "out with unload() first."
            )

    def _check_target_module_exists(self, peft_config: EASConfig, key: str) -> Any:
        # PEFT knows nothing of kept_modules.
        return key in self._targets or super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: EASConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        candidate = self._candidates.get(current_key)
        if candidate is None or adapter_name in candidate.configs:
            return
        candidate.configs[adapter_name] = peft_config
        if matches(peft_config.kept_modules, candidate.name):
            candidate.kept_by.add(adapter_name)
        if candidate.name in (peft_config.skipped_modules or ()):
            candidate.skipped_by.add(adapter_name)
        row = candidate.architecture
        width = block_width(self.model, candidate.block, row)
        block = self.model.get_submodule(candidate.block)
        wrappers = [(candidate, row.mha, MHALayer)]
        wrappers += [(candidate, norm, NormLayer) for norm in row.deleted_norms]
        for other in self._candidates.values():  # of one FFN's wrappers none is left out, so that weights keep names
            if other.block == candidate.block and other.architecture.ffn == row.ffn:
                wrappers.append((other, row.ffn, FFNLayer))
        for owner, path, wrapper in wrappers:
            layer = _wrapper_of(owner, block.get_submodule(path))
            if layer is None:
                layer = wrapper(block.get_submodule(path), owner)
                layer.set_adapter(self.active_adapters)
                block.set_submodule(path, layer)
            if isinstance(layer, AdaptedLayer) and owner is candidate:
                layer.add_adapter(adapter_name, peft_config, width)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name of the adapter, which may start with the prefix too, stands right behind the layer's attribute.
        head, separator, tail = key.partition(f".{cls.prefix}")
        attribute, _, path = tail.partition(".")
        if not separator or not path.startswith(f"{adapter_name}."):
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{head}{separator}{attribute}.{path.removeprefix(f'{adapter_name}.')}"

    def _refuse_unfit_weights(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Pre-hook of load_state_dict. An adapter that was added only for these weights is taken out again."""
        try:
            check_state_dict(self, state_dict, prefix)
        except ValueError:
            attributes = {layer.adapter_layer_names[0] for layer in self._adapted_layers()}
            others = [f".{a}.{name}." for a in attributes for name in self.peft_config if name != self._newest_adapter]
            if not self._prompt_hook.was_used and not any(other in key for key in state_dict for other in others):
                if len(self.peft_config) > 1:
                    self.delete_adapter(self._newest_adapter)
                else:
                    self.unload()
                    for parameter in self._trainable_before:
                        parameter.requires_grad_(True)
            raise

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

    # --- prompt and context ----------------------------------------------------------------------------------------

    def _needs_prompt(self) -> bool:
        by_prompt = any(config.context == "prompt" for config in self.peft_config.values())
        return by_prompt and any(layer.needs_prompt for layer in self._adapted_layers())

    def _keeps_context(self) -> bool:
        return not self.awaits_freeze

    def answer_in_input(self, adapter_name: str | None = None) -> bool:
        """Whether the labels, by the adapter's task and the base's kind, mark an answer among the input's tokens.

        Of the adapter `adapter_name`, by default of the one in force.
        """
        in_force = ((layer.candidate, adapter_name or layer.adapter_in_force) for layer in self._adapted_layers())
        return any(
            candidate.architecture.kind == "decoder" and candidate.configs[name].task_type not in _TASKS_WITHOUT_ANSWER
            for candidate, name in in_force
            if name in candidate.configs
        )

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
            used = [one for layer in self._adapted_layers() for one in layer.used_adapters([self._active_name])]
            recorded = [int(adapter.num_contexts) > 0 for adapter in used if adapter.needs_context]
            if not all(recorded):
                warnings.warn(
                    "freeze_context() for at least one adapter that was of use in no training step so far: its "
                    "running mean of the prompts stays zero. Train with context='prompt' first, so that it is known; "
                    "or train on, for which zero serves as well.",
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
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"anneal_context({share!r}): the share of the running mean must be from 0.0 to 1.0.")
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
        """What depends on a context in the active adapter, whether it is of use with the present skip set or not."""
        held = [layer.adapters for layer in self._adapted_layers()]
        adapters = [adapters[self._active_name] for adapters in held if self._active_name in adapters]
        return [adapter for adapter in adapters if adapter.needs_context]

    # --- skip set --------------------------------------------------------------------------------------------------

    @property
    def _active_name(self) -> str:
        return self.active_adapters[0]

    @property
    def active_config(self) -> EASConfig:
        """The config of the active adapter."""
        return self.peft_config[self._active_name]

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
        names = self._checked_skip_set(names)
        self.end_step()
        for name in self.candidates:
            skipped_by = self._candidates[name].skipped_by
            (skipped_by.add if name in names else skipped_by.discard)(self._active_name)
        self.active_config.note_skipped_modules(self.skipped_modules)

    def _checked_skip_set(self, names: Sequence[str]) -> list[str]:
        self._check_in_place()
        names = check_names(names, self.candidates)
        if any(layer.merged for layer in self._layers()):
            raise ValueError("The adapters are merged, so the skip set cannot change. Call unmerge_adapter() first.")
        for layer in self._adapted_layers():
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

    # --- a step of the search --------------------------------------------------------------------------------------

    def begin_step(self, names: Sequence[str], share: float) -> None:
        """Lets the active adapter train with the MHAs `names` skipped and contexts annealed by `share`; see
        `anneal_context`.

        That is for training alone: from a switch to evaluation mode to the switch back, in checkpoints and under a
        merge, skip set and contexts are those of before, also where an exception has kept `end_step` from being
        called.

        Raises:
            ValueError: as `set_skipped_modules` and `anneal_context`; nothing is changed then.
        """
        names = self._checked_skip_set(names)
        self.end_step()
        self.anneal_context(share)
        self._step = self._active_name, names
        self._put_step_in_force(True)

    def end_step(self) -> None:
        """Ends what `begin_step` has begun, if anything."""
        if self._step is not None:
            for adapter in self._put_step_in_force(False):
                adapter.anneal(0.0)
            self._step = None

    def _put_step_in_force(self, in_force: bool) -> list[RoutedAdapter]:
        adapter_name, names = self._step
        for candidate in self._candidates.values():
            candidate.drawn = {adapter_name: candidate.name in names} if in_force else {}
        held = [layer.adapters for layer in self._adapted_layers()]
        adapters = [adapters[adapter_name] for adapters in held if adapter_name in adapters]
        for adapter in adapters:
            adapter.is_annealing_paused = not in_force
        return adapters

    def train(self, mode: bool = True) -> "EASModel":
        """As of `nn.Module`; see `begin_step`."""
        super().train(mode)
        if self._step is not None:
            self._put_step_in_force(mode)
        return self


def _mha_of(path: str, mhas: Targets) -> str:
    """The MHA that weights at `path` belong to, if that is an FFN: each of its wrappers stands for one MHA."""
    ffn, *inside = path.split(".base_layer")
    behind = [mha for mha, (block, row) in mhas.items() if join(block, row.ffn) == ffn]
    return behind[-1 - len(inside)] if len(inside) < len(behind) else path


def _wrapper_of(candidate: Candidate, layer: nn.Module) -> EASLayer | None:
    """The wrapper among `layer` and those inside it that is `candidate`'s, or None."""
    while isinstance(layer, EASLayer):
        if layer.candidate is candidate:
            return layer
        layer = layer.base_layer
    return None
