"""`eas_summary`: the state, the score and the worth of each MHA of a model, as a table to read."""

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import Architecture, at_path, find_mhas, join
from ..folding.fold import features
from ..injection.targets import block_width, matches
from ..layers import AdaptedLayer, FFNLayer, KeptFFNLayer, MHALayer, OutputLayer
from ..runtime.record import relative_name
from ..runtime.skipped import SkippedMHA
from ..values import is_int
from .image_tokens import image_tokens
from .provenance import added_parameters, is_same_mha, size_of
from .search_result import SearchResult
from .summary_table import Summary, SummaryRow

_CONTEXT_LENGTH = 1024


def eas_summary(model: nn.Module, context_length: int | None = None) -> Summary:
    """What EAS does to each MHA of `model` and what that saves; `print(eas_summary(model))` shows a table.

    FLOPs are those of a forward pass, per token, where a multiplication and an addition count as two. After Chowdhery
    et al., PaLM (arXiv 2204.02311, appendix B; a forward pass is a third of its 6 N + 12 L H Q T), an MHA needs

        2 × (weights of its projections) + 4 × (heads × width of a head) × (tokens attended to)

    where the second term is the products of queries with keys and of attention weights with values. The whole model
    needs 2 × (weights of its linear layers; of a mixture's experts, only those that a token is given to) and the
    second term of every MHA that the table of architectures knows. A tower without a candidate is left out, because
    it sees other tokens.

    Args:
        model: a model with EAS adapters, of which the active one counts, or a merged one.
        context_length: how many tokens a token attends to: those before it in a decoder, all in an encoder, patches
            in a vision model. An MHA with a sliding window attends to no more than that. Default: in a vision tower
            whose config names image_size and patch_size the tokens of such an image, else 1,024.

    Raises:
        TypeError: for a model without EAS. ValueError: for a context_length below 1.
    """
    if context_length is not None and not is_int(context_length, 1):
        raise ValueError(
            f"eas_summary(context_length={context_length!r}): context_length must be an integer of at least 1, or "
            "None for the model's own."
        )
    inner = model.base_model if isinstance(model, PeftModel) else model
    inner = inner.model if isinstance(inner, BaseTuner) else inner
    if any(isinstance(module, MHALayer) for module in inner.modules()):
        return _of_unmerged(inner, context_length)
    if isinstance(inner, PreTrainedModel) and isinstance(getattr(inner.config, "eas", None), dict):
        return _of_merged(inner, context_length)
    raise TypeError(
        f"eas_summary was given a {type(model).__name__} without EAS adapters and without deleted MHAs. Give it the "
        "model that get_peft_model(model, EASConfig(...)) or merge_and_unload() returns."
    )


