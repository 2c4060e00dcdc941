"""What a merge deletes, adds and keeps, as the merged model's config records it; see `merged.apply_record`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .adapter import RoutedAdapter
from .layer import AdaptedLayer, MHALayer
from .merged import FORMAT, relative_name


def record_of_fold(model: nn.Module, layers: Iterable[AdaptedLayer], adapter_name: str) -> dict[str, Any]:
    """The record of a merge that folds the adapter `adapter_name` with its running context."""
    record: dict[str, Any] = {"format": FORMAT, "context": "running", "skipped": {}, "biases": []}
    for layer in layers:
        _record_skipped(record, model, layer, adapter_name)
        if layer.used_adapter(adapter_name) is not None:
            for path, projection in layer.projections.items():
                folded = layer.fold_records.get(path)
                had_bias = folded.had_bias if folded else projection.bias is not None
                if not had_bias:
                    record["biases"].append(relative_name(model, f"{layer.candidate.block}.{path}"))
    return record


def record_with_adapters(
    model: nn.Module, layers: Iterable[AdaptedLayer], adapter_name: str, answer_in_input: bool
) -> tuple[dict[str, Any], dict[str, RoutedAdapter]]:
    """The record of a merge that keeps the adapters for each prompt's own context, and these, by module name."""
    record: dict[str, Any] = {
        **{"format": FORMAT, "context": "prompt", "skipped": {}, "biases": [], "adapters": {}},
        "answer_in_input": answer_in_input,
    }
    kept = {}
    for layer in layers:
        _record_skipped(record, model, layer, adapter_name)
        adapter = layer.used_adapter(adapter_name)
        if adapter is None:
            continue
        candidate, row = layer.candidate, layer.candidate.architecture
        path = (row.core or row.mha) if isinstance(layer, MHALayer) else row.ffn
        name = relative_name(model, f"{candidate.block}.{path}")
        weight = next(iter(layer.projections.values())).weight
        kept[name] = adapter.to(weight.device, weight.dtype)
        record["adapters"][name] = {
            "skipped_mha": None if isinstance(layer, MHALayer) else relative_name(model, candidate.name),
            "child": row.ffn,
            "layer_idx": candidate.layer_idx,
            "of_text": row.kind != "vision",
            "shape": {
                "d": adapter.token_down.in_features,
                "r": adapter.token_down.out_features,
                "groups": adapter.up[0].groups,
                "scale": adapter.scale,
                "router_temperature": adapter.router_temperature,
            },
        }
    return record, kept


def _record_skipped(record: dict[str, Any], model: nn.Module, layer: AdaptedLayer, adapter_name: str) -> None:
    """Enters the MHA of `layer` into `record` if the adapter skips it."""
    candidate, row = layer.candidate, layer.candidate.architecture
    if not isinstance(layer, MHALayer) or adapter_name not in candidate.skipped_by:
        return
    children = {name for name, _ in model.get_submodule(candidate.block).named_children()}
    record["skipped"][relative_name(model, candidate.name)] = {
        "layer_idx": candidate.layer_idx,
        "marker": next(path for path, _ in layer.base_layer.named_parameters()),
        "norms": [relative_name(model, f"{candidate.block}.{norm}") for norm in row.deleted_norms],
        "block": relative_name(model, candidate.block),
        "branch": list(row.branch) if row.branch and children <= {row.mha, *row.deleted_norms, *row.branch} else None,
        "kept_norm": row.kept_norm and row.kept_norm.removeprefix(f"{row.mha}."),
    }


def check_finite(adapters: dict[str, RoutedAdapter]) -> None:
    """Raises a ValueError if a weight of an adapter is NaN or infinite."""
    for name, adapter in adapters.items():
        if not all(bool(torch.isfinite(parameter).all()) for parameter in adapter.parameters()):
            raise ValueError(
                f"The EAS adapter of {name} holds NaN or infinity. Nothing was changed. Train again with a lower "
                "learning rate, or load an earlier checkpoint."
            )
