"""Merging: what `EASModel` folds, in place and for good, and how a merged model's config records it.

See `runtime.record.apply_record` for what the record does to a model that is loaded.
"""

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import onload_layer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .architectures import join
from .folding.fold import shift_before
from .injection.checks import check_not_offloaded, check_whole
from .injection.trained_tokens import check_tokens, merge_tokens, unload_tokens
from .injection.tuner import InjectingTuner
from .layers import AdaptedLayer, MHALayer, RoutedLayer
from .reporting.provenance import origin
from .runtime.adapter import RoutedAdapter
from .runtime.forward import ADAPTER_NAME
from .runtime.merged import FOLDED_MARK, check_registered, turn_into_merged
from .runtime.record import FORMAT, relative_name


class MergingTuner(InjectingTuner):
    """The part of `EASModel` that merges adapters and unloads them."""

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds the active adapter into the weights in place; `unmerge_adapter` takes it out again.

        Raises:
            TypeError, ValueError: as `merge_and_unload`.
        """
        self._check_in_place()
        self.end_step()
        names = self._names_to_merge(adapter_names)
        if names != [self._active_name]:
            raise ValueError(
                f"merge_adapter folds the active adapter, which is {self._active_name!r}, not {names}. Call "
                f"set_adapter({names[0]!r}) first, or merge_and_unload(adapter_names={names})."
            )
        if any(layer.merged for layer in self._layers()):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self._check_merge(names, safe_merge, warn=True)
        check_tokens(self.model, names, safe_merge)
        self._check_merge_allowed()
        for layer in self._layers():
            with onload_layer(layer):
                layer.merge(adapter_names=names)
        merge_tokens(self.model, names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        context: Literal["running", "prompt"] | None = None,
    ) -> nn.Module:
        """Deletes the skipped MHAs, and folds the adapters into the weights in place.

        Quantised projections are dequantised, changed and quantised again, one at a time. Weights that no adapter
        stands in front of stay as they are.

        Args:
            safe_merge: whether to look for NaN and infinity first. adapter_names: the adapter to merge; default: the
                active one. Or several that skip the same MHAs: their changes are added up, all reading the same input.
            context: "running", the default, folds the adapters with their running context. That is exact if the
                context is frozen, or if there is none. "prompt", for an adapter with context="prompt", keeps the
                adapters in front of the projections, as two thin factors that are computed once for each prompt. That
                is exact for any batch. Adapters that read no context, `output_r` and `ffn_r`, are folded all the same.

        Raises:
            TypeError: for a projection that is sharded, of another kind, or quantised in a way that cannot be written
                back. ValueError: for a NaN; for adapter names or a context that do not fit; if everything is merged
                or unloaded already.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, context=context
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        context: str | None = None,
    ) -> nn.Module:
        self._check_in_place()
        self.end_step()
        record, kept = None, {}
        if merge:
            self._check_class()
            adapter_names = names = self._names_to_merge(adapter_names)
            name = names[0]
            self._check_context(names, context)
            check_tokens(self.model, names, safe_merge)
            self._warn_without_search(name)
            merged = {other for layer in self._layers() for other in layer.merged_adapters}
            if merged and merged != set(names):
                raise ValueError(
                    f"The adapter {', '.join(map(repr, names))} cannot be merged into weights that {sorted(merged)} "
                    "is merged into. Call unmerge_adapter() first."
                )
            facts = origin(self, name)
            for key in ("r", "attention_r", "output_r", "ffn_r", "trainable_parameters") if len(names) > 1 else ():
                facts[key] = sum(origin(self, other)[key] for other in names)
            if context == "prompt":
                layers = [layer for layer in self._adapted_layers() if isinstance(layer, RoutedLayer)]
                check_not_offloaded(layers)
                self._check_fold(names, safe_merge, [one for one in self._adapted_layers() if one not in layers])
                record, kept = record_with_adapters(self.model, self._adapted_layers(), name)
                record["answer_in_input"] = self.answer_in_input(name)
                if safe_merge:
                    check_finite(kept)
                for layer in layers:
                    layer.unmerge()
                    if name in layer.adapters:
                        del layer.adapters[name]  # so that there is nothing to fold
            else:
                self._check_merge(names, safe_merge, warn=context is None)
                record, kept = record_of_fold(self.model, self._adapted_layers(), names)
            record["origin"] = facts
        self._choose_trained_modules(names if merge else [])
        unload_tokens(self.model, names if merge else [])
        model = super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        self._prompt_hook.remove()
        if record is not None and any(record.get(key) for key in ("skipped", "biases", "adapters")):
            turn_into_merged(model, record, kept)
        elif record is not None:
            setattr(model.config, FOLDED_MARK, True)
        return model

    def _check_class(self) -> None:
        if not isinstance(self.model, PreTrainedModel):
            raise TypeError(
                f"merge_and_unload makes a transformers model one without the skipped attentions, but this base is a "
                f"{type(self.model).__name__}. Give the transformers model inside it to get_peft_model, or fold in "
                "place with merge_adapter()."
            )
        check_registered(type(self.model))

    def _choose_trained_modules(self, names: list[str]) -> None:
        """Lets PEFT leave the modules_to_save of the adapters `names` in the model, or without any the base's.

        Where several of them have one, it is the active adapter's, or the first's.
        """
        for wrapper in self.model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                own = [name for name in names if name in wrapper.modules_to_save]
                active = [name for name in own if name in self.active_adapters]
                wrapper.set_adapter((active or own)[:1])

    def _check_context(self, names: list[str], context: str | None) -> None:
        if context not in (None, "running", "prompt"):
            raise ValueError(f"context={context!r} was received. Merge with context='running' or context='prompt'.")
        if context == "prompt" and len(names) > 1:
            raise ValueError(
                f"context='prompt' keeps the adapters, of which one can stay, but adapter_names={names} was received. "
                "Name one, or merge with context='running'."
            )
        of_adapter = self.peft_config[names[0]].context
        if context == "prompt" and of_adapter != "prompt":
            has = "a frozen context" if of_adapter == "running" else "no context"
            raise ValueError(
                f"The adapter {names[0]!r} has {has} (context={of_adapter!r}), so there is nothing for a prompt to "
                "decide. Merge it with merge_and_unload() alone, which is exact."
            )

    def _warn_without_search(self, name: str) -> None:
        config = self.peft_config[name]
        if config.is_to_skip and config.skipped_modules is None and not self.skipped_modules:
            how_many = f"{config.num_skip} attentions" if config.num_skip else "attentions"
            warnings.warn(
                f"The EAS adapter {name!r} was to skip {how_many}, but none was chosen, so the merged model skips "
                "none. Train with callbacks=[EASCallback()], or name them with skipped_modules or "
                "fix_skipped_modules().",
                stacklevel=4,
            )

    def _check_in_place(self) -> None:
        if not any(self._layers()):
            raise ValueError(
                "This model's adapters are merged or unloaded already. Use the model that the first call returned."
            )

    def _names_to_merge(self, adapter_names: list[str] | None) -> list[str]:
        check_whole(self.model)
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [names] if isinstance(names, str) else list(names)
        skip_sets = [{mha for mha, one in self._candidates.items() if name in one.skipped_by} for name in names]
        is_known = bool(names) and set(names) <= set(self.peft_config) and len(set(names)) == len(names)
        if not is_known or any(skip_set != skip_sets[0] for skip_set in skip_sets):
            raise ValueError(
                f"EAS merges one adapter, or several that skip the same MHAs, but adapter_names={names} was received. "
                f"Adapters: {list(self.peft_config)}."
            )
        return names

    def _check_merge(self, names: list[str], finite: bool, warn: bool) -> None:
        of_prompt = [name for name in names if any(layer.uses_prompt(name) for layer in self._adapted_layers())]
        if warn and of_prompt:
            warnings.warn(
                f"The EAS adapter {', '.join(map(repr, of_prompt))} takes its context from each prompt "
                "(context='prompt'). Merging folds the running mean of the prompts in its place, so the merged "
                "model's outputs differ from this one's. Call freeze_context() before the last part of training "
                "(EASCallback does) for a merge that is exact, or merge_and_unload(context='prompt') for a model that "
                "keeps each prompt's own context.",
                stacklevel=2,
            )
        self._check_fold(names, finite, self._adapted_layers())

    def _check_fold(self, names: list[str], finite: bool, layers: Iterable[AdaptedLayer]) -> None:
        layers = [layer for layer in layers if not layer.merged]
        for layer in layers:
            layer.check_fold(names, finite)
        if any(layer.folds_into_quantised(names) for layer in layers):
            warnings.warn(
                f"The EAS adapter {', '.join(map(repr, names))} is folded into quantised weights, which are quantised "
                "anew: the merged model's outputs differ from this one's by about the error of the quantisation "
                "itself. For an exact merge call get_base_model().dequantize(dtype=torch.bfloat16) on this model "
                "first, where transformers can, or load the adapter on the base model without quantisation.",
                stacklevel=2,
            )