class _MHA:
    """An MHA as it is in a base model, and what it is worth there.

    Args:
        added: ids of the parameters that are not the base's.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        block_name: str,
        row: Architecture,
        context_length: int | None,
        added: set[int],
        output_r: int | None,
        ffn_r: int | None,
    ) -> None:
        block = model.get_submodule(block_name)
        own = image_tokens(model, block_name) if row.kind == "vision" else None
        self.image_tokens = own if context_length is None else None
        self.context_length = context_length or own or _CONTEXT_LENGTH
        self.name, self.block_name, self.kind = name, block_name, row.kind
        self.ffn_name = join(block_name, row.ffn)
        has_output = bool(output_r) and row.output_projection is not None
        self.has_ffn_adapter = bool(ffn_r) and not row.experts
        # What grows where PIA is folded.
        self.ffn_places = [self.ffn_name] if row.experts else [join(block_name, path) for path in row.ffn_projections]
        self.output_name = join(block_name, row.output_projection) if has_output else None
        # A wrapper lets the attributes of what it wraps shine through.
        self.mha, self.ffn = at_path(block, row.mha), at_path(block, row.ffn)
        self.parameters = self.deleted_parameters = self.product_flops = self.flops = 0
        # By the wrapper that gives them: the module they are in, and how many.
        self.new_biases: dict[type[AdaptedLayer], tuple[str | None, int]] = {}
        self.more_biases = 0  # if it were skipped
        self.is_deleted = isinstance(getattr(self.mha, "base_layer", self.mha), SkippedMHA)
        if self.is_deleted:
            return
        inputs = [at_path(block, path) for path in row.mha_projections]
        # Experts have no biases; one vector in front of them takes their place.
        ffn_inputs = () if row.experts else (at_path(block, path) for path in row.ffn_projections)
        before = block_width(model, block_name, row) if row.experts else _missing_biases(ffn_inputs, added)
        beside = _missing_biases([at_path(block, row.output_projection)], added) if has_output else 0
        self.new_biases = {
            MHALayer: (self.name, _missing_biases(inputs, added)),
            FFNLayer: (self.ffn_name, before),
            KeptFFNLayer: (self.ffn_name, before),
            OutputLayer: (self.output_name, beside),
        }
        self.more_biases = beside if self.has_ffn_adapter else before + beside
        kept = size_of(at_path(block, row.kept_norm), added) if row.kept_norm else 0
        self.parameters = size_of(self.mha, added) - kept
        norms = (at_path(block, path) for path in row.deleted_norms)
        self.deleted_parameters = self.parameters + sum(size_of(norm, added) for norm in norms)
        self.product_flops = self._product_flops(inputs)
        self.flops = 2 * _linear_weights(self.mha) + self.product_flops

    def _product_flops(self, inputs: list[nn.Module]) -> int:
        # The output projection reads all heads; the queries' may be one with keys and values.
        others = [m for m in self.mha.modules() if _is_linear(m) and all(m is not one for one in inputs)]
        width = features(others[-1])[0] if others else features(inputs[0])[1]
        window = getattr(self.mha, "sliding_window", at_path(self.mha, "config.sliding_window"))
        return 4 * width * min(self.context_length, window or self.context_length)

    def summarized(
        self, state: str, score: float | None, adapter_parameters: int = 0, added: int = 0, added_flops: int = 0
    ) -> SummaryRow:
        """Its row, where `added` and `added_flops` are what the adapter in use leaves in the merged model."""
        common = (self.name, state, score, self.parameters, adapter_parameters)
        if state in ("skipped", "deleted"):
            return SummaryRow(*common, self.deleted_parameters - added, self.flops - added_flops)
        return SummaryRow(*common, self.deleted_parameters - self.more_biases, self.flops, added, added_flops)


def _of_unmerged(model: nn.Module, context_length: int | None) -> Summary:
    layers = {
        (type(layer), layer.candidate.name): layer for layer in model.modules() if isinstance(layer, AdaptedLayer)
    }
    adapter_name = next(iter(layers.values())).active_adapters[0]
    config = next(filter(None, (layer.candidate.configs.get(adapter_name) for layer in layers.values())))
    scores, added = config.current_scores or {}, added_parameters(model)
    parts = [_MHA(model, *found, context_length, added, config.output_r, config.ffn_r) for found in find_mhas(model)]
    rows: list[SummaryRow] = []
    counted: set[str | None] = set()  # one FFN may stand behind several MHAs
    for part in parts:
        score, mha = scores.get(part.name), layers.get((MHALayer, part.name))
        if part.is_deleted:
            rows.append(part.summarized("deleted", score))
        elif mha is None or adapter_name not in mha.candidate.configs:
            is_excluded = matches(config.exclude_modules, part.name)
            rows.append(part.summarized("excluded" if is_excluded else "no target", score))
        else:
            is_skipped = adapter_name in mha.candidate.skipped_by
            is_never_skipped = adapter_name in mha.candidate.kept_by
            state = "skipped" if is_skipped else "never skipped" if is_never_skipped else "kept"
            adapters, biases = [], 0
            for kind, (place, number) in part.new_biases.items():
                layer = layers.get((kind, part.name))
                adapter = layer and layer.used_adapter(adapter_name)
                if adapter is not None:
                    adapters.append(adapter)
                    biases += 0 if place in counted else number
                    counted.add(place)
            rows.append(part.summarized(state, score, sum(map(size_of, adapters)), biases))
    rows = [replace(row, fit_error=(config.fit_errors or {}).get(row.name)) for row in rows]
    search = SearchResult.of(getattr(config, "search", None))
    return _summary(model, rows, parts, size_of(model, added), search)


def _of_merged(model: PreTrainedModel, context_length: int | None) -> Summary:
    record = model.config.eas
    facts, base = record.get("origin") or {}, _before_merge(model)
    scores = facts.get("scores") or {}
    ranks = facts.get("output_r"), facts.get("ffn_r")
    parts = [_MHA(base, *found, context_length, set(), *ranks) for found in find_mhas(base)]
    rows: list[SummaryRow] = []
    compared: set[str] = set()
    for part in parts:
        name = relative_name(base, part.name)
        candidate = next((c for c in facts.get("candidates") or [part.name] if is_same_mha(c, name)), None)
        is_deleted = name in record["skipped"]
        is_never_skipped = any(is_same_mha(kept, name) for kept in facts.get("kept") or ())
        if is_deleted:
            state = "deleted"
        elif candidate is not None:
            state = "kept"
        else:
            state = "never skipped" if is_never_skipped else "no target"
        prefix = part.name.removesuffix(name)
        adapter_size = adapter_flops = 0
        if name in record.get("adapters", {}):
            entry = record["adapters"][name]
            adapter = model.get_submodule(prefix + join(entry["block"], entry["name"]))
            # Once the prompt is known, z + left (C z) + shift: two products with d × r weights.
            adapter_size, adapter_flops = size_of(adapter), 2 * 2 * adapter.token_down.weight.numel()
        paths = [*part.ffn_places, part.output_name] if is_deleted else [part.name]
        if part.has_ffn_adapter and state in ("kept", "never skipped"):
            paths += part.ffn_places
        grown = 0
        for path in paths:
            if path is not None and path not in compared:  # one FFN may stand behind several MHAs
                grown += size_of(model.get_submodule(path)) - size_of(base.get_submodule(path))
                compared.add(path)
        row = part.summarized(state, scores.get(candidate), adapter_size, adapter_size + grown, adapter_flops)
        rows.append(replace(row, fit_error=(facts.get("fit_errors") or {}).get(candidate)))
    return _summary(base, rows, parts, size_of(base), search=SearchResult.of(facts.get("search")))


def _summary(
    model: nn.Module,
    rows: list[SummaryRow],
    parts: list[_MHA],
    size: int,
    search: SearchResult | None = None,
) -> Summary:
    # A vision tower's tokens count for the whole only where nothing else has MHAs.
    length = max((part.context_length for part in parts if part.image_tokens is None), default=None)
    images = [part.image_tokens for part in parts if part.image_tokens is not None]
    in_image = images[0] if images else None
    length = length or in_image or _CONTEXT_LENGTH
    return Summary(rows, size, _flops(model, parts, rows), length, in_image, search)


def _before_merge(model: PreTrainedModel) -> PreTrainedModel:
    """The base of a merged model, without values."""
    stock = next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not hasattr(c, "_auto_map"))
    config = copy.deepcopy(model.config)
    config.__class__ = stock.config_class  # some rows of the table ask for the model's type
    config.__dict__.pop("model_type", None)
    with torch.device("meta"):
        return stock(config)


def _flops(model: nn.Module, parts: list[_MHA], rows: list[SummaryRow]) -> int:
    """FLOPs per token of the whole model without its adapters, but for towers without a candidate."""
    candidates = {part.kind for part, row in zip(parts, rows) if row.state in ("skipped", "kept", "deleted")}
    kinds = candidates or {part.kind for part, row in zip(parts, rows) if row.state == "never skipped"}
    other_towers = tuple(f"{part.block_name}." for part in parts if part.kind not in kinds)
    products = sum(part.product_flops for part in parts if part.kind in kinds)
    return 2 * _linear_weights(model, other_towers) + products


def _linear_weights(model: nn.Module, left_out: tuple[str, ...] = ()) -> int:
    """How many weights a token is multiplied with in layers whose names do not start with one of `left_out`."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    number = 0
    for name, module in model.named_modules():
        if f"{name}.".startswith(left_out) or ".modules_to_save." in name:  # a copy of what is counted already
            continue
        if _is_linear(module):
            number += math.prod(features(module))  # a quantised weight has another shape
        elif experts_per_token is not None:  # of all experts in one tensor
            stacked = (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3)
            number += sum(experts_per_token * math.prod(parameter.shape[1:]) for parameter in stacked)
    return number


def _missing_biases(projections: Iterable[nn.Module], added: set[int]) -> int:
    """How many numbers the fold adds to projections: a bias where the base has none."""
    without = (p for p in projections if p.bias is None or id(p.bias) in added)
    return sum(features(projection)[1] for projection in without)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
