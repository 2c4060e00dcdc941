"""`Goal`: what the searched set must fulfil, and with that, which set is the best for given costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .budget import cheapest_with_saving


@dataclass(frozen=True)
class Goal:
    """One of three: a number of candidates, the most within a cost, or the cheapest with a saving.

    Args:
        kind: "number": `amount` candidates of least cost; "cost": as many as raise the log loss by `amount` at most;
            "saving": those of least cost that save `amount` together.
        amount: see there.
        savings: of "saving": what skipping each candidate saves, in the unit of `amount`.
    """

    kind: Literal["number", "cost", "saving"]
    amount: float
    savings: tuple[float, ...] = ()

    def choose(self, costs: Sequence[float], level: float = 0.0) -> list[int]:
        """Ascending indices of the best set, where costs add up; none where every set costs too much.

        Args:
            costs: expected increase of the log loss by skipping each candidate.
            level: what a set costs beyond the sum of its costs.
        """
        if self.kind == "saving":
            # What seems to cost less than nothing is still not skipped beyond the need.
            positive = [max(cost, 1e-9) for cost in costs]
            return cheapest_with_saving(positive, self.savings, self.amount)
        order = cheapest_first(costs)
        if self.kind == "number":
            return sorted(order[: int(self.amount)])
        totals = level + np.cumsum([costs[index] for index in order])
        within = np.flatnonzero(totals <= self.amount)
        return sorted(order[: int(within[-1]) + 1]) if len(within) else []

    def choose_among(self, sets: np.ndarray, costs: np.ndarray, level: float = 0.0) -> list[int]:
        """The same among given sets (S, n), 1.0 where a candidate is skipped, of which each costs `costs` (S,)."""
        sizes = sets.sum(1)
        if self.kind == "cost":
            is_allowed = (costs + level <= self.amount) & (sizes > 0)
            is_allowed &= sizes == sizes[is_allowed].max(initial=-1.0)
        elif self.kind == "saving":
            savings, enough = sets @ np.array(self.savings), self.amount * (1.0 - 1e-9)
            least = np.where(sets > 0.0, np.array(self.savings), np.inf).min(1)
            is_allowed = (savings >= enough) & (savings - least < enough)  # and none of the set can be spared
        else:
            is_allowed = sizes == self.amount
        if not is_allowed.any():
            return []
        # The last of the equally dear has the later layers, as of `cheapest_first`.
        last = np.where(is_allowed, costs, np.inf)[::-1].argmin()
        return np.flatnonzero(sets[::-1][last]).tolist()


def cheapest_first(costs: Sequence[float]) -> list[int]:
    """Indices by ascending cost; of the equally dear, the later layer, as models need their first attentions most."""
    return sorted(range(len(costs)), key=lambda i: (costs[i], -i))
