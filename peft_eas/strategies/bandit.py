"""The paper's search for the MHAs that a task can do without: a bandit over MHAs.

Source: Wu et al., "Not All Attention is Needed" (arXiv 2403.15226), section 3.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..values import is_finite
from .strategy import Strategy, exp_reward

Reward = Literal["relative", "exp"]
REWARDS = ("relative", "exp")

# How far a set that is one typical spread better than its round moves the scores, in units of the learning rate. A
# larger gain settles on the first sets that look good; from 0.05 to 0.15 simulated searches end equally well.
RELATIVE_GAIN = 0.1
# A set counts for at most this many spreads, so that an outlier cannot settle the search alone.
MAX_SPREADS = 3.0
# The typical spread is the median over this many rounds: it follows the training, and an outlier does not move it.
SPREAD_WINDOW = 10
# A search has told its candidates apart where the likeliest is drawn this many times as often as the unlikeliest. In
# simulated searches for 12 of 29 candidates one round of three sets leads to 1.2 times, ten to 2.5.
LEAST_RATIO = 1.25


class AttentionBandit(Strategy):
    """A score σ for each candidate. Skip sets are drawn by the scores; in the end, the highest ones are skipped.

    Scores start at 0. With p = softmax(κ σ), a round of sets j with losses ℓ_j moves, for every candidate i in set j,

        σ_i += η · advantage_j · p_i (1 − p_i)

    with p as it was at the start of the round. The advantage depends on the reward:

    - "exp" (the paper): v_j − mean(v) with v = exp(−ℓ). Where losses are large or tiny, all v are nearly the same
      (exp(−8) is 3e-4, exp(−0.01) is 0.99), and p stays nearly flat.
    - "relative": (mean(ℓ) − ℓ_j) / s, at most 3 either way, times 0.1, where s is the median over the last 10 rounds
      of the losses' standard deviation within a round. It stays the same if all losses are multiplied by a number,
      or shifted by one.

    Args:
        candidates: names of the MHAs that may be skipped, in layer order.
        num_skip: number k of MHAs in a set.
        temperature: κ; higher draws the leading candidates more often.
        lr: learning rate η of the scores (the paper's 2.0; 1.0 for VQA).
        reward: "relative" or "exp".
        seed: of all draws.

    Attributes:
        scores: σ, in the order of the candidates.

    Raises:
        ValueError: for a value out of range.
    """

    grows = False  # as in the paper

    def __init__(
        self,
        candidates: Sequence[str],
        num_skip: int,
        temperature: float = 10.0,
        lr: float = 2.0,
        reward: Reward = "relative",
        seed: int = 0,
    ) -> None:
        super().__init__(candidates, num_skip, seed)
        check_search_values(temperature, lr, reward)
        self.temperature = temperature
        self.lr = lr
        self.reward = reward

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

    def trajectory(self) -> Iterator[tuple[dict[str, Any], list[float]]]:
        """Goes through the search again: yields each round and the scores after it."""
        scores = [0.0] * len(self.candidates)
        for number, record in enumerate(self.rounds):
            scores = self._moved(scores, number)
            yield record, scores

    def figures(self) -> dict[str, float]:
        return {"eas/entropy": self.entropy()}

    def doubt(self) -> str | None:
        p = self.probabilities()
        if max(p) >= LEAST_RATIO * min(p):
            return None
        return (
            f"the search has hardly told the {len(p)} candidates apart (entropy {self.entropy():.3f} of at most "
            f"{math.log(len(p)):.3f}), so that what is skipped is little better than drawn at random. "
            f"Set strategy='thompson'{' or reward=' + repr('relative') if self.reward == 'exp' else ''}."
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "temperature": self.temperature, "lr": self.lr, "reward": self.reward}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.temperature, self.lr, self.reward = state["temperature"], state["lr"], state["reward"]

    def _draw(self, k: int) -> list[int]:
        rng = self._random()
        # The k largest of log p_i + Gumbel noise are k draws from p without replacement; unlike those, they need no
        # division by what is left of p, which underflows once p has settled. κ σ is log p but for a constant.
        keys = [self.temperature * score - math.log(-math.log(rng.random() or 0.5)) for score in self.scores]
        return sorted(sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:k])

    def _learn(self) -> None:
        self.scores = self._moved(self.scores, len(self.rounds) - 1)

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
            mean = statistics.fmean(exp_reward(loss) for loss in finite)
            return [None if loss is None else exp_reward(loss) - mean for loss in losses]
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
