"""The part of `EASModel` that PEFT calls to put adapters into a model: checks, wrappers, and the weights' names."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..architectures import at_path, join, rows_of
from ..config import EASConfig
from ..layers import (
    AdaptedLayer,
    Candidate,
    EASLayer,
    FFNLayer,
    KeptFFNLayer,
    LowRankAdapter,
    MHALayer,
    NormLayer,
    OutputLayer,
)
from ..runtime.adapter import RoutedAdapter
from ..runtime.prompt_hook import PromptHook
from ..runtime.skipped import slot_of
from .checks import (
    check_base,
    check_other_methods,
    check_skip_fields,
    check_state_dict,
    output_rank,
    warn_of_untrained_head,
)
from .targets import Targets, block_width, find_targets, matches, prompt_root, skippable_mhas
from .trained_tokens import check_trained_tokens, complete_wrappers, copy_tokens

# Between the names of a wrapper and of what it wraps.
_INSIDE = ".base_layer"
# Tasks whose labels are not tokens of the input, so that they do not tell prompt from answer.
_TASKS_WITHOUT_ANSWER = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class InjectingTuner(BaseTuner):
    """The part of `EASModel` that injects adapters."""

    prefix = "eas_"
    tuner_layer_cls = EASLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # Whether a search trains the model that will freeze the context.
    awaits_freeze = False

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_other_methods(model)  # PEFT enters the config into that of a PeftModel, before it injects
        super().__init__(model, *args, **kwargs)

    def _layers(self) -> Iterator[EASLayer]:
        """All wrappers, in the model's order. Each step of a search asks for them."""
        waiting, seen = [self.model], set()
        while waiting:
            module = waiting.pop()
            if module in seen or isinstance(module, (RoutedAdapter, LowRankAdapter)):  # in which there are none
                continue
            seen.add(module)
            if isinstance(module, EASLayer):
                yield module
            waiting.extend(part for part in reversed(module._modules.values()) if part is not None)

    def _adapted_layers(self) -> Iterator[AdaptedLayer]:
        return (layer for layer in self._layers() if isinstance(layer, AdaptedLayer))

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
        injected = (item for layer in self._layers() for item in layer.candidate.configs.items())
        taken = [*self.peft_config.items(), *injected]
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
        present = {layer.candidate.name: layer.candidate for layer in self._layers()}
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        self._check_name_is_free(name, peft_config, present)
        self._check_wrappers(peft_config, targets)
        check_trained_tokens(peft_config, model)
        warn_of_untrained_head(peft_config, model)
        peft_config.output_r = output_rank(peft_config, model, targets)
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
            self.register_load_state_dict_pre_hook(InjectingTuner._refuse_unfit_weights)
        self._newest_adapter, self._prompt_hook.was_used = name, False
        order = list(skippable_mhas(model))
        for block_name in dict.fromkeys(block for block, _ in targets.values()):
            block = model.get_submodule(block_name)
            for row in rows_of(block):  # also one that is no target: its adapters' place is among the others'
                mha = join(block_name, row.mha)
                if mha in order and mha not in self._candidates:
                    layer_idx = slot_of(block.get_submodule(row.mha))
                    self._candidates[mha] = Candidate(mha, block_name, row, layer_idx, self._prompt_hook.current)
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

    def _check_wrappers(self, config: EASConfig, targets: Targets) -> None:
        """Raises where other weights would change their names, which tell how many wrappers are around an FFN."""
        layers = [layer for layer in self._layers() if not layer.candidate.architecture.experts]
        has_inner = any(isinstance(layer, KeptFFNLayer) for layer in layers)
        if layers and has_inner != bool(config.ffn_r) and not all(row.experts for _, row in targets.values()):
            raise ValueError(
                f"ffn_r={config.ffn_r} was received, but the model has been given an EAS adapter "
                f"{'with' if has_inner else 'without'} ffn_r. All adapters of one model have an ffn_r above 0, or "
                "none has, because it changes the names of other weights. Change ffn_r, or take all adapters out "
                "with unload() first."
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
                if peft_config.ffn_r and not row.experts:
                    wrappers.append((other, row.ffn, KeptFFNLayer))
                if peft_config.output_r and row.output_projection is not None:
                    wrappers.append((other, row.output_projection, OutputLayer))
        for owner, path, wrapper in wrappers:
            parent, child = _place(block, path)
            layer = _wrapper_of(owner, getattr(parent, child), wrapper)
            while layer is None and wrapper is KeptFFNLayer and isinstance(getattr(parent, child), FFNLayer):
                parent, child = getattr(parent, child), "base_layer"
            if layer is None:
                layer = wrapper(getattr(parent, child), owner)
                layer.set_adapter(self.active_adapters)
                setattr(parent, child, layer)
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

    # --- what the prompt's hook asks ---------------------------------------------------------------------------------

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


def _mha_of(path: str, mhas: Targets) -> str:
    """The MHA that weights at `path` belong to, if that is an FFN or its output projection.

    Each wrapper of these stands for one MHA. An FFN has an `FFNLayer` for each, and then a `KeptFFNLayer` for each, or
    for none (`_check_wrappers`).
    """
    module, depth = path, 0
    while module.endswith(_INSIDE):
        module, depth = module.removesuffix(_INSIDE), depth + 1
    module = module.replace(_INSIDE, "")  # of the FFN around its output projection
    behind = [
        mha
        for mha, (block, row) in mhas.items()
        if module in [join(block, part) for part in (row.ffn, row.output_projection) if part is not None]
    ]
    return behind[-1 - depth % len(behind)] if behind else path


def _place(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module of the base that has what is at `path` as a child, and the child's name."""
    parent_path, _, child = path.rpartition(".")
    parent = at_path(block, parent_path)
    while isinstance(parent, EASLayer):
        parent = parent.base_layer
    return parent, child


def _wrapper_of(candidate: Candidate, layer: nn.Module, kind: type[EASLayer]) -> EASLayer | None:
    """The wrapper of a kind among `layer` and those inside it that is `candidate`'s, or None."""
    while isinstance(layer, EASLayer):
        if layer.candidate is candidate and isinstance(layer, kind):
            return layer
        layer = layer.base_layer
    return None
