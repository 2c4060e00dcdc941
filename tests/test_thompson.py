"""The default search: on losses that are made up, it finds what is harmless, how many can go, and resumes exactly."""

import itertools
import json
import math
import random

import pytest

from peft_eas.strategies import AttentionBandit, ThompsonSampling, restored
from peft_eas.strategies.goal import Goal

SMALL = [f"layers.{i}.self_attn" for i in range(6)]


class Llama:
    """One vital attention, two that matter a little, and the others dead; as measured on a small Llama."""

    def __init__(self, seed: int, num: int, noise: float) -> None:
        self.random = random.Random(seed)
        self.names = [f"layers.{i}.self_attn" for i in range(num)]
        shuffled = self.random.sample(self.names, num)
        self.vital, self.mild = shuffled[0], {shuffled[1]: 0.0015, shuffled[2]: 0.2}
        self.noise = noise

    def loss(self, names: list[str]) -> float:
        if self.vital in names:
            return 7.0 * math.exp(self.random.gauss(0.0, 0.1))
        return (0.0015 + sum(self.mild.get(name, 0.0) for name in names)) * math.exp(
            self.random.gauss(0.0, self.noise)
        )

    def is_harmless(self, names: list[str]) -> bool:
        return not {self.vital, *self.mild} & set(names)


def search(strategy, loss_of, rounds: int):
    for step in range(rounds):
        sets = strategy.sample_sets(3)
        strategy.update(sets, [loss_of(names) for names in sets], step=step)
    return strategy


