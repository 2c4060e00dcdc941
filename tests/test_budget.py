"""Which candidates to skip for a saving, against every set there is."""

import itertools

import numpy as np
import pytest

from peft_eas.strategies.budget import cheapest_with_saving


def draw(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Costs, a few of which are negative, and savings."""
    random = np.random.default_rng(seed)
    number = int(random.integers(1, 11))
    costs = random.normal(0.1, 0.1, number)
    if kind == "equal":
        return costs, np.full(number, random.uniform(0.001, 1000.0))
    if kind == "two kinds":
        return costs, np.where(random.random(number) < 0.3, 1024.0, 1.7 * 1024)
    if kind == "whole numbers":
        return costs, random.integers(0, 9, number).astype(float)
    return costs, random.uniform(0.0, 2.0, number)


@pytest.mark.parametrize("kind", ["equal", "two kinds", "whole numbers", "any"])
@pytest.mark.parametrize("seed", range(25))
def test_finds_what_trying_every_set_finds(kind: str, seed: int) -> None:
    costs, savings = draw(seed, kind)
    sets = [list(one) for size in range(len(costs) + 1) for one in itertools.combinations(range(len(costs)), size)]
    # Sets that save as good as the same may be taken for one another, where savings are not multiples of one.
    step = savings.sum() / 10_000 * len(costs) if kind == "any" else 1e-9 * savings.sum()
    for share in (0.0, 0.1, 0.33, 0.5, 0.8, 1.0):
        target = share * savings.sum()
        chosen = cheapest_with_saving(costs, savings, target)
        assert chosen == sorted(set(chosen))
        assert savings[chosen].sum() >= target * (1 - 1e-8)
        reaching = [costs[one].sum() for one in sets if savings[one].sum() >= target + step]
        assert costs[chosen].sum() <= min([*reaching, costs.sum()]) + 1e-9


def test_by_hand() -> None:
    # A global attention saves as much as three windows.
    costs, savings = [0.1, 0.2, 0.05, 0.3], [1.0, 1.0, 1.0, 3.0]
    assert cheapest_with_saving(costs, savings, 3.0) == [3]
    assert cheapest_with_saving(costs, savings, 2.0) == [0, 2]
    assert cheapest_with_saving(costs, savings, 3.5) == [2, 3]


@pytest.mark.parametrize(("savings", "target"), [([1.0, 1.0, 1.0], 1.0), ([1.0, 1.0, 0.0], 1.0), ([0.0] * 3, 0.0)])
def test_what_costs_less_than_nothing_is_skipped(savings: list[float], target: float) -> None:
    assert cheapest_with_saving([-0.1, 0.2, -0.2], savings, target) == [0, 2]


@pytest.mark.parametrize("savings", [[2.0] * 4, [1.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0 + 1e-3]])
def test_of_the_equal_the_last_goes_first(savings: list[float]) -> None:
    assert cheapest_with_saving([0.1] * 4, savings, 4.0) == [2, 3]


def test_tiny_savings_count() -> None:
    assert cheapest_with_saving([0.1, 0.2, 0.3], [1e-9, 1.0, 1e6], 1e6 + 1.0 + 1e-9)[-2:] == [1, 2]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"saving of 4\.5 was asked for, but all 3 candidates together save 4\. Ask"):
        cheapest_with_saving([0.1, 0.2, 0.3], [1.0, 1.0, 2.0], 4.5)
    with pytest.raises(ValueError, match="2 costs and 1 savings"):
        cheapest_with_saving([0.1, 0.2], [1.0], 1.0)
    with pytest.raises(ValueError, match="at least one"):
        cheapest_with_saving([], [], 0.0)
    for costs, savings in (([float("nan")], [1.0]), ([0.1], [-1.0]), ([0.1], [float("inf")])):
        with pytest.raises(ValueError, match="costs must be finite, and savings finite and at least 0"):
            cheapest_with_saving(costs, savings, 0.5)
