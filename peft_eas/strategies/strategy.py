"""`Strategy`: how a search proposes sets and learns from their losses."""

import math
import random
import statistics
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

from .goal import cheapest_first

# Tries at drawing a set that is not drawn yet, before a round goes on with fewer sets.
MAX_DRAWS = 100

T = TypeVar("T", bound="Strategy")


class Strategy(ABC):
    """Proposes sets of candidates to skip, takes their losses, and ranks the candidates.

    `EASSearch` turns training into losses; a strategy turns losses into a skip set. It knows nothing of models or
    tensors. Your own is a subclass with `_draw` and `_learn`; pass the class as `strategy=`. Every random
    number must come from `_random()`, so that the state is a few plain values, and all ranks draw alike.

    Args:
        candidates: names of what may be skipped, in layer order.
        num_skip: number k of candidates in a set; None where a strategy decides itself.
        seed: of all draws.

    Attributes:
        grows: of the class: whether training begins with nothing skipped, and the sets to train with grow to their
            full size during the search.
        scores: a number for each candidate, in their order; the highest are skipped in the end.
        rounds: what was seen, per round `{"step", "sets", "losses"}`, with sets as lists of indices and None for a
            loss that was not finite.
        num_nonfinite: number of losses that were NaN or infinite and therefore left out.

    Raises:
        ValueError: for a value out of range.
    """

    grows: ClassVar[bool] = True

    def __init__(self, candidates: Sequence[str], num_skip: int | None, seed: int = 0) -> None:
        candidates = list(candidates)
        if not candidates or len(set(candidates)) < len(candidates):
            raise ValueError(f"candidates={candidates} must name at least one MHA, and each only once.")
        if num_skip is not None and not 0 <= num_skip <= len(candidates):
            raise ValueError(
                f"num_skip={num_skip} is out of range: there are {len(candidates)} candidates. Choose 0 to "
                f"{len(candidates)}."
            )
        self.candidates = candidates
        self.num_skip = num_skip
        self.seed = seed
        self.scores = [0.0] * len(candidates)
        self.rounds: list[dict[str, Any]] = []
        self.num_nonfinite = 0
        self._num_draws = 0

    # --- what a strategy decides -----------------------------------------------------------------------------------

    @abstractmethod
    def _draw(self, k: int | None) -> list[int]:
        """A set of k candidates to try, as ascending indices; k is None only where `num_skip` is."""

    @abstractmethod
    def _learn(self) -> None:
        """Sets `scores` anew, given the last of `rounds` as well."""

    @property
    def compares_with_nothing(self) -> bool:
        """Whether rounds must tell what sets cost against nothing skipped, not only against each other."""
        return False

    def figures(self) -> dict[str, float]:
        """What a log tells of the course of the search."""
        return {}

    def doubt(self) -> str | None:
        """Why the choice is not to be relied on yet, as a sentence that goes on after "after 9 rounds"; else None.

        A strategy without a `doubt` of its own never ends a search with `search_steps="auto"` early.
        """
        return None

    # --- what the search calls -------------------------------------------------------------------------------------

    def sample(self, k: int | None = None) -> list[str]:
        """Draws a set of k distinct candidates (default `num_skip`) to train with, in layer order."""
        return self._names(self._checked_draw(self.num_skip if k is None else k))

    def sample_sets(self, num: int, k: int | None = None) -> list[list[str]]:
        """Draws `num` distinct sets of k candidates; fewer where there are fewer, or where hardly any other is drawn.

        A round of one set says nothing about any other, so there is nothing to learn where k is 0 or all candidates.
        """
        k = self.num_skip if k is None else k
        num = min(num, 2 ** len(self.candidates) if k is None else math.comb(len(self.candidates), k))
        sets: list[list[int]] = []
        for _ in range(MAX_DRAWS):
            if len(sets) == num:
                break
            drawn = self._checked_draw(k)
            if drawn not in sets:
                sets.append(drawn)
        return [self._names(drawn) for drawn in sets]

    def update(self, sets: Sequence[Iterable[str]], losses: Sequence[float], step: int | None = None) -> None:
        """Learns from the losses of a round: one loss per set, all on the same batch.

        `step` is how far the model's training had got; it is kept in the record, and what a model has learned since
        may make old losses count less. None: the model is not trained.

        A loss that is NaN or infinite is warned about, counted, and left out with its set.

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
        self._learn()

    def note_step(self, names: Iterable[str], loss: float, step: int) -> None:
        """Takes the loss of a training step with `names` skipped. It may be NaN or infinite; here it is not used.

        Raises:
            ValueError: if `names` has what is not a candidate.
        """
        self._indices(names)

    def best(self, k: int | None = None) -> list[str]:
        """The k candidates (default `num_skip`) of highest score, in layer order.

        Among equal scores the later layer is taken: pretrained models need their first attentions the most.
        """
        return self._names(sorted(self.ranking()[: self.num_skip if k is None else k]))

    def ranking(self) -> list[int]:
        """Indices of the candidates, the one to skip first at the front."""
        return cheapest_first([-score for score in self.scores])

    def mean_reward(self) -> float | None:
        """Mean of exp(−loss) over the sets of the last round, None before the first and if no loss was finite."""
        return statistics.fmean(map(exp_reward, self._last_losses())) if self._last_losses() else None

    def mean_loss(self) -> float | None:
        """Mean loss over the sets of the last round, None before the first and if no loss was finite."""
        return statistics.fmean(self._last_losses()) if self._last_losses() else None

    def state_dict(self) -> dict[str, Any]:
        """The complete state as values that JSON keeps exactly. Sets are written as text, a line each in a file."""
        return {
            "strategy": type(self).__name__,
            "candidates": list(self.candidates),
            "num_skip": self.num_skip,
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
            ValueError: if the state is of a search over other candidates, for another number of MHAs to skip, or by
                another strategy.
        """
        present = {"strategy": type(self).__name__, "candidates": self.candidates, "num_skip": self.num_skip}
        saved = {"strategy": "AttentionBandit", **state}  # which earlier versions' states do not name
        for name, value in present.items():
            if saved[name] != value:
                raise ValueError(
                    f"The saved search has {name}={saved[name]!r}, but this one has {value!r}. Resume with the model, "
                    "EASConfig and strategy that the search was started with, or start anew."
                )
        self.seed, self._num_draws, self.num_nonfinite = state["seed"], state["num_draws"], state["num_nonfinite"]
        self.scores = list(state["scores"])
        self.rounds = [
            {**record, "sets": [[int(index) for index in text.split()] for text in record["sets"]]}
            for record in state["rounds"]
        ]

    @classmethod
    def from_state_dict(cls: type[T], state: dict[str, Any]) -> T:
        """A strategy of this class in the given state of `state_dict`."""
        strategy = cls(state["candidates"], state["num_skip"])
        strategy.load_state_dict(state)
        return strategy

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _random(self) -> random.Random:
        """A generator that depends on the seed and the number of draws so far alone."""
        # A text is hashed whole, so that neighbouring seeds and draws have nothing in common.
        generator = random.Random(f"{self.seed}/{self._num_draws}")
        self._num_draws += 1
        return generator

    def _checked_draw(self, k: int | None) -> list[int]:
        if k is not None and not 0 <= k <= len(self.candidates):
            raise ValueError(f"A set of k={k} MHAs was asked for, of {len(self.candidates)} candidates.")
        return self._draw(k)

    def _last_losses(self) -> list[float]:
        return [loss for loss in self.rounds[-1]["losses"] if loss is not None] if self.rounds else []

    def _names(self, indices: Iterable[int]) -> list[str]:
        return [self.candidates[index] for index in indices]

    def _indices(self, names: Iterable[str]) -> list[int]:
        names = list(names)
        unknown = [name for name in names if name not in self.candidates]
        if unknown or len(set(names)) < len(names):
            what = f"holds {unknown}, which are no candidates" if unknown else f"{names} names an MHA twice"
            raise ValueError(f"A set {what}. Candidates are {self.candidates}; name each at most once.")
        return sorted(self.candidates.index(name) for name in names)


def exp_reward(loss: float) -> float:
    """The paper's reward, exp(−loss)."""
    return math.exp(min(-loss, 700.0))  # a float ends at exp(709)
