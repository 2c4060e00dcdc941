"""`Goal`: what the searched set must fulfil, and with that, which set is the best for given costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .budget import Budget


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
        """Ascending indices of the best set.

        Args:
            costs: expected increase of the log loss by skipping each candidate.
            level: what a set costs beyond the sum of its costs.
        """
        if self.kind == "number":
            return sorted(cheapest_first(costs)[: int(self.amount)])
        if self.kind == "saving":
            return list(Budget(costs, self.savings).of_saving(self.amount).indices)
        chosen, total = [], level
        for index in cheapest_first(costs):
            total += costs[index]
            if total > self.amount and costs[index] > 0.0:
                break
            chosen.append(index)
        return sorted(chosen) if level + sum(costs[i] for i in chosen) <= self.amount else []


def cheapest_first(costs: Sequence[float]) -> list[int]:
    """Indices by ascending cost; of the equally dear, the later layer, as models need their first attentions most."""
    return sorted(range(len(costs)), key=lambda i: (costs[i], -i))


def log_increase(share: float) -> float:
    """By how much the log of a loss rises that rises by `share` of itself."""
    return math.log1p(share)
