"""What skipping each candidate saves, measured on the model in hand: time, and bytes of KV cache."""

import copy
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..injection.checks import sharded_parameter
from ..layers import MHALayer
from ..model import EASModel
from ..skippable import eas_of
from .timing import bare, layers_of, num_rounds, of_first_rank, skipped, time_attentions, time_pairs
from .workload import Workload, check_shapes

# Of a part's time as measured in the attention, and of a pass: limits for what a merge is taken to save.
LEAST_SCALE, MOST_SAVED = 0.5, 0.999


class Savings(NamedTuple):
    """What a model needs, and what skipping each candidate saves of it.

    Attributes:
        unit: "seconds" or "bytes". base: what the base model needs, with nothing skipped and without
            adapters, which a merge folds away. saved: by full name of the candidate, in the model's order.
    """

    unit: str
    base: float
    saved: dict[str, float]

    def left(self, names: Collection[str]) -> float:
        """The share of the base's need that is left if the candidates `names` are skipped."""
        return 1.0 - sum(self.saved[name] for name in names) / self.base

    def speedup(self, names: Collection[str]) -> float:
        """How many times as fast as the base the model is if the candidates `names` are skipped; of seconds."""
        left = self.left(names)
        return 1.0 / left if left > 0.0 else math.inf

    def for_speedup(self, speedup: float) -> float:
        """What has to be saved for a model `speedup` times as fast as the base; of seconds.

        Raises:
            ValueError: if skipping every candidate is not enough.
        """
        best = self.speedup(self.saved)
        if speedup > best:
            raise ValueError(
                f"A speedup of {speedup:g} was asked for, but without all {len(self.saved)} candidates the model is "
                f"{best:.3f} times as fast. Ask for at most that, or make more attentions candidates."
            )
        return self.base * (1.0 - 1.0 / speedup)

    def for_share(self, share: float) -> float:
        """What has to be saved to leave at most `share` of the base's need.

        Raises:
            ValueError: if skipping every candidate is not enough.
        """
        best = self.left(self.saved)
        if share < best - 1e-9:
            raise ValueError(
                f"At most {100 * share:g} % of the base's {self.unit} were asked for, but without all "
                f"{len(self.saved)} candidates {100 * best:.1f} % are left. Ask for no less than that, or make more "
                "attentions candidates."
            )
        return self.base * (1.0 - share)


class Speedup(NamedTuple):
    """How many times as fast as the base: median, lower and upper quartile over the rounds."""

    median: float
    low: float
    high: float


def measure_time(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int = 0,
) -> Savings:
    """Seconds that the base model takes at the given shapes, and how many of them each candidate's attention takes.

    That is one forward pass over the batch, and `new_tokens` decoding steps behind it, measured where the cache holds
    half of them. An attention's part is the time that is spent in it, and in the norms that are deleted with it; of a
    model's passes the median. Attentions that are alike, in kind, shapes and what they are given, are given the same
    time, their median, so that no choice between them follows from noise. What is saved beside, such as the sum with
    the residual, shows where the model runs without attentions: all parts are scaled to what that saves. Then
    base / (base − sum of the skipped) is how many times as fast as the base the merged model is.

    Adapters are disabled meanwhile, and nothing is changed. The model runs as it is: in the dtype of its weights or of
    the autocast around the call, not compiled. In a distributed run, call it on every rank; all get the first one's
    numbers.

    Args:
        model: what `get_peft_model(model, EASConfig(...))` returned; accelerate may have prepared it.
        batch: keyword arguments of the model.
        batch_size, prompt_tokens, new_tokens: see `Workload`.

    Raises:
        TypeError, ValueError: as `Workload`; for a model without EAS adapters, or with merged ones; if the batch
            reaches no candidate.
    """
    eas = _eas_model(model, "measure_time")
    work = Workload(eas.model, batch, batch_size, prompt_tokens, new_tokens, _entry(model, eas))
    with bare(model, eas):
        phases = [(1, time_attentions(eas, work.prefill))]
        if new_tokens:
            phases.append((new_tokens, time_attentions(eas, work.decoding())))
        # The first stays, as not every model runs without any.
        names = [name for name in eas.candidates if any(saved[name] for _, (_, saved) in phases)][1:]
        pairs = [pairs for _, pairs in _pairs(eas, work, names, new_tokens)] if names else []
    if not any(any(saved.values()) for _, (_, saved) in phases):
        raise ValueError(
            f"measure_time: none of the {len(eas.candidates)} candidates, such as {eas.candidates[0]}, is called for "
            f"a batch of {sorted(work.inputs)}. Give it all that the model attends to."
        )
    for (_, (total, saved)), own in zip(phases, pairs):
        part = sum(saved[name] for name in names)
        if part == 0.0:  # such as of an encoder's attentions, while a decoder goes on
            continue
        share = statistics.median(1.0 - without / whole for whole, without in own)
        scale = share * total / part
        # Noise must not make a part of less than nothing, or all parts more than the whole.
        scale = min(max(scale, LEAST_SCALE), MOST_SAVED * total / sum(saved.values()))
        saved.update({name: scale * seconds for name, seconds in saved.items()})
    base = sum(times * total for times, (total, _) in phases)
    sums = [sum(times * saved[name] for times, (_, saved) in phases) for name in eas.candidates]
    base, *sums = of_first_rank(eas, [base, *sums])
    return Savings("seconds", base, dict(zip(eas.candidates, sums)))


