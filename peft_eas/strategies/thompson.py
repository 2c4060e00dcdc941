"""The default search: a regression of log losses on what was skipped, and Thompson sampling of sets."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from . import regression
from .goal import Goal, cheapest_first
from .strategy import Strategy

# A group of training losses: so many steps, over which the training's progress is small beside the batches' noise.
WINDOW = 16
# Of training steps, the last so many count: what skipping costs changes as the adapters learn.
MAX_STEPS = 2000
# A choice is settled where a better one is expected to lower the log loss by no more than 1 %, or than this share of
# how much sets differ.
SETTLED_LOSS, SETTLED_SHARE = 0.01, 0.05
# Draws by which is judged how much a better set could gain.
NUM_JUDGES = 200

# Kinds of observations: a round; one with nothing skipped among its sets, to which the others refer; a training loss.
ROUND, REFERRED, TRAINING = 0, 1, 2


class ThompsonSampling(Strategy):
    """A cost for each candidate: by how much skipping it raises the log of the loss.

    The loss of a set is taken as log ℓ = level + effect of the batch + Σ costs of the skipped + noise, so that rounds
    of sets on one held-out batch and, with more noise, training losses tell of the costs. `regression.fit` gives their
    distribution. A set to try is the cheapest by costs drawn from it (Thompson sampling): sets that may be the best
    are tried, others hardly ever. In the end the cheapest by the mean costs is chosen; scores are minus these. If any
    loss is 0 or less, as those that are negative rewards, the loss itself takes the place of its logarithm.

    Source: Thompson sampling for combinatorial linear bandits, Wen, Kveton and Ashkan, "Efficient Learning in
    Large-Scale Combinatorial Semi-Bandits" (arXiv 1406.7443), with one loss for a whole set.

    Args:
        candidates, num_skip, seed: as of every `Strategy`.
        goal: what decides how many are skipped, in place of `num_skip`.
        hint: by candidate, a number that is expected to grow with its cost, such as −log of one minus its cosine
            similarity; how far it is to be trusted is learned. Default: nothing is expected.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        num_skip: int | None = None,
        seed: int = 0,
        hint: Mapping[str, float] | None = None,
        goal: Goal | None = None,
    ) -> None:
        super().__init__(candidates, num_skip, seed)
        if (num_skip is None) == (goal is None):
            raise ValueError(f"ThompsonSampling(num_skip={num_skip}, goal={goal}): give one of the two.")
        self.goal = Goal("number", num_skip) if goal is None else goal
        self.hint = None if hint is None else [float(hint[name]) for name in self.candidates]
        self._steps: list[tuple[int, list[int], float]] = []
        self._posterior = regression.prior(len(self.candidates))
        self._level = 0.0

    @property
    def compares_with_nothing(self) -> bool:
        """Whether rounds must tell what sets cost against nothing skipped, not only against each other."""
        return self.goal.kind == "cost"

    def sample_sets(self, num: int, k: int | None = None) -> list[list[str]]:
        if not self.compares_with_nothing:
            return super().sample_sets(num, k)
        return [[], *(names for names in super().sample_sets(num - 1, k) if names)]

    def best(self, k: int | None = None) -> list[str]:
        return super().best(k) if k is not None else self._names(self._chosen())

    def costs(self) -> tuple[list[float], list[float]]:
        """Expected increase of the log loss by skipping each candidate, and its standard deviation."""
        return self._posterior.mean.tolist(), self._posterior.deviation.tolist()

    def curve(self) -> dict[str, list[float]]:
        """By number of candidates skipped, the cheapest first: the expected increase of the log loss against nothing
        skipped, and its standard deviation."""
        order, chosen = cheapest_first(self._posterior.mean.tolist()), max(1, len(self._chosen()))
        numbers = range(len(order) + 1)
        # The level belongs to sets of about the chosen size; with nothing skipped there is none.
        costs = [self._posterior.mean[order[:k]].sum() + self.level * min(1.0, k / chosen) for k in numbers]
        deviations = [float(np.linalg.norm(self._posterior.root[order[:k]].sum(0))) for k in numbers]
        return {"num_skip": list(numbers), "increase": [float(cost) for cost in costs], "deviation": deviations}

    def expected_gain(self) -> float:
        """By how much the log loss of the true best set is expected to be below that of `best()`; 0 when settled."""
        if not self.rounds and not self._steps:
            return math.inf
        draws = self._posterior.mean + self._normal(NUM_JUDGES, fork=True) @ self._posterior.root.T
        chosen = self._chosen()
        others = self.goal if self.goal.kind == "saving" else Goal("number", len(chosen))
        return float(np.mean([draw[chosen].sum() - draw[others.choose(draw)].sum() for draw in draws]))

    def spread(self) -> float:
        """Standard deviation of the expected cost of a set drawn at random."""
        num, chosen = len(self.candidates), len(self._chosen())
        factor = chosen * (num - chosen) / max(1, num - 1)
        return float(self._posterior.mean.std() * math.sqrt(factor))

    def figures(self) -> dict[str, float]:
        gain = self.expected_gain()
        return {"eas/expected_gain": gain} if math.isfinite(gain) else {}

    def doubt(self) -> str | None:
        gain = self.expected_gain()
        if gain <= max(SETTLED_LOSS, SETTLED_SHARE * self.spread()):
            return None
        return (
            f"the choice has not settled: another set of {len(self._chosen())} of {len(self.candidates)} may well "
            f"have a loss that is lower by {1 - math.exp(-gain):.1%}."
        )

    def state_dict(self) -> dict[str, Any]:
        steps = [f"{step} {' '.join(map(str, indices))} {loss!r}" for step, indices, loss in self._steps]
        mean, deviation = self.costs()
        own = {"hint": self.hint, "goal": asdict(self.goal), "steps": steps, "costs": mean, "deviations": deviation}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.goal = Goal(**{**state["goal"], "savings": tuple(state["goal"]["savings"])})
        self.hint = state["hint"]
        parts = [text.split() for text in state["steps"]]
        self._steps = [(int(step), [int(index) for index in indices], float(loss)) for step, *indices, loss in parts]
        self._learn()

    def note_step(self, names: Iterable[str], loss: float, step: int) -> None:
        """Takes the loss of a training step with `names` skipped. The costs follow with the next round."""
        indices = self._indices(names)
        if math.isfinite(loss):
            self._steps = [*self._steps[-(MAX_STEPS - 1) :], (step, indices, float(loss))]

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ThompsonSampling":
        goal = None if state["num_skip"] is not None else Goal(**state["goal"])
        strategy = cls(state["candidates"], state["num_skip"], goal=goal)
        strategy.load_state_dict(state)
        return strategy

    def _draw(self, k: int | None) -> list[int]:
        costs = self._posterior.mean + self._posterior.root @ self._normal(1)[0]
        return self._chosen(costs.tolist()) if k is None else Goal("number", k).choose(costs.tolist())

    def _chosen(self, costs: list[float] | None = None) -> list[int]:
        """The best set by the expected costs, or by others."""
        return self.goal.choose(self._posterior.mean.tolist() if costs is None else costs, self.level)

    @property
    def level(self) -> float:
        """What a set costs beyond the sum of its costs, against nothing skipped; 0 while no round compared the two."""
        return self._level

    def _normal(self, num: int, fork: bool = False) -> np.ndarray:
        """(num, n) numbers of the standard normal distribution; with `fork`, the next draws stay what they are."""
        before = self._num_draws
        generator = np.random.default_rng(self._random().getrandbits(128))
        if fork:
            self._num_draws = before
        return generator.standard_normal((num, len(self.candidates)))

    def _learn(self) -> None:
        data = self._observations()
        if data is not None:
            hint = None if self.hint is None else _standardised(np.array(self.hint))
            self._posterior = regression.fit(data, self._best_for_fit, hint)
            self._level = float(self._posterior.level[REFERRED]) if (data.kind == REFERRED).any() else 0.0
            self.scores = (-self._posterior.mean).tolist()

    def _best_for_fit(self, costs: np.ndarray) -> list[int]:
        return self.goal.choose(costs.tolist(), self._level)

    def _observations(self) -> regression.Observations | None:
        losses = [loss for record in self.rounds for loss in record["losses"]] + [loss for *_, loss in self._steps]
        has_logs = all(loss > 0.0 for loss in losses if loss is not None)
        rows = []
        for number, record in enumerate(self.rounds):
            pairs = [
                (indices, math.log(loss) if has_logs else loss)
                for indices, loss in zip(record["sets"], record["losses"])
                if loss is not None
            ]
            nothing = next((value for indices, value in pairs if not indices), None)
            if nothing is None:
                rows += [(indices, value, number, ROUND) for indices, value in pairs]
            else:
                rows += [(indices, value - nothing, number, REFERRED) for indices, value in pairs if indices]
        first = len(self.rounds)
        for i, (_, indices, loss) in enumerate(self._steps):
            rows.append((indices, math.log(loss) if has_logs else loss, first + i // WINDOW, TRAINING))
        if not rows:
            return None
        skipped = np.zeros((len(rows), len(self.candidates)))
        for row, (indices, *_) in enumerate(rows):
            skipped[row, indices] = 1.0
        _, group = np.unique([number for _, _, number, _ in rows], return_inverse=True)
        kind = np.array([kind for *_, kind in rows])
        return regression.Observations(skipped, np.array([value for _, value, _, _ in rows]), group, kind)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-12)
