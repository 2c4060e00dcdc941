"""The search for the MHAs that a task can do without: a bandit over MHAs, in plain numbers.

Source: Wu et al., "Not All Attention is Needed" (arXiv 2403.15226), section 3. Nothing here knows of models or
tensors; `EASSearch` turns training into losses, and this turns losses into a skip set.
"""

import math
import random
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from ..values import is_finite

Reward = Literal["relative", "exp"]
REWARDS = ("relative", "exp")

# How far a set that is one typical spread better than its round moves the scores, in units of the learning rate. A
# larger gain settles on the first sets that look good; from 0.05 to 0.15 simulated searches end equally well.
RELATIVE_GAIN = 0.1
# A set counts for at most this many spreads, so that an outlier cannot settle the search alone.
MAX_SPREADS = 3.0
# The typical spread is the median over this many rounds: it follows the training, and an outlier does not move it.
SPREAD_WINDOW = 10
# Tries at drawing a set that is not drawn yet, before a round goes on with fewer sets.
MAX_DRAWS = 100


class AttentionBandit:
    """A score σ for each candidate. Skip sets are drawn by the scores; in the end, the highest ones are skipped.

    Scores start at 0. With p = softmax(κ σ), a round of sets j with losses ℓ_j moves, for every candidate i in set j,

        σ_i += η · advantage_j · p_i (1 − p_i)

    with p as it was at the start of the round. The advantage depends on the reward:

    - "exp" (the paper): v_j − mean(v) with v = exp(−ℓ). Where losses are large or tiny, all v are nearly the same
      (exp(−8) is 3e-4, exp(−0.01) is 0.99), and p stays nearly flat.
    - "relative": (mean(ℓ) − ℓ_j) / s, at most 3 either way, times 0.1, where s is the median over the last 10 rounds
      of the losses' standard deviation within a round. It stays the same if all losses are multiplied by a number,
      or shifted by one.

    Every random number depends on the seed and the number of draws so far alone, so that the whole state is a few
    plain values.

    Args:
        candidates: names of the MHAs that may be skipped, in layer order.
        num_skip: number k of MHAs in a set.
        temperature: κ; higher draws the leading candidates more often.
        lr: learning rate η of the scores (the paper's 2.0; 1.0 for VQA).
        reward: "relative" or "exp".
        seed: of all draws.

    Attributes:
        scores: σ, in the order of the candidates.
        rounds: what was seen, per round `{"step", "sets", "losses"}`, with sets as lists of indices and None for a
            loss that was not finite.
        num_nonfinite: number of losses that were NaN or infinite and therefore left out.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        num_skip: int,
        temperature: float = 10.0,
        lr: float = 2.0,
        reward: Reward = "relative",
        seed: int = 0,
    ) -> None:
        candidates = list(candidates)
        if not candidates or len(set(candidates)) < len(candidates):
            raise ValueError(f"candidates={candidates} must name at least one MHA, and each only once.")
        if not 0 <= num_skip <= len(candidates):
            raise ValueError(
                f"num_skip={num_skip} is out of range: there are {len(candidates)} candidates. Choose 0 to "
                f"{len(candidates)}."
            )
        check_search_values(temperature, lr, reward)
        self.candidates = candidates
        self.num_skip = num_skip
        self.temperature = temperature
        self.lr = lr
        self.reward = reward
        self.seed = seed
        self.scores = [0.0] * len(candidates)
        self.rounds: list[dict[str, Any]] = []
        self.num_nonfinite = 0
        self._num_draws = 0

    def probabilities(self) -> list[float]:
        """p = softmax(κ σ), in the order of the candidates."""
        return self.softmax(self.scores)

    def softmax(self, scores: list[float]) -> list[float]:
        """softmax(κ σ) of other scores σ than the present ones."""
        top = max(scores)
        weights = [math.exp(self.temperature * (score - top)) for score in scores]
        total = sum(weights)
        return [weight / total for weight in weights]

    def entropy(self) -> float:
        """Entropy of p in nats: log(number of candidates) at the start, towards log(k) as k candidates stand out."""
        return -sum(p * math.log(p) for p in self.probabilities() if p > 0)

    def sample(self, k: int | None = None) -> list[str]:
        """Draws k distinct candidates (default `num_skip`) from p without replacement; returns them in layer order."""
        return self._names(self._draw(self.num_skip if k is None else k))

    def sample_sets(self, num: int, k: int | None = None) -> list[list[str]]:
        """Draws `num` distinct sets of k candidates; fewer where there are fewer, or where p allows hardly any other.

        A round of one set says nothing about any other, so there is nothing to learn where k is 0 or all candidates.
        """
        k = self.num_skip if k is None else k
        num = min(num, math.comb(len(self.candidates), k))
        sets: list[list[int]] = []
        for _ in range(MAX_DRAWS):
            if len(sets) == num:
                break
            drawn = self._draw(k)
            if drawn not in sets:
                sets.append(drawn)
        return [self._names(drawn) for drawn in sets]

    def update(self, sets: Sequence[Iterable[str]], losses: Sequence[float], step: int | None = None) -> None:
        """Moves the scores by the losses of a round of sets, one loss per set; `step` is kept in the record.

        A loss that is NaN or infinite is warned about, counted, and left out with its set. Where fewer than two are
        left, or all are equal, the scores stay.

        Raises:
            ValueError: if sets and losses differ in number, or a set names what is not a candidate.
        """
        indices = [self._indices(names) for names in sets]
        if len(indices) != len(losses):
            raise ValueError(f"{len(indices)} sets came with {len(losses)} losses. Give one loss per set.")
        values = [float(loss) if math.isfinite(loss) else None for loss in losses]
        bad = values.count(None)
        if bad:
            self.num_nonfinite += bad
            warnings.warn(
                f"The search left out {bad} of {len(values)} skip sets of a round because their loss is NaN or "
                f"infinite ({self.num_nonfinite} so far). If this goes on, lower the learning rate or look at the "
                "reward data.",
                stacklevel=2,
            )
        self.rounds.append({"step": step, "sets": indices, "losses": values})
        self.scores = self._moved(self.scores, len(self.rounds) - 1)

    def best(self, k: int | None = None) -> list[str]:
        """The k candidates (default `num_skip`) of highest score, in layer order.

        Among equal scores the later layer is taken: pretrained models need their first attentions the most.
        """
        k = self.num_skip if k is None else k
        ranked = sorted(range(len(self.scores)), key=lambda i: (self.scores[i], i), reverse=True)
        return self._names(sorted(ranked[:k]))

    def mean_reward(self) -> float | None:
        """Mean of exp(−loss) over the sets of the last round, None before the first and if no loss was finite."""
        losses = [loss for loss in self.rounds[-1]["losses"] if loss is not None] if self.rounds else []
        return statistics.fmean(_exp_reward(loss) for loss in losses) if losses else None

    def mean_loss(self) -> float | None:
        """Mean loss over the sets of the last round, None before the first and if no loss was finite."""
        losses = [loss for loss in self.rounds[-1]["losses"] if loss is not None] if self.rounds else []
        return statistics.fmean(losses) if losses else None

    def trajectory(self) -> Iterator[tuple[dict[str, Any], list[float]]]:
        """Goes through the search again: yields each round and the scores after it."""
        scores = [0.0] * len(self.candidates)
        for number, record in enumerate(self.rounds):
            scores = self._moved(scores, number)
            yield record, scores

    def state_dict(self) -> dict[str, Any]:
        """The complete state as values that JSON keeps exactly. Sets are written as text, a line each in a file."""
        return {
            "candidates": list(self.candidates),
            "num_skip": self.num_skip,
            "temperature": self.temperature,
            "lr": self.lr,
            "reward": self.reward,
            "seed": self.seed,
            "scores": list(self.scores),
            "num_nonfinite": self.num_nonfinite,
            "num_draws": self._num_draws,
            "rounds": [
                {**record, "sets": [" ".join(map(str, indices)) for indices in record["sets"]]}
                for record in self.rounds
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state of `state_dict`; the next draws and updates are those that would have followed it.

        Raises:
            ValueError: if the state is of a search over other candidates, or for another number of MHAs to skip.
        """
        for name in ("candidates", "num_skip"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The saved search has {name}={state[name]!r}, but this one has {getattr(self, name)!r}. Resume "
                    "with the model and EASConfig that the search was started with, or start anew."
                )
        self.temperature, self.lr, self.reward = state["temperature"], state["lr"], state["reward"]
        self.seed, self._num_draws = state["seed"], state["num_draws"]
        self.scores, self.num_nonfinite = list(state["scores"]), state["num_nonfinite"]
        self.rounds = [
            {**record, "sets": [[int(index) for index in text.split()] for text in record["sets"]]}
            for record in state["rounds"]
        ]

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "AttentionBandit":
        """A bandit in the given state of `state_dict`."""
        bandit = cls(state["candidates"], state["num_skip"])
        bandit.load_state_dict(state)
        return bandit

    def _names(self, indices: Iterable[int]) -> list[str]:
        return [self.candidates[index] for index in indices]

    def _indices(self, names: Iterable[str]) -> list[int]:
        names = list(names)
        unknown = [name for name in names if name not in self.candidates]
        if unknown or len(set(names)) < len(names):
            what = f"holds {unknown}, which are no candidates" if unknown else f"{names} names an MHA twice"
            raise ValueError(f"A set {what}. Candidates are {self.candidates}; name each at most once.")
        return sorted(self.candidates.index(name) for name in names)

    def _draw(self, k: int) -> list[int]:
        if not 0 <= k <= len(self.candidates):
            raise ValueError(f"A set of k={k} MHAs was asked for, of {len(self.candidates)} candidates.")
        # A text is hashed whole, so that neighbouring seeds and draws have nothing in common.
        rng = random.Random(f"{self.seed}/{self._num_draws}")
        self._num_draws += 1
        # The k largest of log p_i + Gumbel noise are k draws from p without replacement; unlike those, they need no
        # division by what is left of p, which underflows once p has settled. κ σ is log p but for a constant.
        keys = [self.temperature * score - math.log(-math.log(rng.random() or 0.5)) for score in self.scores]
        return sorted(sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:k])

    def _moved(self, scores: list[float], number: int) -> list[float]:
        """The scores after round `number`, given those before it."""
        record = self.rounds[number]
        if sum(loss is not None for loss in record["losses"]) < 2:
            return list(scores)
        p = self.softmax(scores)
        moved = list(scores)
        for indices, advantage in zip(record["sets"], self._advantages(number)):
            for i in indices if advantage is not None else ():
                moved[i] += self.lr * advantage * p[i] * (1.0 - p[i])
        return moved

    def _advantages(self, number: int) -> list[float | None]:
        losses = self.rounds[number]["losses"]
        finite = [loss for loss in losses if loss is not None]
        if self.reward == "exp":
            mean = statistics.fmean(_exp_reward(loss) for loss in finite)
            return [None if loss is None else _exp_reward(loss) - mean for loss in losses]
        mean = statistics.fmean(finite)
        spread = self._typical_spread(number)
        if spread == 0.0:
            return [0.0 for _ in losses]
        return [
            None if loss is None else RELATIVE_GAIN * max(-MAX_SPREADS, min(MAX_SPREADS, (mean - loss) / spread))
            for loss in losses
        ]

    def _typical_spread(self, number: int) -> float:
        """Median over the last rounds of the losses' spread, or that of round `number` alone where it is 0."""
        rounds = self.rounds[max(0, number - SPREAD_WINDOW + 1) : number + 1]
        finite = [[loss for loss in record["losses"] if loss is not None] for record in rounds]
        spreads = [statistics.pstdev(losses) for losses in finite if len(losses) > 1]
        return statistics.median(spreads) or spreads[-1]


def check_search_values(temperature: float, lr: float, reward: str) -> None:
    """Raises a ValueError for a search setting that is out of range."""
    for name, value in (("temperature", temperature), ("lr", lr)):
        if not is_finite(value) or value <= 0:
            raise ValueError(f"The search's score {name} is {value!r}; it must be a finite number above 0.")
    if reward not in REWARDS:
        raise ValueError(f"reward={reward!r} is unknown. Choose one of {', '.join(map(repr, REWARDS))}.")


def _exp_reward(loss: float) -> float:
    return math.exp(min(-loss, 700.0))  # a float ends at exp(709)
