"""Which candidates to skip for a saving, a cost or a number, against every set there is."""

import itertools

import numpy as np
import pytest

from peft_eas.strategies.budget import Budget, Choice


def every_set(costs: np.ndarray, savings: np.ndarray) -> list[Choice]:
    indices = range(len(costs))
    sets = itertools.chain.from_iterable(itertools.combinations(indices, size) for size in range(len(costs) + 1))
    return [Choice(sum(savings[i] for i in one), sum(costs[i] for i in one), one) for one in sets]


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


def is_sum_of(choice: Choice, costs: np.ndarray, savings: np.ndarray) -> bool:
    found = (savings[list(choice.indices)].sum(), costs[list(choice.indices)].sum())
    return choice[:2] == pytest.approx(found) and choice.indices == tuple(sorted(set(choice.indices)))


@pytest.mark.parametrize("kind", ["equal", "two kinds", "whole numbers", "any"])
@pytest.mark.parametrize("seed", range(25))
def test_finds_what_trying_every_set_finds(kind: str, seed: int) -> None:
    costs, savings = draw(seed, kind)
    budget, sets = Budget(costs, savings), every_set(costs, savings)
    # Sets that save as good as the same may be taken for one another, where savings are not multiples of one.
    step = savings.sum() / 10_000 * len(costs) if kind == "any" else 1e-9 * savings.sum()
    for share in (0.0, 0.1, 0.33, 0.5, 0.8, 1.0):
        target = share * savings.sum()
        choice = budget.of_saving(target)
        assert is_sum_of(choice, costs, savings)
        assert choice.saving >= target * (1 - 1e-8)
        reaching = [one.cost for one in sets if one.saving >= target + step]
        assert choice.cost <= min([*reaching, sets[-1].cost]) + 1e-9  # the last is that of all
    for limit in (0.0, 0.05, 0.2, 0.5, 10.0):
        choice = budget.of_cost(limit)
        assert is_sum_of(choice, costs, savings)
        assert choice.cost <= limit + 1e-8
        best = max(one.saving for one in sets if one.cost <= limit)
        assert choice.saving >= best - step
        if kind != "any":
            least = min(one.cost for one in sets if one.cost <= limit and one.saving >= best * (1 - 1e-9))
            assert choice.cost == pytest.approx(least)
    for number in range(len(costs) + 1):
        choice = budget.of_size(number)
        assert is_sum_of(choice, costs, savings)
        assert len(choice.indices) == number
        assert choice.cost == pytest.approx(min(one.cost for one in sets if len(one.indices) == number))


@pytest.mark.parametrize("kind", ["equal", "two kinds", "whole numbers"])
@pytest.mark.parametrize("seed", range(10))
def test_frontier_is_what_no_set_beats(kind: str, seed: int) -> None:
    costs, savings = draw(seed, kind)
    sets = every_set(costs, savings)
    frontier = Budget(costs, savings).frontier()
    best: list[Choice] = []
    for one in sorted(sets, key=lambda one: (-round(one.saving, 6), one.cost)):
        if not best or one.cost < best[-1].cost - 1e-9:
            best.append(one)
    assert [one[:2] for one in frontier] == [pytest.approx(one[:2]) for one in best[::-1]]
    assert all(is_sum_of(one, costs, savings) for one in frontier)


def test_frontier_of_any_savings_is_ascending_and_agrees_with_the_choices() -> None:
    costs, savings = draw(3, "any")
    budget = Budget(costs, savings)
    frontier = budget.frontier()
    assert frontier == sorted(frontier)
    assert all(a.cost < b.cost and a.saving < b.saving for a, b in itertools.pairwise(frontier))
    for choice in frontier:
        assert budget.of_saving(choice.saving).cost == pytest.approx(choice.cost)
        assert budget.of_cost(choice.cost).saving == pytest.approx(choice.saving)


def test_by_hand() -> None:
    # A global attention saves as much as three windows.
    budget = Budget([0.1, 0.2, 0.05, 0.3], [1.0, 1.0, 1.0, 3.0])
    assert budget.of_saving(3.0).indices == (3,)
    assert budget.of_saving(2.0).indices == (0, 2)
    assert budget.of_saving(3.5).indices == (2, 3)
    assert budget.of_cost(0.35).indices == (2, 3)
    assert budget.of_cost(0.34).indices == (3,)
    assert budget.of_size(2).indices == (0, 2)
    assert [one.indices for one in budget.frontier()] == [(), (2,), (0, 2), (3,), (2, 3), (0, 2, 3), (0, 1, 2, 3)]


def test_what_costs_less_than_nothing_is_skipped() -> None:
    assert Budget([-0.1, 0.2, -0.2], [1.0, 1.0, 1.0]).of_saving(1.0).indices == (0, 2)
    assert Budget([-0.1, 0.2, -0.2], [1.0, 1.0, 0.0]).of_saving(1.0).indices == (0, 2)
    assert Budget([-0.1, 0.2, -0.2], [0.0, 0.0, 0.0]).of_saving(0.0).indices == (0, 2)


@pytest.mark.parametrize("savings", [[2.0] * 4, [1.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0 + 1e-3]])
def test_of_the_equal_the_last_goes_first(savings: list[float]) -> None:
    budget = Budget([0.1] * 4, savings)
    assert budget.of_saving(4.0).indices == (2, 3)
    assert budget.of_size(3).indices == (1, 2, 3)


def test_tiny_savings_count() -> None:
    budget = Budget([0.1, 0.2, 0.3], [1e-9, 1.0, 1e6])
    assert budget.of_saving(1e6 + 1.0 + 1e-9).indices[-2:] == (1, 2)
    assert budget.of_cost(1.0).indices == (0, 1, 2)


def test_bad_input() -> None:
    budget = Budget([0.1, 0.2, 0.3], [1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"saving of 4\.5 was asked for, but all 3 candidates together save 4\. Ask"):
        budget.of_saving(4.5)
    with pytest.raises(ValueError, match=r"at most -0\.1 was asked for, but no set of candidates costs less than 0\."):
        budget.of_cost(-0.1)
    with pytest.raises(ValueError, match=r"costs less than -0\.3\. Allow at least that"):
        Budget([-0.1, -0.2], [1.0, 2.0]).of_cost(-0.5)
    with pytest.raises(ValueError, match=r"4 candidates were asked for, of 3\. Ask for 0 to 3"):
        budget.of_size(4)
    with pytest.raises(ValueError, match="2 costs and 1 savings"):
        Budget([0.1, 0.2], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        Budget([], [])
    for costs, savings in (([float("nan")], [1.0]), ([0.1], [-1.0]), ([0.1], [float("inf")])):
        with pytest.raises(ValueError, match="costs must be finite, and savings finite and at least 0"):
            Budget(costs, savings)
