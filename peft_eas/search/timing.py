"""Timed passes of a base model that adapters stand in: of the whole, of each attention, and without some of them."""

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..architectures import at_path
from ..evaluation import evaluation_mode, preserved_random_state
from ..layers import MHALayer, NormLayer
from ..model import EASModel
from ..runtime.skipped import SkippedMHA

# For how long each kind of pass is repeated, but at least and at most so often.
_SECONDS, _LEAST, _MOST = 2.0, 5, 25


def layers_of(eas: EASModel, *kinds: type[nn.Module]) -> list[Any]:
    """The candidates' wrappers of these kinds."""
    names = set(eas.candidates)
    return [layer for layer in eas.modules() if isinstance(layer, kinds) and layer.candidate.name in names]


@contextmanager
def bare(model: nn.Module, eas: EASModel) -> Iterator[None]:
    """The base model as if it had no adapters, in evaluation mode; afterwards all is as it was.

    PEFT's own `disable_adapter` would switch on the gradients of adapters that are frozen.
    """
    switches = [(part, part._disable_adapters) for part in eas.modules() if "_disable_adapters" in vars(part)]
    # A compiler would compile anew around each hook.
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        preserved_random_state(0),
        evaluation_mode(model),
    ):
        try:
            for part, _ in switches:
                part._disable_adapters = True
            yield
        finally:
            for part, is_disabled in switches:
                part._disable_adapters = is_disabled


@contextmanager
def skipped(eas: EASModel, names: Collection[str]) -> Iterator[None]:
    """Within `bare`: the attentions `names` are left out as a merged model leaves them out."""
    layers = [layer for layer in layers_of(eas, MHALayer, NormLayer) if layer.candidate.name in names]
    try:
        for layer in layers:
            layer.forward = _stub(layer) if isinstance(layer, MHALayer) else _identity
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _stub(layer: MHALayer) -> Callable[..., Any]:
    row, path = layer.candidate.architecture, _kept_norm_path(layer)
    norm = None if path is None else at_path(layer.base_layer, path)
    return SkippedMHA(layer.candidate.layer_idx, "marker", path, norm, row.returns, layer.cross_slot).forward


def _identity(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def _kept_norm_path(layer: MHALayer) -> str | None:
    """Of the norm inside the MHA that a skipped block still applies."""
    row = layer.candidate.architecture
    return row.kept_norm and row.kept_norm.removeprefix(f"{row.mha}.")


def of_first_rank(eas: EASModel, numbers: list[float]) -> list[float]:
    """The first rank's numbers on all ranks."""
    if not torch.distributed.is_initialized():
        return numbers
    sent = torch.tensor(numbers, dtype=torch.float64, device=next(eas.parameters()).device)
    torch.distributed.broadcast(sent, src=0)
    return sent.tolist()


def _time(eas: EASModel, run: Callable[[], Any]) -> float:
    """Seconds of a pass."""
    devices = {parameter.device for parameter in eas.parameters()}
    _synchronize(devices)
    start = time.perf_counter()
    run()
    _synchronize(devices)
    return time.perf_counter() - start


def _synchronize(devices: set[torch.device]) -> None:
    """Waits until the accelerators have done what they were asked for; touches no other than those of the model."""
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)
    if torch.cuda.is_initialized():  # whose weights may lie elsewhere
        torch.cuda.synchronize()


def num_rounds(eas: EASModel, run: Callable[[], Any]) -> int:
    """How often to repeat a pass, which is run twice for it: the first time warms up."""
    run()
    (seconds,) = of_first_rank(eas, [_time(eas, run)])
    return min(_MOST, max(_LEAST, int(_SECONDS / seconds)))


def time_attentions(eas: EASModel, run: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """Seconds of a pass, and of each candidate's attention in it."""
    rounds = num_rounds(eas, run)
    totals: list[float] = []
    shares: dict[Any, list[float]] = {}  # by what makes attentions alike
    watch = _Watch(eas)
    try:
        for _ in range(rounds):
            totals.append(_time(eas, run))
            for name, seconds in watch.read().items():
                # In shares of the same pass, slow moments of the machine tell less.
                shares.setdefault(watch.kinds[name], []).append(seconds / totals[-1])
    finally:
        watch.remove()
    total = statistics.median(totals)
    of_kind = {kind: total * max(0.0, statistics.median(values)) for kind, values in shares.items()}
    return total, {name: of_kind.get(watch.kinds.get(name), 0.0) for name in eas.candidates}


def time_pairs(
    eas: EASModel, names: Collection[str], rounds: int, run: Callable[[], Any], run_skipped: Callable[[], Any]
) -> list[tuple[float, float]]:
    """Seconds of pairs of passes, of the base and with `names` skipped; the first pair warms up."""
    pairs = []
    for _ in range(rounds + 1):
        seconds = _time(eas, run)
        with skipped(eas, names):
            pairs.append((seconds, _time(eas, run_skipped)))
    return pairs[1:]


class _Watch:
    """Hooks that note when each candidate's attention, and what is deleted with it, begins and ends.

    Attributes:
        kinds: by name of the candidate, what makes its attention like another one: its kind, shapes and input.
    """

    def __init__(self, eas: EASModel) -> None:
        self.kinds: dict[str, Any] = {}
        self._spans: list[tuple[str, int, Any, Any]] = []
        self._starts: list[Any] = []
        self._handles: list[Any] = []
        for layer in layers_of(eas, MHALayer, NormLayer):
            self._add(layer.candidate.name, 1, layer.base_layer, isinstance(layer, MHALayer))
            if isinstance(layer, MHALayer) and (path := _kept_norm_path(layer)):
                self._add(layer.candidate.name, -1, at_path(layer.base_layer, path))

    def _add(self, name: str, sign: int, module: nn.Module, is_mha: bool = False) -> None:
        def begin(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_mha and name not in self.kinds:
                self.kinds[name] = _kind(module, args, kwargs)
            self._starts.append(_now(args, kwargs))

        def end(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self._spans.append((name, sign, self._starts.pop(), _now(args, kwargs)))

        self._handles += [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, with_kwargs=True),
        ]

    def read(self) -> dict[str, float]:
        """By name of the candidate, the seconds since the last call, if it was called; all devices are at rest."""
        seconds: dict[str, float] = {}
        for name, sign, start, stop in self._spans:
            span = stop - start if isinstance(start, float) else start.elapsed_time(stop) / 1000.0
            seconds[name] = seconds.get(name, 0.0) + sign * span
        self._spans.clear()
        return seconds

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _now(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The time at which a device comes to this point: an event on a GPU, else seconds."""
    device = next((value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
    if device is not None and device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _kind(mha: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What makes an attention like another one: its parts and their settings, its weights, and what it is given."""
    parts = ((type(part), *sorted(filter(_is_setting, vars(part).items()))) for part in mha.modules())
    weights = ((tensor.shape, tensor.dtype, tensor.device) for tensor in (*mha.parameters(), *mha.buffers()))
    given = ((key, x.shape) for key, x in (*enumerate(args), *kwargs.items()) if isinstance(x, torch.Tensor))
    return tuple(parts), tuple(weights), tuple(given)


def _is_setting(attribute: tuple[str, Any]) -> bool:
    return isinstance(attribute[1], (int, float, str)) and attribute[0] != "layer_idx"
