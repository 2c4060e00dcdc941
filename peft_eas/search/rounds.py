"""What a search asks of its strategy, and tells it: sets to train with, rounds of rewards, and the choice."""

from typing import Any

import torch

from ..reporting.search_result import Unit
from ..strategies import Strategy, ThompsonSampling
from .check import Losses, checked_choice

# Where sets are held against nothing skipped, every fourth step trains that, or it would fall behind as a measure.
STEPS_PER_WHOLE = 4

# The state of a run without a search.
NO_ROUNDS: dict[str, Any] = {"strategy": None, "curve": None, "measured": [], "pending": [], "num_settled": 0}


class Rounds:
    """The strategy of a search, with what it has not been told yet.

    Args:
        losses: the losses of sets on the held-out batch of a number.
        num_candidates: sets compared per round.
        state: what `state_dict` returned, to go on from; `strategy` is at that state already.

    Attributes:
        measured: what the choice was measured to cost, as `checked_choice` returns it.
        num_settled: rounds on end after which the choice was settled, of those that were asked.
    """

    def __init__(
        self, strategy: Strategy, losses: Losses, num_candidates: int, state: dict[str, Any] = NO_ROUNDS
    ) -> None:
        self.strategy = strategy
        self.losses = losses
        self.num_candidates = num_candidates
        # States of earlier versions have not all of it.
        self.measured: list[dict[str, Any]] = list(state.get("measured", []))
        self.num_settled: int = state.get("num_settled", 0)
        # Training losses since the last round, as (set, step, loss by rank).
        self._pending = [(names, step, torch.tensor(losses)) for names, step, losses in state.get("pending", [])]

    @property
    def scores(self) -> dict[str, float]:
        """By candidate."""
        return dict(zip(self.strategy.candidates, self.strategy.scores))

    @property
    def unit(self) -> Unit | None:
        """Of the curve, which only Thompson sampling has."""
        if not isinstance(self.strategy, ThompsonSampling):
            return None
        return "log loss" if self.strategy.tells_log_losses else "loss"

    def drawn(self, step: int, growth: float) -> list[str]:
        """The set to train a step with, of `growth` times the full size."""
        if self.strategy.compares_with_nothing and step % STEPS_PER_WHOLE == 0:
            return []
        if growth == 1.0 or not self.strategy.grows:
            return self.strategy.sample()
        return self.strategy.sample(round(growth * max(1, len(self.strategy.best()))))

    def note(self, names: list[str], step: int, losses: torch.Tensor) -> None:
        """Keeps the training losses of a step by rank, of which the strategy learns with the next round."""
        self._pending.append((names, step, losses))

    def compare(self, step: int, may_settle: bool) -> None:
        """A round of rewards: a few sets on one held-out batch.

        Args:
            may_settle: whether to ask if the choice is settled.

        Raises:
            ValueError: for losses that are not positive, where one may rise by a share of it.
        """
        self._pass_on()
        sets = self.strategy.sample_sets(self.num_candidates)
        losses = self.losses(sets, len(self.strategy.rounds))
        if self.strategy.compares_with_nothing and not self.strategy.rounds and min(losses) <= 0.0:
            raise ValueError(
                f"max_loss_increase is a share of the loss, but on held-out batches the loss is {min(losses):g}, as a "
                "reward's may be. Give num_skip, target_speedup or target_kv_cache in its place."
            )
        self.strategy.update(sets, losses, step=step)
        if may_settle and type(self.strategy).doubt is not Strategy.doubt:  # which has none, whatever was seen
            self.num_settled = 0 if self.strategy.doubt() else self.num_settled + 1

    def choose(self, step: int, num_batches: int | None) -> list[str]:
        """The set to skip for good; `num_batches` are held out, if that is known."""
        self._pass_on()
        if not isinstance(self.strategy, ThompsonSampling):
            return self.strategy.best()
        self.strategy.learn()
        chosen, self.measured = checked_choice(self.strategy, self.losses, step, num_batches)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """The state as values that JSON keeps exactly."""
        is_model = isinstance(self.strategy, ThompsonSampling)
        return {
            "strategy": self.strategy.state_dict(),
            "curve": self.strategy.curve(self.measured) if is_model else None,
            "measured": self.measured,
            "pending": [[names, step, losses.tolist()] for names, step, losses in self._pending],
            "num_settled": self.num_settled,
        }

    def _pass_on(self) -> None:
        for names, step, losses in self._pending:
            self.strategy.note_step(names, losses.cpu().double().mean().item(), step)
        self._pending = []
