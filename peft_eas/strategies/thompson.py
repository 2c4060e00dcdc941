"""The default search: a regression of log losses on what was skipped, and Thompson sampling of sets."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from . import regression
from .goal import Goal
from .sets import all_sets, features
from .strategy import Strategy

# A group of training losses: so many steps, over which the training's progress is small beside the batches' noise.
WINDOW = 16
# Of training steps, the last so many count.
MAX_STEPS = 2000
# What skipping costs changes as the adapters learn: a loss counts by this power of its step's share of those so far.
AGEING = 1
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
    """

    def __init__(
        self,
        candidates: Sequence[str],
        num_skip: int | None = None,
        seed: int = 0,
        goal: Goal | None = None,
    ) -> None:
        super().__init__(candidates, num_skip, seed)
        if (num_skip is None) == (goal is None):
            raise ValueError(f"ThompsonSampling(num_skip={num_skip}, goal={goal}): give one of the two.")
        self.goal = Goal("number", num_skip) if goal is None else goal
        self.hint: list[float] | None = None
        self._steps: deque[tuple[int, list[int], float]] = deque(maxlen=MAX_STEPS)
        self._all_sets = all_sets(len(self.candidates))
        self._level = self._level_before = 0.0  # as the last fit left and found it
        num_features = len(self._features([]))
        self._take(regression.prior(num_features))

    @property
    def compares_with_nothing(self) -> bool:
        return self.goal.kind == "cost"

    def sample_sets(self, num: int, k: int | None = None) -> list[list[str]]:
        first = [[]] if self.compares_with_nothing else []
        sets = first + [names for names in super().sample_sets(num - len(first), k) if names]
        if len(sets) == 1 and 0 < len(sets[0]) < len(self.candidates):
            # One set alone tells nothing; a search that is sure of its choice holds it against any other.
            other = sets[0]
            generator = self._random()
            while other == sets[0]:
                other = self._names(sorted(generator.sample(range(len(self.candidates)), len(other))))
            sets.append(other)
        return sets

    def best(self, k: int | None = None) -> list[str]:
        return self._names(self._chosen if k is None else self._cheapest(self._posterior.mean, k))

    def costs(self) -> tuple[list[float], list[float]]:
        """Expected increase of the log loss by skipping each candidate, and its standard deviation."""
        return self._told(self._marginal)

    def costs_against_chosen(self) -> tuple[list[float], list[float]]:
        """As `costs`, against the mean cost of the chosen. While all sets are of one size, only such differences are
        known well: what all candidates cost alike shows nowhere."""
        marginal = self._marginal
        if self._chosen:
            marginal = marginal - marginal[self._chosen].mean(0)
        return self._told(marginal)

    def _told(self, features: np.ndarray) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of what each row of features (S, p) costs."""
        return (features @ self._posterior.mean).tolist(), _norms(features @ self._posterior.root)

    def curve(self, measured: Sequence[Mapping[str, Any]] = ()) -> dict[str, list[float]]:
        """By number of candidates skipped: the expected increase of the log loss against nothing skipped, and its
        standard deviation. Of sets of one size, it stands for the chosen or else the cheapest.

        Args:
            measured: `{"num_skip", "increase", "deviation"}` of sets that were measured. The curve goes through the
                one next to the chosen set; what is missing there is missing elsewhere in proportion to the number.
        """
        numbers = np.arange(len(self.candidates) + 1)
        sets = np.array([self._features(self._cheapest(self._posterior.mean, int(k))) for k in numbers])
        chosen = len(self._chosen)
        sets[chosen] = self._features(self._chosen)
        point = min(measured, key=lambda point: abs(point["num_skip"] - chosen), default=None)
        if point is None:
            share, deviation = numbers / max(1, chosen), 0.0
            missing, relative = self.level, sets
        else:
            share, deviation = numbers / point["num_skip"], point["deviation"] or 0.0
            missing = point["increase"] - float(sets[point["num_skip"]] @ self._posterior.mean)
            relative = sets - share[:, None] * sets[point["num_skip"]]
        deviations = np.hypot(_norms(relative @ self._posterior.root), share * deviation)
        return {
            "num_skip": numbers.tolist(),
            "increase": (sets @ self._posterior.mean + share * missing).tolist(),
            "deviation": deviations.tolist(),
        }

    def expected_gain(self) -> float:
        """By how much the log loss of the true best set is expected to be below that of `best()`; 0 when settled."""
        return self._gain

    def _expected_gain(self) -> float:
        before = self._num_draws
        noise = self._normal(NUM_JUDGES, len(self._posterior.mean))
        self._num_draws = before  # the next draws stay what they are
        # With a cost as the goal, sets of the chosen size are compared.
        k = len(self._chosen) if self.goal.kind == "cost" else None
        chosen, gains = self._features(self._chosen), []
        for costs in self._posterior.mean + noise @ self._posterior.root.T:
            gains.append(float((chosen - self._features(self._cheapest(costs, k))) @ costs))
        return statistics.fmean(gains)

    def spread(self) -> float:
        """Standard deviation of the expected cost of a set drawn at random."""
        num, chosen = len(self.candidates), len(self._chosen)
        factor = chosen * (num - chosen) / max(1, num - 1)
        return statistics.pstdev(self.scores) * math.sqrt(factor)

    def figures(self) -> dict[str, float]:
        gain = self.expected_gain()
        return {"eas/expected_gain": gain} if math.isfinite(gain) else {}

    def doubt(self) -> str | None:
        gain = self.expected_gain()
        if gain <= max(SETTLED_LOSS, SETTLED_SHARE * self.spread()):
            return None
        return (
            f"the choice has not settled: another set of {len(self._chosen)} of {len(self.candidates)} may well "
            f"have a loss that is lower by {1 - math.exp(-gain):.1%}."
        )

    def state_dict(self) -> dict[str, Any]:
        steps = [f"{step} {' '.join(map(str, indices))} {loss!r}" for step, indices, loss in self._steps]
        mean, deviation = self.costs()
        goal = {**asdict(self.goal), "savings": list(self.goal.savings)}
        own = {"hint": self.hint, "goal": goal, "steps": steps, "costs": mean, "deviations": deviation}
        return {**super().state_dict(), **own, "level": self._level_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.goal = Goal(**{**state["goal"], "savings": tuple(state["goal"]["savings"])})
        self.hint = state["hint"]
        parts = [text.split() for text in state["steps"]]
        self._steps.clear()
        for step, *indices, loss in parts:
            self._steps.append((int(step), [int(index) for index in indices], float(loss)))
        self._level = state.get("level", 0.0)
        self._learn()

    def take_hint(self, similarities: Mapping[str, float]) -> None:
        """Takes into account that a candidate's cost may go with how much it changes what passes it.

        How far it does is learnt from the losses; before the first, nothing is expected.

        Args:
            similarities: by candidate, the cosine similarity in front of and behind it, as `attention_similarities`
                returns; empty, to expect nothing.
        """
        if similarities:
            self.hint = [math.log(max(1.0 - similarities[name], 1e-9)) for name in self.candidates]

    def note_step(self, names: Iterable[str], loss: float, step: int) -> None:
        """Takes the loss of a training step with `names` skipped. The costs follow with the next round, or `learn`."""
        indices = self._indices(names)
        if math.isfinite(loss):
            self._steps.append((step, indices, float(loss)))

    def learn(self) -> None:
        """Sets the costs by all that was told."""
        self._learn()

    @property
    def tells_log_losses(self) -> bool:
        """Whether costs are of the log loss: all losses so far are positive. Else they are of the loss itself."""
        losses = [loss for record in self.rounds for loss in record["losses"]] + [loss for *_, loss in self._steps]
        return all(loss > 0.0 for loss in losses if loss is not None)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "ThompsonSampling":
        goal = None if state["num_skip"] is not None else Goal(**state["goal"])
        strategy = cls(state["candidates"], state["num_skip"], goal=goal)
        strategy.load_state_dict(state)
        return strategy

    def _draw(self, k: int | None) -> list[int]:
        costs = self._posterior.mean + self._posterior.root @ self._normal(len(self._posterior.mean))
        if k is None and self.goal.kind == "cost":
            # Never nothing, from which nothing is learnt, and now and then one more or less than is believed in.
            k = min(max(1, len(self._cheapest(costs)) + self._random().choice((-1, 0, 1))), len(self.candidates))
        return self._cheapest(costs, k)

    def _cheapest(self, costs: np.ndarray, k: int | None = None) -> list[int]:
        """The best set for given costs of the features, of k candidates or by the goal."""
        goal = self.goal if k is None else Goal("number", k)
        if self._all_sets is None:
            return goal.choose(costs.tolist(), self.level)
        sets = self._all_sets if goal.kind != "number" else self._all_sets.of_size(int(goal.amount))
        return goal.choose_among(sets.skipped, sets.features @ costs, self.level)

    def _features(self, indices: Sequence[int]) -> np.ndarray:
        skipped = np.zeros((1, len(self.candidates)))
        skipped[0, indices] = 1.0
        return features(skipped)[0]

    @property
    def level(self) -> float:
        """What a set costs beyond the sum of its costs, against nothing skipped; 0 while no round compared the two."""
        return self._level

    @property
    def _standard_hint(self) -> np.ndarray | None:
        if self.hint is None:
            return None
        hint = np.array(self.hint)
        return (hint - hint.mean()) / max(float(hint.std()), 1e-12)

    def _normal(self, *shape: int) -> np.ndarray:
        """Numbers of the standard normal distribution."""
        return np.random.default_rng(self._random().getrandbits(128)).standard_normal(shape)

    def _learn(self) -> None:
        data = self._observations()
        if data is not None:
            self._level_before = self._level
            self._take(regression.fit(data, self._cheapest, self._standard_hint))
            self._level = float(self._posterior.level[REFERRED]) if (data.kind == REFERRED).any() else 0.0

    def _take(self, posterior: regression.Posterior) -> None:
        self._posterior = posterior
        self._chosen = self._cheapest(posterior.mean)
        self.scores = (-self._marginal @ posterior.mean).tolist()
        self._gain = self._expected_gain() if self.rounds or self._steps else math.inf

    @property
    def _marginal(self) -> np.ndarray:
        """(n, p): its product with the costs of features is what each candidate adds to the others that are chosen."""
        rows = []
        for index in range(len(self.candidates)):
            others = [other for other in self._chosen if other != index]
            rows.append(self._features([*others, index]) - self._features(others))
        return np.array(rows)

    def _observations(self) -> regression.Observations | None:
        has_logs = self.tells_log_losses
        rows = []  # a set, its value, its group and kind, and its step
        for number, record in enumerate(self.rounds):
            pairs = [
                (indices, math.log(loss) if has_logs else loss)
                for indices, loss in zip(record["sets"], record["losses"])
                if loss is not None
            ]
            nothing = next((value for indices, value in pairs if not indices), None)
            kind = ROUND if nothing is None else REFERRED
            for indices, value in pairs:
                if nothing is None or indices:
                    rows.append((indices, value - (nothing or 0.0), number, kind, record["step"]))
        first = len(self.rounds)
        for i, (step, indices, loss) in enumerate(self._steps):
            rows.append((indices, math.log(loss) if has_logs else loss, first + i // WINDOW, TRAINING, step))
        if not rows:
            return None
        sets, values, groups, kinds, steps = zip(*rows)
        skipped = np.zeros((len(rows), len(self.candidates)))
        row_of_each = np.repeat(np.arange(len(rows)), [len(indices) for indices in sets])
        skipped[row_of_each, np.concatenate(sets).astype(int)] = 1.0
        _, group = np.unique(groups, return_inverse=True)
        return regression.Observations(
            skipped, features(skipped), np.array(values), group, np.array(kinds), _trust_by_age(steps)
        )


def _trust_by_age(steps: Sequence[int | None]) -> np.ndarray:
    """How much losses of these steps count; those of no step, where nothing is trained, count in full."""
    last = max([1, *(step for step in steps if step is not None)])
    return np.array([1.0 if step is None else (max(step, 1) / last) ** AGEING for step in steps])


def _norms(rows: np.ndarray) -> list[float]:
    return np.sqrt((rows**2).sum(1)).tolist()
