"""The methods that examples.search_quality compares.

A method is a generator: given a problem, the number k to skip and a seed, it yields, again and again, how many
evaluations it has made and its choice so far. One run thus gives the choices at every budget. An evaluation is the
loss of one set on one batch, whether another method has asked for it before or not.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from examples.search_quality.problem import Problem, Set
from peft_eas.strategies import AttentionBandit, Strategy, ThompsonSampling
from peft_eas.strategies.bandit import Reward

SETS_PER_ROUND = 3  # as `EASSearch` compares by default
OFFSPRING, SURVIVORS = 6, 2
MAX_SWAPS = 3
FURTHER_BATCHES = 3  # on which survivors and parent are compared

Choices = Iterator[tuple[int, Set]]
Method = Callable[[Problem, int, int], Choices]


def with_strategy(make: Callable[[Problem, int, int], Strategy], problem: Problem, k: int, seed: int) -> Choices:
    """Rounds of a strategy of peft_eas: `SETS_PER_ROUND` sets of its own choice are compared on one batch.

    It is told of no steps, as nothing is trained meanwhile, so that all losses count alike.
    """
    strategy = make(problem, k, seed)
    index = {name: number for number, name in enumerate(problem.candidates)}
    spent = 0
    for batch in _endless_batches(problem, seed):
        sets = strategy.sample_sets(SETS_PER_ROUND)
        strategy.update(sets, [problem.loss(_set(map(index.get, names)), batch) for names in sets])
        spent += len(sets)
        yield spent, _set(map(index.get, strategy.best()))


def thompson_with_hint(problem: Problem, k: int, seed: int) -> ThompsonSampling:
    """Thompson sampling that is told the cosine similarities."""
    strategy = thompson(problem, k, seed)
    strategy.take_hint(dict(zip(problem.candidates, problem.similarities)))
    return strategy


def thompson(problem: Problem, k: int, seed: int) -> ThompsonSampling:
    """Thompson sampling, as `EASSearch` does it."""
    return ThompsonSampling(problem.candidates, k, seed)


def bandit(reward: Reward, problem: Problem, k: int, seed: int) -> AttentionBandit:
    """The paper's bandit."""
    return AttentionBandit(problem.candidates, k, reward=reward, seed=seed)


def cosine(problem: Problem, k: int, seed: int) -> Choices:
    """The attentions that change least what passes them (LLM-Drop, arXiv 2406.15786)."""
    yield 0, _set(_most_similar(problem)[:k])


def single_drops(problem: Problem, k: int, seed: int) -> Choices:
    """Each attention is dropped alone, on one batch after the other; the k of the lowest mean loss are chosen.

    All are compared on the same batches, so that the loss with nothing skipped would not change their order.
    """
    every = range(len(problem.candidates))
    losses: list[list[float]] = [[] for _ in every]
    for batches, batch in enumerate(_endless_batches(problem, seed), start=1):
        for index in every:
            losses[index].append(problem.loss((index,), batch))
        means = [statistics.fmean(own) for own in losses]
        yield batches * len(losses), _set(sorted(every, key=means.__getitem__)[:k])


def random_choice(problem: Problem, k: int, seed: int) -> Choices:
    """Any k."""
    yield 0, _set(random.Random(seed).sample(range(len(problem.candidates)), k))


def evolution(problem: Problem, k: int, seed: int) -> Choices:
    """Evolution by swaps, after EvoPress (Sieberling et al., arXiv 2410.14649), from the choice by cosine similarity.

    In every generation the parent's offspring, each with a few swaps, are compared on one batch; the best of them are
    compared with the parent on further ones, and the best by these is the next parent. As in the paper, the number of
    swaps is the lesser of two draws.
    """
    draw, batches = random.Random(seed), _endless_batches(problem, seed)
    ((spent, parent),) = cosine(problem, k, seed)
    yield spent, parent

    def offspring() -> Set:
        kept = [index for index in range(len(problem.candidates)) if index not in parent]
        most = min(MAX_SWAPS, k, len(kept))
        swaps = min(draw.randint(1, most), draw.randint(1, most))
        gone = draw.sample(parent, swaps)
        return _set([*(index for index in parent if index not in gone), *draw.sample(kept, swaps)])

    while True:
        children, batch = list({offspring(): None for _ in range(OFFSPRING)}), next(batches)
        survivors = sorted(children, key=lambda child: problem.loss(child, batch))[:SURVIVORS]
        further = [next(batches) for _ in range(FURTHER_BATCHES)]
        spent += len(children) + FURTHER_BATCHES * (1 + len(survivors))
        parent = min([parent, *survivors], key=lambda one: sum(problem.loss(one, batch) for batch in further))
        yield spent, parent


def choices_at(budgets: Sequence[int], choices: Choices) -> dict[int, Set]:
    """By budget, the last choice that needed no more evaluations; budgets that reach none are left out."""
    found: dict[int, Set] = {}
    for spent, choice in choices:
        found |= {budget: choice for budget in budgets if spent <= budget}
        if spent >= max(budgets):
            break
    return found


def _most_similar(problem: Problem) -> list[int]:
    every = range(len(problem.candidates))
    return sorted(every, key=problem.similarities.__getitem__, reverse=True)


def _endless_batches(problem: Problem, seed: int) -> Iterator[int]:
    """The search's batches in an order of the seed's, over and over."""
    order = random.Random(f"batches {seed}").sample(range(problem.num_search), problem.num_search)
    while True:
        yield from order


def _set(indices: Any) -> Set:
    return tuple(sorted(indices))


METHODS: dict[str, Method] = {
    "thompson": partial(with_strategy, thompson),
    "thompson, hint": partial(with_strategy, thompson_with_hint),
    "bandit": partial(with_strategy, partial(bandit, "relative")),
    "bandit, exp": partial(with_strategy, partial(bandit, "exp")),
    "single drops": single_drops,
    "evolution": evolution,
    "cosine": cosine,
    "random": random_choice,
}
WITHOUT_SEARCH = ("cosine", "random")  # that need no evaluations
