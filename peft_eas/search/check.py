"""The check at the end of a search: what the choice costs against nothing skipped, measured on held-out batches."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..strategies import ThompsonSampling

# Held-out batches that a choice is measured on, and where that decides how many are skipped.
NUM_BATCHES, NUM_DECIDING_BATCHES = 4, 16
Losses = Callable[[Sequence[Sequence[str]], int], list[float]]


def checked_choice(
    strategy: ThompsonSampling, losses: Losses, step: int, num_batches: int | None = None
) -> tuple[list[str], list[dict[str, Any]]]:
    """The set to skip, and what it, and where a loss decides the sets of other sizes, were measured to cost.

    Where the loss may rise by a given share, the number skipped is one that was measured to stay within when one more
    was measured not to. What is measured for that is told to the strategy, whose estimate is the next number to try;
    where it is known to be too low or too high, the one halfway between the bounds.

    Args:
        losses: the losses of sets on the held-out batch of a number.
        num_batches: how many there are, after which they come again, if that is known.

    Returns:
        the names, and by size `{"num_skip", "increase", "deviation"}`: of the mean loss, the increase of its logarithm
        against nothing skipped, and the standard error, None by one batch alone.
    """
    chosen = strategy.best()
    most_batches = num_batches or NUM_DECIDING_BATCHES
    if strategy.goal.kind != "cost":
        count = min(NUM_BATCHES, most_batches)
        found = log_increase(*_measured(chosen, losses, len(strategy.rounds), count)) if chosen else None
        return chosen, [] if found is None else [_point(chosen, found)]
    within, points = [], {}
    most = len(strategy.candidates) + 1  # too many
    while most - len(within) > 1:
        size = len(strategy.best())
        if not len(within) < size < most:
            size = (len(within) + most) // 2
        names = strategy.best(size)
        nothing, own = _measured(names, losses, len(strategy.rounds), min(NUM_DECIDING_BATCHES, most_batches))
        for pair in zip(nothing, own):
            strategy.update([[], names], pair, step)
        found = log_increase(nothing, own)
        if found is not None:
            points[size] = _point(names, found)
        if found is not None and found[0] <= strategy.goal.amount:
            within = names
        else:
            most = size
    return within, [points[size] for size in sorted(points)]


def _measured(names: list[str], losses: Losses, first: int, count: int) -> tuple[list[float], list[float]]:
    """The losses with nothing skipped and with `names`, on `count` batches from the number `first` on."""
    pairs = [losses([[], names], number) for number in range(first, first + count)]
    return [nothing for nothing, _ in pairs], [own for _, own in pairs]


def _point(names: list[str], found: tuple[float, float | None]) -> dict[str, Any]:
    return {"num_skip": len(names), "increase": found[0], "deviation": found[1]}


def log_increase(nothing: Sequence[float], losses: Sequence[float]) -> tuple[float, float | None] | None:
    """The logarithm of the ratio of mean losses on the same batches, and its standard error, None by one batch alone;
    None where a loss is not positive, or none is finite."""
    pairs = [pair for pair in zip(nothing, losses) if all(map(math.isfinite, pair))]
    if not pairs or min(map(min, pairs)) <= 0.0:
        return None
    before, after = (statistics.fmean(values) for values in zip(*pairs))
    differences = [b / after - a / before for a, b in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    return math.log(after / before), error
