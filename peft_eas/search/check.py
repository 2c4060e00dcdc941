"""The check at the end of a search: what the choice costs against nothing skipped, measured on held-out batches."""

import math
import statistics
from collections.abc import Callable, Sequence

from ..strategies import ThompsonSampling

# Held-out batches that a choice is measured on, and where that decides how many are skipped.
NUM_BATCHES, NUM_DECIDING_BATCHES = 4, 16
# Times that a choice which turns out too dear, or has room for more, is made again.
MAX_CHOICES = 4
Losses = Callable[[Sequence[Sequence[str]], int], list[float]]


def checked_choice(strategy: ThompsonSampling, losses: Losses, step: int) -> tuple[list[str], list[dict[str, float]]]:
    """The set to skip, and what sets of its size, and for a cost also of the sizes next to it, were measured to cost.

    Where the loss may rise by a given share, the largest set is taken whose measured mean stays within. What is
    measured for that is told to the strategy, which then chooses again, until the choice is one that was measured.

    Args:
        losses: the losses of sets on the held-out batch of a number.

    Returns:
        the names, and by size `{"num_skip", "increase", "deviation"}`: mean and standard error of the increase of the
        log loss.
    """
    measured: dict[int, tuple[list[str], float, float]] = {}
    for _ in range(MAX_CHOICES):
        chosen = strategy.best()
        sizes = [len(chosen)]
        if strategy.goal.kind == "cost":
            sizes = [size for size in range(sizes[0] - 1, sizes[0] + 3) if 0 < size <= len(strategy.candidates)]
        sets = {size: strategy.best(size) if size != len(chosen) else chosen for size in sizes}
        sets = {size: names for size, names in sets.items() if names and measured.get(size, [None])[0] != names}
        if not sets:
            break
        measured |= _measure(strategy, sets, losses, step)
        if strategy.goal.kind != "cost":
            break
    points = [
        {"num_skip": size, "increase": mean, "deviation": deviation}
        for size, (_, mean, deviation) in sorted(measured.items())
    ]
    if strategy.goal.kind != "cost":
        return chosen, points
    within = [names for names, mean, _ in measured.values() if mean <= strategy.goal.amount]
    return max(within, key=len, default=[]), points


def _measure(
    strategy: ThompsonSampling, sets: dict[int, list[str]], losses: Losses, step: int
) -> dict[int, tuple[list[str], float, float]]:
    decides = strategy.goal.kind == "cost"
    tried, rows = [[], *sets.values()], []
    first = len(strategy.rounds)
    for number in range(first, first + (NUM_DECIDING_BATCHES if decides else NUM_BATCHES)):
        values = losses(tried, number)
        if decides:
            strategy.update(tried, values, step)
        rows.append(values)
    nothing, *by_set = zip(*rows)
    found = {size: _increase(nothing, own) for size, own in zip(sets, by_set)}
    return {size: (sets[size], *point) for size, point in found.items() if point is not None}


def _increase(nothing: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The logarithm of the ratio of mean losses on the same batches, and its standard error; None where a loss is not
    positive, or fewer than two are finite."""
    pairs = [pair for pair in zip(nothing, losses) if all(map(math.isfinite, pair))]
    if len(pairs) < 2 or min(map(min, pairs)) <= 0.0:
        return None
    before, after = (statistics.fmean(values) for values in zip(*pairs))
    differences = [b / after - a / before for a, b in pairs]
    return math.log(after / before), statistics.stdev(differences) / math.sqrt(len(pairs))