def count_kv_bytes(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int = 0,
) -> Savings:
    """Bytes of the base model's KV cache at the given shapes, and how many of them each candidate's entry takes.

    Found by one forward pass over the batch, whose cache tells what it would hold behind all tokens: of a sliding
    window no more than is kept, of a cross-attention the encoder's. An encoder's attention has no entry.

    Args:
        model, batch, batch_size, prompt_tokens, new_tokens: as of `measure_time`.

    Raises:
        TypeError, ValueError: as `Workload`; for a model without EAS adapters, with merged ones, or without a cache.
    """
    eas = _eas_model(model, "count_kv_bytes")
    check_shapes(batch_size, prompt_tokens, new_tokens)
    base = eas.model
    work = Workload(base, batch, new_tokens=new_tokens, entry=_entry(model, eas))
    if work.is_encoder_decoder:  # whose encoder decides how long the cross-attentions' entries are
        work = Workload(base, batch, None, prompt_tokens, new_tokens, work.entry)
    with bare(model, eas):
        cache = work.cache_of(work.prefill()) if work.generates else None
    if not isinstance(cache, Cache):
        raise ValueError(
            f"count_kv_bytes: {type(base).__name__} keeps no KV cache, so that there is nothing to save. Choose by "
            "time or by loss."
        )
    own, crossed = getattr(cache, "self_attention_cache", cache), getattr(cache, "cross_attention_cache", None)
    is_given = prompt_tokens is not None and not work.is_encoder_decoder
    length = (prompt_tokens if is_given else own.get_seq_length()) + new_tokens
    own_bytes = [_bytes(slot, batch_size, length) for slot in own.layers]
    cross_bytes = [] if crossed is None else [_bytes(slot, batch_size, None) for slot in crossed.layers]
    saved = {}
    for layer in layers_of(eas, MHALayer):
        candidate = layer.candidate
        slot = layer.cross_slot if candidate.architecture.is_cross else candidate.layer_idx
        entries = cross_bytes if candidate.architecture.is_cross else own_bytes
        has_slot = candidate.architecture.kind == "decoder" and slot is not None
        saved[candidate.name] = float(entries[slot]) if has_slot else 0.0
    total, *counts = of_first_rank(
        eas, [float(sum(own_bytes) + sum(cross_bytes)), *(saved[name] for name in eas.candidates)]
    )
    return Savings("bytes", total, dict(zip(eas.candidates, counts)))


def measured_speedup(
    model: nn.Module,
    names: Sequence[str],
    batch: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int = 0,
) -> Speedup:
    """How many times as fast as its base the model is with the candidates `names` skipped, as a merge leaves them out.

    Nothing is merged: the base and itself without those attentions take turns, and each round's two times are
    compared. See `measure_time` for the rest.

    Raises:
        TypeError, ValueError: as `measure_time`; for a name that is no candidate.
    """
    eas = _eas_model(model, "measured_speedup")
    if unknown := [name for name in names if name not in eas.candidates]:
        raise ValueError(f"measured_speedup: {unknown[0]!r} is no candidate. Candidates: {eas.candidates}.")
    work = Workload(eas.model, batch, batch_size, prompt_tokens, new_tokens, _entry(model, eas))
    with bare(model, eas):
        times, pairs_of = zip(*_pairs(eas, work, names, new_tokens))
    speedups = [
        sum(n * pair[0] for n, pair in zip(times, pairs)) / sum(n * pair[1] for n, pair in zip(times, pairs))
        for pairs in zip(*pairs_of)
    ]
    low, median, high = statistics.quantiles(speedups, n=4, method="inclusive")
    return Speedup(*of_first_rank(eas, [median, low, high]))


def _pairs(
    eas: EASModel, work: Workload, names: Sequence[str], new_tokens: int
) -> list[tuple[int, list[tuple[float, float]]]]:
    """By phase, the prompt's pass and decoding: how often it is run, and seconds of the base and without `names`."""
    phases = [(1, work.prefill, work.prefill)]
    if new_tokens:
        with skipped(eas, names):
            skipped_step = work.decoding()
        phases.append((new_tokens, work.decoding(), skipped_step))
    rounds = num_rounds(eas, work.prefill)
    return [(times, time_pairs(eas, names, rounds, *runs)) for times, *runs in phases]


def _eas_model(model: nn.Module, caller: str) -> EASModel:
    eas = eas_of(model, caller, "it")
    if not isinstance(eas, EASModel):
        raise TypeError(
            f"{caller} looks at attentions, of which a {type(eas).__name__} tells nothing. Pass it the model that "
            "get_peft_model(model, EASConfig(...)) returns, or search for num_skip attentions."
        )
    if any(layer.merged for layer in layers_of(eas, MHALayer)):
        raise ValueError(f"{caller} looks at the base, but the adapters are merged. Call unmerge_adapter() first.")
    return eas


def _entry(model: nn.Module, eas: EASModel) -> nn.Module:
    """What to call: the base alone, unless it is sharded, and its weights are gathered where the whole is entered."""
    return eas.model if sharded_parameter(eas) is None else model


def _bytes(slot: Any, rows: int | None, length: int | None) -> int:
    """Bytes of the keys and values of a slot of the KV cache, if it held `length` tokens of `rows` sequences.

    None leaves them as they are.
    """
    keys, values = slot.keys, slot.values
    if keys is None or keys.numel() == 0:
        return 0
    if length is not None:
        slot = copy.copy(slot)
        slot.is_initialized = False
        if hasattr(slot, "cumulative_length"):
            slot.cumulative_length = 0
        shapes = ((*tensor.shape[:-2], length, tensor.shape[-1]) for tensor in (keys, values))
        # It takes the tokens, and keeps what it keeps, without any memory.
        slot.update(*(torch.empty(shape, dtype=keys.dtype, device="meta") for shape in shapes))
        keys, values = slot.keys, slot.values
    size = sum(tensor.numel() * tensor.element_size() for tensor in (keys, values))
    return size if rows is None else size // len(keys) * rows