def record_of_fold(
    model: nn.Module, layers: Iterable[AdaptedLayer], adapter_names: list[str]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record of a merge that folds the adapters `adapter_names`; and the shifts that stay, by their FFN's name."""
    record: dict[str, Any] = {"format": FORMAT, "context": "running", "skipped": {}, "biases": [], "shifts": {}}
    shifts = {}
    for layer in layers:
        _record_skipped(record, model, layer, adapter_names[0])
        if not layer.used_adapters(adapter_names):
            continue
        if layer.has_experts:
            name = relative_name(model, join(layer.candidate.block, layer.candidate.architecture.ffn))
            shifts[name] = shift_before(layer.low_rank_map(adapter_names))
            record["shifts"][name] = len(shifts[name])
            continue
        _record_biases(record, model, layer)
    return record, shifts


def record_with_adapters(
    model: nn.Module, layers: Iterable[AdaptedLayer], adapter_name: str
) -> tuple[dict[str, Any], dict[str, RoutedAdapter]]:
    """The record of a merge that keeps the adapters for each prompt's own context, and these, by name of their MHA.

    Output adapters and those of kept MHAs' FFNs, which read no context, are folded.
    """
    record: dict[str, Any] = {"format": FORMAT, "context": "prompt", "skipped": {}, "biases": [], "adapters": {}}
    layers, kept = list(layers), {}
    attended = {layer.candidate: layer.attended for layer in layers if isinstance(layer, MHALayer)}
    for layer in layers:
        _record_skipped(record, model, layer, adapter_name)
        adapter = layer.used_adapter(adapter_name)
        if adapter is None:
            continue
        if not isinstance(layer, RoutedLayer):
            _record_biases(record, model, layer)
            continue
        candidate, row = layer.candidate, layer.candidate.architecture
        mha = relative_name(model, candidate.name)
        path = row.ffn if layer.stands_for_skipped else (row.core or row.mha)
        kept[mha] = adapter
        record["adapters"][mha] = {
            "block": relative_name(model, candidate.block),
            "name": f"{ADAPTER_NAME}_{row.mha.replace('.', '_')}",
            "module": relative_name(model, join(candidate.block, path)),
            "position": len(record["adapters"]),  # JSON is saved sorted by name
            "stands_for_skipped": layer.stands_for_skipped,
            "child": row.ffn,
            "layer_idx": candidate.layer_idx,
            "tokens": candidate.context_tokens,
            "attended": attended[candidate] and [list(part) if part else None for part in attended[candidate]],
            "shape": {
                "d": adapter.token_down.in_features,
                "r": adapter.token_down.out_features,
                "groups": adapter.up[0].groups,
                "scale": adapter.scale,
                "router_temperature": adapter.router_temperature,
                "paths": len(adapter.up),
            },
        }
    return record, kept


def _record_biases(record: dict[str, Any], model: nn.Module, layer: AdaptedLayer) -> None:
    """Enters the projections of `layer` into `record` that gain a bias by its fold."""
    for path, projection in layer.projections.items():
        folded = layer.fold_records.get(path)
        had_bias = folded.had_bias if folded else projection.bias is not None
        name = relative_name(model, join(layer.candidate.block, path))
        if not had_bias and name not in record["biases"]:
            record["biases"].append(name)


def _record_skipped(record: dict[str, Any], model: nn.Module, layer: AdaptedLayer, adapter_name: str) -> None:
    """Enters the MHA of `layer` into `record` if the adapter skips it."""
    candidate, row = layer.candidate, layer.candidate.architecture
    if not isinstance(layer, MHALayer) or adapter_name not in candidate.skipped_by:
        return
    children = {name for name, _ in model.get_submodule(candidate.block).named_children()}
    is_whole = row.branch is not None and children <= {row.mha, *row.deleted_norms, *row.branch}
    # What the MHA attends to is known where it is called, which a branch does not do.
    has_branch = is_whole and not (record["context"] == "prompt" and row.attends)
    record["skipped"][relative_name(model, candidate.name)] = {
        "layer_idx": candidate.layer_idx,
        "marker": next(path for path, _ in layer.base_layer.named_parameters()),
        "norms": [relative_name(model, join(candidate.block, norm)) for norm in row.deleted_norms],
        "block": relative_name(model, candidate.block),
        "branch": list(row.branch) if has_branch else None,
        "kept_norm": row.kept_norm and row.kept_norm.removeprefix(f"{row.mha}."),
        "returns": row.returns and list(row.returns),
    }


def check_finite(adapters: dict[str, RoutedAdapter]) -> None:
    """Raises a ValueError if a weight of an adapter is NaN or infinite."""
    for name, adapter in adapters.items():
        if not all(bool(torch.isfinite(parameter).all()) for parameter in adapter.parameters()):
            raise ValueError(
                f"The EAS adapter of {name} holds NaN or infinity. Nothing was changed. Train again with a lower "
                "learning rate, or load an earlier checkpoint."
            )
