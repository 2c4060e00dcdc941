"""`fit_adapters`: adapters that begin as the best stand-in for their MHA, without a step of training."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..evaluation import call_with, check_reached, evaluation_mode, from_all_ranks
from ..layers import Candidate, EASLayer, FFNLayer, OutputLayer
from ..model import EASModel
from ..skippable import eas_of
from ..values import is_int
from .adapter_fit import AdapterFit, is_in_parts
from .recorder import BlockRecorder

# MHAs whose moments take more memory than this are fitted one group after another, each with passes of its own.
_MOST_BYTES = 4 << 30


@torch.no_grad()
def fit_adapters(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_tokens: int = 8192,
    progress_bar: bool = True,
) -> dict[str, float]:
    """Sets the adapters of skipped MHAs so that each block, without its MHA, gives most nearly what it gives with it.

    By linear regression in closed form, for each MHA by itself, on what the model computes with nothing skipped: PIA
    learns what the FFN would have read, from what it reads now; the output adapter then learns what the block still
    lacks, from what the FFN's output projection reads. No labels are needed, and nothing is back-propagated. Each
    group of MHAs takes two passes over the batches, without output adapters one. What the adapters were before is
    overwritten.

    The output adapter stays as it begins where a norm or a scale stands between the FFN's output projection and the
    residual stream (Gemma 2, OLMo 2, DINOv2), because what it adds there does not add up with the rest of the block.

    In a distributed run, call it on every rank, each with its own batches: the fit is of all of them.

    Args:
        model: what `get_peft_model(model, EASConfig(...))` returned. It is called in evaluation mode, which is
            switched back afterwards.
        batches: keyword arguments of the model; gone through several times.
        num_tokens: how many tokens, without padding, are enough; batches behind these are not read.

    Returns:
        by full name of each MHA that has such an adapter, the squared error that the fit leaves, as a share of what
        the block loses without the MHA: 0 where the adapters can stand for it in full, 1 where they are of no use.

    Raises:
        TypeError: for a model without EAS adapters; for batches that are no dictionaries.
        ValueError: for no batches, or an MHA that no token reached; while adapters are merged.
    """
    eas = eas_of(model, "fit_adapters", "it")
    if not isinstance(eas, EASModel):
        raise TypeError(
            f"fit_adapters fits what stands for attentions, of which a {type(eas).__name__} has none. Pass it the "
            "model that get_peft_model(model, EASConfig(...)) returns."
        )
    if not is_int(num_tokens, 1):
        raise ValueError(f"fit_adapters(num_tokens={num_tokens!r}): num_tokens must be an integer of at least 1.")

    run = partial(call_with, model, caller="fit_adapters")
    return fit_by_passes(model, eas, batches, run, num_tokens, progress_bar)


@torch.no_grad()
def fit_by_passes(
    model: nn.Module,
    eas: EASModel,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    num_tokens: int,
    progress_bar: bool = True,
) -> dict[str, float]:
    """As `fit_adapters`, where `run` passes a batch, of whatever kind, through the model."""
    if any(layer.merged for layer in eas.model.modules() if isinstance(layer, EASLayer)):
        raise ValueError("The adapters are merged, so they cannot be fitted. Call unmerge_adapter() first.")
    eas.end_step()
    fits = _fits_of(eas)
    if not fits or eas.active_config.scale == 0:  # which turns adapters off
        return {}
    batches = _Batches(batches, num_tokens)
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_without_cache(model))
        stack.enter_context(_nothing_skipped(eas))
        stack.enter_context(_begun_anew(fits))
        for group in _groups(fits):
            has_outputs = any(fit.output is not None for fit in group)
            for stage in ("pia", "output") if has_outputs else ("pia",):
                _gather(eas.model, group, stage, batches, run, progress_bar)
                for fit in group:
                    fit.solve(stage)
    eas.active_config.fit_errors = {fit.candidate.name: fit.left_over for fit in fits}
    return dict(eas.active_config.fit_errors)


def begins_anew(eas: EASModel) -> bool:
    """Whether no adapter for a skipped MHA has been trained, or fitted, yet."""
    adapters = (one for fit in _fits_of(eas) for one in (fit.pia, fit.output) if one is not None)
    return not any(bool(parameter.any()) for adapter in adapters for parameter in adapter.up.parameters())


def _fits_of(eas: EASModel) -> list[AdapterFit]:
    """One for each MHA that the active adapter has a PIA for."""
    name = eas.active_adapters[0]
    by_mha: dict[Candidate, dict[type, nn.Module]] = {}
    for layer in eas.model.modules():
        if isinstance(layer, (FFNLayer, OutputLayer)) and name in layer.adapters:
            by_mha.setdefault(layer.candidate, {})[type(layer)] = layer.adapters[name]
    if any(is_in_parts(adapter) for adapters in by_mha.values() for adapter in adapters.values()):
        raise ValueError(
            "The adapters lie in shards on several ranks, which cannot be written from here (DeepSpeed's ZeRO-3, or "
            "FSDP1). Call fit_adapters before the model is distributed."
        )
    in_order = sorted(by_mha, key=lambda candidate: eas.candidates.index(candidate.name))
    return [AdapterFit(one, name, by_mha[one][FFNLayer], by_mha[one].get(OutputLayer)) for one in in_order]


def _groups(fits: list[AdapterFit]) -> Iterator[list[AdapterFit]]:
    """Fits whose moments fit into memory together."""
    group: list[AdapterFit] = []
    for fit in fits:
        if group and sum(one.bytes for one in group) + fit.bytes > _MOST_BYTES:
            yield group
            group = []
        group.append(fit)
    if group:
        yield group


class _Batches:
    """The first of the batches given, as many as hold `num_tokens` tokens. The first pass finds how many these are."""

    def __init__(self, given: Iterable[Any], num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._given = iter(given)
        self._read: list[Any] = []
        self._is_enough = False

    def __iter__(self) -> Iterator[Any]:
        yield from self._read
        while not self._is_enough:
            batch = next(self._given, None)
            if batch is None:
                self._is_enough = True
                return
            self._read.append(batch)
            yield batch

    def note(self, count: int, device: torch.device) -> None:
        """Ends the reading once the ranks have seen enough tokens, of which this one has seen `count`."""
        if not self._is_enough:
            self._is_enough = int(from_all_ranks(torch.tensor(count, device=device)).sum()) >= self.num_tokens


def _gather(
    model: nn.Module,
    group: list[AdapterFit],
    stage: str,
    batches: _Batches,
    run: Callable[[Any], Any],
    progress_bar: bool,
) -> None:
    """Lets `group` gather what its adapters of a stage are fitted to."""
    fit_of = {fit.candidate: fit for fit in group}
    blocks: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in fit_of:
        blocks.setdefault((candidate.block, candidate.architecture.ffn), []).append(candidate)
    recorders = [
        BlockRecorder(
            model.get_submodule(block),
            candidates,
            group[0].adapter_name,
            lambda candidate, *seen: fit_of[candidate].add(stage, *seen),
        )
        for (block, _), candidates in blocks.items()
    ]
    device = next(model.parameters()).device
    try:
        for batch in tqdm(batches, desc=f"EAS: fitting {stage} adapters", disable=not progress_bar):
            run(batch)
            batches.note(group[0].count, device)
    finally:
        for recorder in recorders:
            recorder.remove()
    check_reached({fit.candidate.name: fit.count for fit in group})


@contextmanager
def _begun_anew(fits: list[AdapterFit]) -> Iterator[None]:
    """Lets the adapters add nothing until they are fitted. After an error they are again what they were."""
    adapters = [adapter for fit in fits for adapter in (fit.pia, fit.output) if adapter is not None]
    before = [copy.deepcopy(adapter.state_dict()) for adapter in adapters]
    for parameter in (parameter for adapter in adapters for parameter in adapter.up.parameters()):
        parameter.zero_()
    try:
        yield
    except BaseException:
        for adapter, state in zip(adapters, before):
            adapter.load_state_dict(state)
        raise


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No KV cache meanwhile, in which a block that is called twice would enter its tokens twice."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    used = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in used:
        config.use_cache = False
    try:
        yield
    finally:
        for config in used:
            config.use_cache = True


@contextmanager
def _nothing_skipped(eas: EASModel) -> Iterator[None]:
    """Computes every MHA meanwhile, also where the skip set is fixed; no prompt is asked for, as no fit depends on
    one."""
    config = eas.active_config
    candidates = {layer.candidate for layer in eas.model.modules() if isinstance(layer, EASLayer)}
    before, context = {candidate: candidate.drawn for candidate in candidates}, config.context
    for candidate in candidates:
        candidate.drawn = {eas.active_adapters[0]: False}
    config.context = "running" if context == "prompt" else context
    try:
        yield
    finally:
        config.context = context
        for candidate, drawn in before.items():
            candidate.drawn = drawn
