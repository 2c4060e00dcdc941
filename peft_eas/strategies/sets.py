"""What of a set of skipped candidates its cost is a sum of."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

# Up to so many candidates, pairs of them have costs as well, and a choice is made among all sets.
MOST_FOR_PAIRS = 12
# How large the costs of pairs are expected to be beside those of candidates. On the tasks of examples/search_quality,
# 0.6 finds the best sets a little more often than 0.3 and 1.
PAIR_SCALE = 0.6


@dataclass(frozen=True)
class Sets:
    """Sets of few candidates: `skipped` (S, n), 1.0 where a candidate is skipped, and their features."""

    skipped: np.ndarray
    features: np.ndarray

    @cached_property
    def _by_size(self) -> list["Sets"]:
        sizes = self.skipped.sum(1)
        which = [np.flatnonzero(sizes == size) for size in range(self.skipped.shape[1] + 1)]
        return [Sets(self.skipped[rows], self.features[rows]) for rows in which]

    def of_size(self, size: int) -> "Sets":
        """Those of so many candidates."""
        return self._by_size[size]


def all_sets(num: int) -> Sets | None:
    """Every set of `num` candidates; None where there are too many."""
    if num > MOST_FOR_PAIRS:
        return None
    skipped = (np.arange(2**num)[:, None] >> np.arange(num) & 1).astype(np.float64)
    return Sets(skipped, features(skipped))


def features(skipped: np.ndarray) -> np.ndarray:
    """(S, p) for sets (S, n): `skipped` itself, and of few candidates, for each pair whether both are skipped.

    Two attentions may stand in for each other, so that what both cost is more than the sum. With many candidates there
    are too many pairs to learn of.
    """
    num = skipped.shape[1]
    if num > MOST_FOR_PAIRS or num < 2:
        return skipped
    first, second = np.array(list(combinations(range(num), 2))).T
    return np.concatenate([skipped, PAIR_SCALE * skipped[:, first] * skipped[:, second]], 1)
