"""The default search: a regression of log losses on what was skipped, and Thompson sampling of sets."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import regression
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

ROUND, TRAINING = 0, 1  # kinds of observations


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
        hint: by candidate, a number that is expected to grow with its cost, such as −log of one minus its cosine
            similarity; how far it is to be trusted is learned. Default: nothing is expected.
    """

    def __init__(
        self, candidates: Sequence[str], num_skip: int, seed: int = 0, hint: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(candidates, num_skip, seed)
        self.hint = None if hint is None else [float(hint[name]) for name in self.candidates]
        self._steps: list[tuple[int, list[int], float]] = []
        self._posterior = regression.prior(len(self.candidates))

    def costs(self) -> tuple[list[float], list[float]]:
        """Expected increase of the log loss by skipping each candidate, and its standard deviation."""
        return self._posterior.mean.tolist(), self._posterior.deviation.tolist()

    def expected_gain(self) -> float:
        """By how much the log loss of the true best set is expected to be below that of `best()`; 0 when settled."""
        if not self.rounds and not self._steps:
            return math.inf
        draws = self._posterior.mean + self._normal(NUM_JUDGES, fork=True) @ self._posterior.root.T
        chosen = draws[:, self.ranking()[: self.num_skip]].sum(1)
        best = np.sort(draws, 1)[:, : self.num_skip].sum(1)
        return float((chosen - best).mean())

    def spread(self) -> float:
        """Standard deviation of the expected cost of a set drawn at random."""
        num = len(self.candidates)
        factor = self.num_skip * (num - self.num_skip) / max(1, num - 1)
        return float(self._posterior.mean.std() * math.sqrt(factor))

    def figures(self) -> dict[str, float]:
        gain = self.expected_gain()
        return {"eas/expected_gain": gain} if math.isfinite(gain) else {}

    def doubt(self) -> str | None:
        gain = self.expected_gain()
        if gain <= max(SETTLED_LOSS, SETTLED_SHARE * self.spread()):
            return None
        return (
            f"the choice has not settled: another set of {self.num_skip} of {len(self.candidates)} may well have a "
            f"loss that is lower by {1 - math.exp(-gain):.1%}."
        )

    def state_dict(self) -> dict[str, Any]:
        steps = [f"{step} {' '.join(map(str, indices))} {loss!r}" for step, indices, loss in self._steps]
        mean, deviation = self.costs()
        return {**super().state_dict(), "hint": self.hint, "steps": steps, "costs": mean, "deviations": deviation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.hint = state["hint"]
        parts = [text.split() for text in state["steps"]]
        self._steps = [(int(step), [int(index) for index in indices], float(loss)) for step, *indices, loss in parts]
        self._learn()

    def note_step(self, names: Iterable[str], loss: float, step: int) -> None:
        """Takes the loss of a training step with `names` skipped. The costs follow with the next round."""
        indices = self._indices(names)
        if math.isfinite(loss):
            self._steps = [*self._steps[-(MAX_STEPS - 1) :], (step, indices, float(loss))]

    def _draw(self, k: int) -> list[int]:
        costs = self._posterior.mean + self._posterior.root @ self._normal(1)[0]
        return sorted(np.argsort(costs, kind="stable")[:k].tolist())

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
            self._posterior = regression.fit(data, self.num_skip, hint)
            self.scores = (-self._posterior.mean).tolist()

    def _observations(self) -> regression.Observations | None:
        rows = [
            (indices, loss, number, ROUND)
            for number, record in enumerate(self.rounds)
            for indices, loss in zip(record["sets"], record["losses"])
            if loss is not None
        ]
        first = len(self.rounds)
        rows += [(indices, loss, first + i // WINDOW, TRAINING) for i, (_, indices, loss) in enumerate(self._steps)]
        if not rows:
            return None
        skipped = np.zeros((len(rows), len(self.candidates)))
        for row, (indices, *_) in enumerate(rows):
            skipped[row, indices] = 1.0
        losses = np.array([loss for _, loss, _, _ in rows])
        values = np.log(losses) if (losses > 0.0).all() else losses
        _, group = np.unique([number for _, _, number, _ in rows], return_inverse=True)
        _, kind = np.unique([kind for *_, kind in rows], return_inverse=True)
        return regression.Observations(skipped, values, group, kind)


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / max(float(values.std()), 1e-12)
