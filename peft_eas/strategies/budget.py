"""Which candidates to skip for a given saving: those that cost least. Plain numbers, no tensors of a model."""

import math
from collections.abc import Sequence

import numpy as np

# Savings are counted in this share of their sum: sets that differ by less may be taken for one another.
_PARTS = 10_000
# By which sums of the same numbers in another order may differ, relative to the sum of all.
_ROUNDING = 1e-9


def cheapest_with_saving(costs: Sequence[float], savings: Sequence[float], saving: float) -> list[int]:
    """Ascending indices of the candidates that together save at least `saving` and cost least.

    A knapsack, solved by dynamic programming over the sum of the savings in steps of a 10,000th: for each such sum it
    knows the cheapest set, and what that truly saves. The set that is returned always saves enough, whatever the
    steps; a cheaper one can at most hide within a step for each candidate. With equal savings it is exact. For 100
    candidates it takes a few milliseconds. Of candidates that save and cost the same, the last is taken first.

    Args:
        costs: expected increase of the loss, per candidate. A negative one is a gain, so that it is always skipped.
        savings: what skipping each candidate saves, in the unit of `saving`, at least 0.

    Raises:
        ValueError: if all candidates together save less, or for values out of range.
    """
    cost, saved = np.array(costs, np.float64), np.array(savings, np.float64)
    if cost.shape != saved.shape or cost.ndim != 1 or not len(cost):
        raise ValueError(
            f"{cost.size} costs and {saved.size} savings were given. Give one of each for every candidate, of which "
            "there must be at least one."
        )
    if not (np.isfinite(cost).all() and np.isfinite(saved).all() and (saved >= 0).all()):
        raise ValueError(
            f"Costs {list(costs)} and savings {list(savings)} were given: costs must be finite, and savings finite "
            "and at least 0."
        )
    total = float(saved.sum())
    least = saving - _ROUNDING * total
    if total < least:
        raise ValueError(
            f"A saving of {saving:.6g} was asked for, but all {len(cost)} candidates together save {total:.6g}. Ask "
            "for at most that."
        )
    steps = _whole_numbers(saved)
    costs_of, sums_of, taken = _cheapest_by_sum(cost, saved, steps)
    is_enough = sums_of >= least
    is_best = is_enough & (costs_of <= costs_of[is_enough].min())
    state = int(np.argmax(np.where(is_best, sums_of, -math.inf)))
    chosen = []
    for index in range(len(steps)):  # the first is the last that was put in
        if taken[index, state]:
            chosen.append(index)
            state -= steps[index]
    return chosen


def _whole_numbers(savings: np.ndarray) -> np.ndarray:
    """Savings in steps; what saves anything counts."""
    positive = savings[savings > 0]
    if not len(positive) or (positive == positive[0]).all():
        return (savings > 0).astype(np.int64)
    steps = np.maximum(np.rint(savings / savings.sum() * _PARTS), 1)
    return np.where(savings > 0, steps, 0).astype(np.int64)


def _cheapest_by_sum(
    costs: np.ndarray, savings: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By sum of steps: the least cost of a set (infinite where no set leads to), what that truly saves, and (n, sums)
    whether a candidate was put into it."""
    reach = np.concatenate([[0], np.cumsum(steps[::-1])])
    least, sums = np.full(reach[-1] + 1, math.inf), np.full(reach[-1] + 1, -math.inf)
    least[0] = sums[0] = 0.0
    taken = np.zeros((len(steps), len(least)), dtype=bool)
    # From the last to the first, as one that costs the same as what is there already does not take its place.
    for index, reached in zip(range(len(steps) - 1, -1, -1), reach):
        source, target = slice(0, reached + 1), slice(steps[index], steps[index] + reached + 1)
        with_it = least[source] + costs[index]
        is_better = taken[index, target]
        np.less(with_it, least[target], out=is_better)
        sums[target] = np.where(is_better, sums[source] + savings[index], sums[target])
        least[target] = np.where(is_better, with_it, least[target])
    return least, sums, taken
