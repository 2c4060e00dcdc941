"""Which candidates to skip for a given saving, cost or number, and how the one grows with the other.

Plain numbers. A candidate costs an expected increase of the loss, and saves time, memory or whatever else is counted.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Savings are counted in this share of their sum: sets that differ by less may be taken for one another.
_PARTS = 10_000
# By which sums of the same numbers in another order may differ, relative to the sum of all.
_ROUNDING = 1e-9


class Choice(NamedTuple):
    """A set of candidates.

    Attributes:
        saving, cost: their sums over the set. indices: of the candidates, ascending.
    """

    saving: float
    cost: float
    indices: tuple[int, ...]


class Budget:
    """Finds the sets of candidates that are worth it.

    If all savings are equal, it takes the cheapest candidates first. Otherwise it solves a knapsack by dynamic
    programming over the sum of the savings, in steps of a 10,000th of what all save: for each such sum it knows the
    cheapest set, and what that truly costs and saves. A set that it returns keeps to what was asked for, whatever the
    steps; a better one can at most hide within a step for each candidate. For 100 candidates this takes a few
    milliseconds.

    Of candidates that save and cost the same, the last one is taken first.

    Args:
        costs: expected increase of the loss, per candidate; a negative one is a gain, so that it is skipped wherever
            nothing but the cost decides.
        savings: what skipping each candidate saves, in one unit, at least 0.

    Raises:
        ValueError: for costs and savings of different number, none at all, or values out of range.
    """

    def __init__(self, costs: Sequence[float], savings: Sequence[float]) -> None:
        self.costs = np.array(costs, dtype=np.float64)
        self.savings = np.array(savings, dtype=np.float64)
        if self.costs.shape != self.savings.shape or self.costs.ndim != 1 or not len(self.costs):
            raise ValueError(
                f"Budget was given {self.costs.size} costs and {self.savings.size} savings. Give one of each for "
                "every candidate, of which there must be at least one."
            )
        if not (np.isfinite(self.costs).all() and np.isfinite(self.savings).all() and (self.savings >= 0).all()):
            raise ValueError(
                f"Budget(costs={list(costs)}, savings={list(savings)}): costs must be finite, and savings finite and "
                "at least 0."
            )
        # The cheapest first; of the equally cheap, the last.
        self._order = np.lexsort((-np.arange(len(self.costs)), self.costs))
        self._tolerance = _ROUNDING * float(self.savings.sum()), _ROUNDING * float(np.abs(self.costs).sum())

    def of_saving(self, saving: float) -> Choice:
        """The set of least cost that saves at least `saving`; of several, the one that saves most.

        Raises:
            ValueError: if all candidates together save less.
        """
        sums, costs = self._states
        reached = sums >= saving - self._tolerance[0]
        if not reached.any():
            raise ValueError(
                f"A saving of {saving:.6g} was asked for, but all {len(self.costs)} candidates together save "
                f"{float(self.savings.sum()):.6g}. Ask for at most that."
            )
        least = costs[reached].min()
        return self._choice(self._most_saving(reached & (costs <= least)))

    def of_cost(self, cost: float) -> Choice:
        """The set that saves most and costs at most `cost`; of several, the one of least cost.

        Raises:
            ValueError: if every set costs more, as can be for a `cost` below 0.
        """
        costs = self._states[1]
        allowed = costs <= cost + self._tolerance[1]
        if not allowed.any():
            raise ValueError(
                f"A cost of at most {cost:.6g} was asked for, but no set of candidates costs less than "
                f"{float(costs.min()):.6g}. Allow at least that."
            )
        return self._choice(self._most_saving(allowed))

    def of_size(self, number: int) -> Choice:
        """The `number` candidates of least cost, whatever they save.

        Raises:
            ValueError: if there are not as many.
        """
        if not 0 <= number <= len(self.costs):
            raise ValueError(
                f"{number} candidates were asked for, of {len(self.costs)}. Ask for 0 to {len(self.costs)}."
            )
        return self._summed(self._order[:number])

    def frontier(self) -> list[Choice]:
        """Every set that is worth it: no other costs as little and saves more, or saves as much and costs less.

        By ascending saving, hence by ascending cost; from the set of least cost to that of largest saving.
        """
        sums, costs = self._states
        order = np.lexsort((costs, -sums))
        least = np.minimum.accumulate(costs[order])
        is_worth_it = np.concatenate([[True], costs[order][1:] < least[:-1]])
        return [self._choice(state) for state in order[is_worth_it][::-1]]

    # --- the cheapest set for each sum of savings ------------------------------------------------------------------

    @cached_property
    def _has_equal_savings(self) -> bool:
        return bool(self.savings[0] > 0 and (self.savings == self.savings[0]).all())

    @cached_property
    def _states(self) -> tuple[np.ndarray, np.ndarray]:
        """What the set of each state truly saves and costs; infinite costs where no set leads to."""
        if self._has_equal_savings:
            costs = np.concatenate([[0.0], np.cumsum(self.costs[self._order])])
            return self.savings[0] * np.arange(len(costs)), costs
        steps = self._steps
        reach = np.concatenate([[0], np.cumsum(steps[::-1])])
        costs, sums = np.full(reach[-1] + 1, math.inf), np.zeros(reach[-1] + 1)
        costs[0] = 0.0
        self._taken = np.zeros((len(steps), len(costs)), dtype=bool)
        # From the last to the first, as one that costs the same as what is there already does not take its place.
        for index, reached in zip(range(len(steps) - 1, -1, -1), reach):
            source, target = slice(0, reached + 1), slice(steps[index], steps[index] + reached + 1)
            with_it = costs[source] + self.costs[index]
            is_better = self._taken[index, target]
            np.less(with_it, costs[target], out=is_better)
            sums[target] = np.where(is_better, sums[source] + self.savings[index], sums[target])
            costs[target] = np.where(is_better, with_it, costs[target])
        sums[np.isinf(costs)] = -math.inf
        return sums, costs

    @cached_property
    def _steps(self) -> np.ndarray:
        """Savings as whole numbers; what saves anything counts."""
        total = self.savings.sum()
        if total == 0:
            return np.zeros(len(self.savings), dtype=np.int64)
        return np.where(self.savings > 0, np.maximum(np.rint(self.savings / total * _PARTS), 1), 0).astype(np.int64)

    def _most_saving(self, among: np.ndarray) -> int:
        """The state among those that saves most; of several, the one of least cost."""
        sums, costs = self._states
        most = sums[among].max()
        candidates = np.flatnonzero(among & (sums >= most - self._tolerance[0]))
        return int(candidates[np.argmin(costs[candidates])])

    def _choice(self, state: int) -> Choice:
        """The set of a state."""
        if self._has_equal_savings:
            return self._summed(self._order[:state])
        indices = []
        for index in range(len(self.costs)):  # the first is the last that was put in
            if self._taken[index, state]:
                indices.append(index)
                state -= self._steps[index]
        return self._summed(indices)

    def _summed(self, indices: Sequence[int]) -> Choice:
        chosen = tuple(sorted(int(index) for index in indices))
        return Choice(float(self.savings[list(chosen)].sum()), float(self.costs[list(chosen)].sum()), chosen)