@pytest.mark.parametrize(("num", "noise"), [(6, 0.0), (6, 0.3), (30, 0.0), (30, 0.3)])
def test_what_is_chosen_is_harmless(num, noise) -> None:
    for seed in range(10):
        llama = Llama(seed, num, noise)
        strategy = search(ThompsonSampling(llama.names, num // 2, seed=seed), llama.loss, 36)
        assert llama.is_harmless(strategy.best()), seed


def test_it_finds_better_sets_than_the_bandit() -> None:
    """Thirty candidates whose costs add up, on noisy batches."""
    names = [f"layers.{i}.self_attn" for i in range(30)]
    excess: dict[type, list[float]] = {ThompsonSampling: [], AttentionBandit: []}
    for seed in range(5):
        own = random.Random(seed)
        costs = {name: own.expovariate(20.0) for name in names}
        least = sum(sorted(costs.values())[:12])
        for kind, rounds in ((ThompsonSampling, 60), (AttentionBandit, 60)):
            batches = random.Random(seed)
            strategy = kind(names, 12, seed=seed)
            for step in range(rounds):
                batch, sets = batches.gauss(1.0, 0.1), strategy.sample_sets(3)
                losses = [math.exp(batch + sum(costs[n] for n in chosen) + batches.gauss(0, 0.02)) for chosen in sets]
                strategy.update(sets, losses, step)
            excess[kind].append(sum(costs[name] for name in strategy.best()) - least)
    assert sum(excess[ThompsonSampling]) < 0.5 * sum(excess[AttentionBandit])


def test_training_losses_tell_of_the_costs_too() -> None:
    llama = Llama(0, 6, 0.3)
    strategy = ThompsonSampling(llama.names, 3)
    for step in range(200):
        names = strategy.sample()
        strategy.note_step(names, llama.loss(names), step)
    strategy.note_step(llama.names[:3], math.nan, 200)
    strategy.update([], [], 200)  # a round in which nothing could be compared
    assert llama.is_harmless(strategy.best())


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    llama = Llama(3, 6, 0.3)
    whole = ThompsonSampling(SMALL, 3, seed=3)
    whole.take_hint({name: 0.9 + 0.01 * i for i, name in enumerate(SMALL)})
    for step in range(20):
        names = whole.sample()
        whole.note_step(names, llama.loss(names), step)
        if step % 4 == 3:
            sets = whole.sample_sets(3)
            whole.update(sets, [llama.loss(one) for one in sets], step)
    resumed = restored(json.loads(json.dumps(whole.state_dict())))
    assert resumed.state_dict() == whole.state_dict()
    assert [resumed.sample() for _ in range(5)] == [whole.sample() for _ in range(5)]


@pytest.mark.parametrize("is_trained", [True, False])
def test_what_training_has_changed_counts_less(is_trained) -> None:
    """The first candidate is dear until step 20, and from there on free, when another one's cost stays."""
    strategy = ThompsonSampling(SMALL, 3)
    for step in range(40):
        costs = {SMALL[0]: 0.2 if step < 20 else 0.0, SMALL[1]: 0.07}
        sets = random.Random(step).sample(list(itertools.combinations(SMALL, 3)), 3)
        losses = [math.exp(sum(costs.get(name, 0.0) for name in names)) for names in sets]
        strategy.update(sets, losses, step if is_trained else None)
    expected = dict(zip(SMALL, strategy.costs()[0]))
    assert (expected[SMALL[0]] < expected[SMALL[1]]) == is_trained


def test_as_many_as_a_cost_allows() -> None:
    costs = dict(zip(SMALL, (2.0, 0.001, 0.3, 0.002, 0.1, 0.004)))
    own = random.Random(0)
    strategy = ThompsonSampling(SMALL, goal=Goal("cost", math.log(1.02)))
    for step in range(40):
        sets = strategy.sample_sets(3)
        assert sets[0] == []
        batch = own.gauss(1.0, 0.1)
        losses = [math.exp(batch + sum(costs[n] for n in names) + own.gauss(0, 0.002)) for names in sets]
        strategy.update(sets, losses, step)
    assert strategy.best() == [SMALL[1], SMALL[3], SMALL[5]]
    curve = strategy.curve()
    assert curve["num_skip"] == list(range(7))
    assert curve["increase"][0] == 0.0
    assert curve["increase"][3] == pytest.approx(0.007, abs=0.01)
    assert restored(strategy.state_dict()).best() == strategy.best()


def test_the_cheapest_with_a_saving() -> None:
    costs = dict(zip(SMALL, (0.01, 0.02, 0.03, 0.5, 0.5, 0.02)))
    strategy = ThompsonSampling(SMALL, goal=Goal("saving", 4.0, (1.0, 1.0, 4.0, 4.0, 1.0, 1.0)))
    search(strategy, lambda names: math.exp(sum(costs[name] for name in names)), 30)
    assert strategy.best() == [SMALL[2]]
    assert strategy.curve()["increase"][1] == pytest.approx(strategy.costs()[0][2])  # of the choice, not the cheapest


def test_losses_below_zero_are_taken_as_they_are() -> None:
    strategy = ThompsonSampling(SMALL, 2)
    search(strategy, lambda names: -1.0 + 0.5 * len({SMALL[0], SMALL[1]} & set(names)), 20)
    assert not {SMALL[0], SMALL[1]} & set(strategy.best())


@pytest.mark.parametrize("num", [2, 8, 30])
@pytest.mark.parametrize(
    "loss", [lambda _: 1.0, lambda names: 3.0 ** len(names[2:]), lambda names: 1e6 ** ("0" in names)]
)
def test_losses_without_any_noise_can_be_learned_from(num, loss) -> None:
    for options in ({"num_skip": num // 2}, {"goal": Goal("cost", 0.02)}):
        strategy = search(ThompsonSampling([str(i) for i in range(num)], **options), loss, 15)
        assert all(map(math.isfinite, strategy.scores))


def test_the_curve_goes_through_what_was_measured() -> None:
    strategy = search(ThompsonSampling(SMALL, 2), lambda names: math.exp(0.1 * len(names)), 5)
    curve = strategy.curve([{"num_skip": 2, "increase": 0.3, "deviation": 0.05}])
    assert curve["increase"][0] == 0.0
    assert curve["increase"][2] == pytest.approx(0.3)
    assert curve["deviation"][2] == pytest.approx(0.05)


def test_one_of_number_and_goal_is_given() -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        ThompsonSampling(SMALL)


def test_a_round_has_something_to_compare() -> None:
    """Also where one set is as good as sure."""
    strategy = ThompsonSampling(SMALL, 1)
    for step in range(60):
        sets = strategy.sample_sets(2)
        assert len({tuple(names) for names in sets}) == 2
        strategy.update(sets, [1.0 if names == [SMALL[2]] else 1e6 for names in sets], step)
    assert strategy.best() == [SMALL[2]]
