"""`EASSearch`: the search in a training loop of your own. It knows nothing of Trainer."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..evaluation import from_all_ranks
from ..model import EASModel
from ..skippable import eas_of, needs_search
from ..strategies import Strategy
from ..strategies.bandit import Reward
from ..strategies.goal import Goal
from ..values import python_number
from .choice import goal_of, new_strategy, resumed_strategy, savings_of_batches
from .held_out import HeldOutLosses, as_scalar
from .optimizer import begin_all_states, forget
from .outlook import tell_of_choice, tell_of_no_search, tell_of_search, wanted_rounds
from .rounds import NO_ROUNDS, Rounds
from .savings import Savings
from .schedule import (
    AUTO_END,
    SETTINGS,
    SETTLED_ROUNDS,
    FreezeAt,
    Schedule,
    StrategyName,
    check_settings,
    default_interval,
)

logger = logging.getLogger(__name__)


class EASSearch:
    """Finds the MHAs to skip while a model trains, skips them for good, and freezes the context.

    Source: arXiv 2403.15226, section 3. Its bandit is one strategy, `AttentionBandit`; the default is another,
    `ThompsonSampling`. A run goes through the phases:

    - "warm-up": each optimizer step trains with MHAs skipped that the strategy draws, at first at random. Their
      number grows from none to `num_skip`, which is reached after two thirds of the search, so that the adapters learn
      the task before much is taken away. (With strategy="bandit" it is `num_skip` from the start.)
    - "search": the same; every `interval` steps, `num_candidates` sets of `num_skip` are compared on a held-out batch.
    - "tune": the best set is skipped for good, and the context is not frozen yet. By default there is no such phase.
    - "frozen": the best set is skipped for good, with context="running": what is trained is exactly what a merge
      folds. With context="none" there is nothing to freeze, and the run ends in "tune".

    Between the warm-up and the freeze the context is annealed: in training and in rewards, each prompt's own mean
    gives way, step by step, to the running mean of all prompts. By default the freeze comes when the search ends, so
    that the last rewards compare what a merge leaves. A sudden freeze can make a set useless: each prompt's own
    context may have stood in for skipped attentions between two modalities, which a mean of all prompts cannot.

    Call `before_step()` before the forward pass and `after_step()` after the optimizer's step:

        search = EASSearch(model, num_steps, lambda batch: model(**batch).loss, held_out)
        for batch in loader:
            search.before_step()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            search.after_step(loss)

    Between the two the model skips the set that was drawn, with annealed contexts; at all other times the best set so
    far, with those of `EASConfig(context=...)`. An `EASModel` also shows those between the two, once it is switched to
    evaluation mode, saved or merged; so it does where an exception or Ctrl+C ends a step. Where `EASConfig` gives
    `skipped_modules`, or `num_skip` is 0 or all, there is nothing to search; the context is annealed and frozen.

    Give the optimizer all parameters from the start. Some adapters are dropped at the end of the search; their
    parameters get no gradient from then on.

    In a distributed run, make one `EASSearch` on every rank, with the same arguments. All ranks draw the same sets.
    Losses are averaged over the ranks, and after each step the running contexts are, too. `DistributedDataParallel`
    needs `find_unused_parameters=True`.

    To resume, make model, optimizer and search as for the first run. Load the state of the search first, then those of
    the model and the optimizer, because the first drops the adapters that the saved model no longer had. `num_steps`
    and settings may be others; what is over stays over: the warm-up, the search, and a context that is frozen.

    For settings in steps, an int is a number of optimizer steps, and a float a fraction of the run.

    Args:
        model: what `get_peft_model(model, EASConfig(...))` returned, or any other `Skippable` module; accelerate may
            have prepared it.
        num_steps: optimizer steps of the whole run.
        batch_loss: a function that returns the model's present loss on one held-out batch, as a number or a tensor of
            one element. It is given the batch; without `batches`, the number of the batch, 0, 1, … It is called in
            evaluation mode and without gradients, `num_candidates` times per batch. Not needed if nothing is searched.
        batches: held-out batches, taken in turn and over again; in a distributed run, this rank's.
        optimizer: what trains the model. The parameters of dropped adapters are taken out of it. Needed if its state
            is saved by the parameters' names, as with FSDP; then also when resuming.
        strategy: how sets are proposed and judged. "thompson" (the default) learns from training losses as well, and
            finds better sets from fewer rounds; "bandit" is the paper's; or your own subclass of `peft_eas.Strategy`.
        reward: of the bandit: "relative" compares losses within a round; "exp" is the paper's exp(−loss).
        search_steps: the step at which the search ends. "auto": at 0.3 of the run, or as soon as the choice has been
            settled for some rounds, which leaves more steps to train with it.
        warmup_steps: the step at which rewards, and the annealing of the context, begin; before `search_steps`.
        interval: optimizer steps from one round of rewards to the next. A run has (search_steps − warmup_steps) /
            interval rounds. Default: 32, or as many as make four sets for each candidate, and in long searches one
            round every 32 steps.
        num_candidates: sets compared per round.
        score_lr: of the bandit: learning rate η of the scores (2.0; the paper takes 1.0 for VQA).
        score_temperature: of the bandit: temperature κ of the scores.
        freeze_context_at: when the context is frozen: "search_end" is at `search_steps`, even if nothing is searched;
            or a later step; or never (None), for a merge that keeps each prompt's own context.
        seed: of all that the search draws.
        savings: what skipping each candidate saves, as `measure_time` or `count_kv_bytes` returns it, or a function
            that returns it. Used with `EASConfig(target_speedup=...)` or `target_kv_cache`. Default: measured at the
            shapes of the first of `batches`.
        state: what `state_dict` returned, to go on from as by `load_state_dict`. Given here, it also tells which of
            the settings are no longer to fit the run.

    Attributes:
        step: optimizer steps done.
        held_out: what it is rewarded on: `held_out.batch_loss` and `held_out.batches`.

    Raises:
        TypeError: for a model without EAS adapters that is no `Skippable` either.
        ValueError: for a setting out of range or one that does not fit the run or the model, which is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        num_steps: int,
        batch_loss: Callable[[Any], torch.Tensor | float] | None = None,
        batches: Sequence[Any] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        strategy: StrategyName | type[Strategy] = "thompson",
        reward: Reward = "relative",
        search_steps: int | float | Literal["auto"] = 0.3,
        warmup_steps: int | float = 0.1,
        interval: int | None = None,
        num_candidates: int = 3,
        score_lr: float = 2.0,
        score_temperature: float = 10.0,
        freeze_context_at: FreezeAt = "search_end",
        seed: int = 0,
        savings: Savings | Callable[[], Savings] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        given = locals()
        settings = {name: python_number(given[name]) for name in SETTINGS}
        check_settings(type(self).__name__, **settings)
        self._ends_when_settled = settings["search_steps"] == "auto"
        if self._ends_when_settled:
            settings["search_steps"] = AUTO_END
        self.model = model
        self.eas = eas_of(model, type(self).__name__, type(self).__name__)
        self.num_steps = num_steps
        self.held_out = HeldOutLosses(model, self.eas, batch_loss, batches, seed)
        self.optimizer = optimizer
        self.num_candidates = settings["num_candidates"]
        self.step = 0
        self._rounds: Rounds | None = None
        self._has_begun = False
        self._savings: dict[str, Any] | None = None
        config = self.eas.active_config
        if (config.num_skip or 0) > len(self.eas.candidates):
            raise ValueError(
                f"num_skip={config.num_skip} of {len(self.eas.candidates)} candidates are to be skipped. Give at most "
                "as many as there are."
            )
        self._skipped_modules = config.skipped_modules
        if needs_search(self.eas):
            saved_goal = ((state or {}).get("strategy") or {}).get("goal") or {"kind": "number"}
            is_saved = saved_goal["kind"] != "number"
            goal = Goal(**saved_goal) if is_saved else goal_of(config, partial(self._measured, savings))
            new = new_strategy(settings, self.eas.candidates, config.num_skip, goal, seed)
            self._rounds = Rounds(new, self._losses, self.num_candidates)
        if config.context != "prompt":  # nothing to freeze
            settings["freeze_context_at"] = None
        self._schedule = self._resumed_schedule(Schedule.of(settings, num_steps), state)
        is_open = state is None or (state["skipped_modules"] is None and state["step"] < self._schedule.search_end)
        goes_on = self.is_searching and is_open
        rounds = wanted_rounds(self.strategy, self.num_candidates) if goes_on else None
        self.interval = settings["interval"] or default_interval(self._schedule, rounds or 1)
        self._schedule.check(settings, num_steps, self.interval, rounds)
        if isinstance(self.eas, EASModel):
            self.eas.awaits_freeze = self._schedule.freeze_step is not None
        if self.is_searching:
            self.held_out.check()
        elif config.skipped_modules is None and config.num_skip:  # all of them: nothing to choose
            self.eas.fix_skipped_modules(self.eas.candidates)
        if self.is_searching and optimizer is not None:
            begin_all_states(optimizer)
        self._anneal_context(0.0)
        self._end_step()  # a run before may have been interrupted within one
        if state is not None:
            self.load_state_dict(state)
        elif self.is_searching:
            tell_of_search(self.strategy, self._schedule, settings, num_steps, self.interval)
        elif config.skipped_modules is None and config.num_skip is None:
            tell_of_no_search(len(self.eas.candidates))

    # --- the course of a run ---------------------------------------------------------------------------------------

    @property
    def strategy(self) -> Strategy | None:
        """The search's scores and rounds; None if there is nothing to search."""
        return None if self._rounds is None else self._rounds.strategy

    @property
    def is_searching(self) -> bool:
        """Whether the search goes on: in the phases "warm-up" and "search"."""
        return self._rounds is not None and self._skipped_modules is None

    @property
    def bandit(self) -> Strategy | None:
        """The strategy, by the name that it had when there was one alone."""
        return self.strategy

    @property
    def phase(self) -> str:
        """The phase that the run is in: "warm-up", "search", "tune" or "frozen"."""
        if self.is_searching:
            return "warm-up" if self.step < self._schedule.warmup_end else "search"
        return "frozen" if self.eas.active_config.context == "running" else "tune"

    def before_step(self) -> None:
        """Draws the skip set to train with, and anneals the context. Within one optimizer step only the first call
        does, so that it may be called before every micro-batch."""
        if self._has_begun:
            return
        self._has_begun = True
        share = self._schedule.running_share(self.step)
        is_prompt = self.eas.active_config.context == "prompt"
        growth = self._schedule.growth(self.step)
        names = self._rounds.drawn(self.step, growth) if self.is_searching else self.eas.skipped_modules
        self._step_set = names
        if isinstance(self.eas, EASModel):
            if self.is_searching or is_prompt:
                self.eas.begin_step(names, share if is_prompt else 0.0)
            return
        self._anneal_context(share)
        if self.is_searching:
            self.eas.set_skipped_modules(names)

    def after_step(self, loss: torch.Tensor | float | None = None) -> None:
        """Makes the ranks' contexts equal, computes rewards, ends the search, freezes the context: each when its time
        has come. Call once per optimizer step.

        Args:
            loss: this rank's training loss of the step, a number or a tensor of one element, from which the search
                learns as well; with several micro-batches, their mean. None: it learns from held-out batches alone.
        """
        self.step += 1
        if loss is not None and self.is_searching and self._has_begun:
            self._rounds.note(self._step_set, self.step, from_all_ranks(as_scalar(loss, self.model)))
        self._end_step()
        self.eas.sync_context()
        if self.is_searching:
            rewarded_steps = self.step - self._schedule.warmup_end
            if rewarded_steps > 0 and rewarded_steps % self.interval == 0:
                self._compare()
            if self.step >= self._schedule.search_end or self._rounds.num_settled >= SETTLED_ROUNDS:
                self._end_search()
                logger.info("EAS: skipping %s from step %d on.", ", ".join(self._skipped_modules), self.step)
        if self._is_freeze_due:
            self.eas.freeze_context()
            self._schedule = self._schedule._replace(freeze_step=self.step)

    def finish(self) -> None:
        """Ends a step that training left half done, and, with a warning, a search that it did not reach the end of.

        Called again, it does nothing.
        """
        self._end_step()
        if self.is_searching:
            logger.warning(
                "EAS: training stopped at step %d, before the search was over at step %d. The best MHAs so far are "
                "skipped; the adapters have not been trained with them fixed, nor with a frozen context.",
                self.step,
                self._schedule.search_end,
            )
            self._end_search()

    def figures(self) -> dict[str, float | str]:
        """Where the run stands, for a log.

        `eas/phase`; and where there is a search, `eas/best`; from the first round on `eas/loss` and `eas/reward` (mean
        over the last round's sets of the held-out loss and of exp(−loss)), and `eas/expected_gain` (by how much the
        logarithm of the loss may still fall by a better choice); of the bandit `eas/entropy` (of p, in nats). After
        the search they stay as they are.
        """
        figures: dict[str, float | str] = {"eas/phase": self.phase}
        if self.strategy is not None:
            figures |= self.strategy.figures()
            best = self.strategy.best() if self._skipped_modules is None else self._skipped_modules
            figures["eas/best"] = ", ".join(best)
            if self.strategy.mean_loss() is not None:
                figures |= {"eas/loss": self.strategy.mean_loss(), "eas/reward": self.strategy.mean_reward()}
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The state between two steps as values that JSON keeps exactly; `peft_eas.plots` draws it as well."""
        config = self.eas.active_config
        return {
            "step": self.step,
            **(NO_ROUNDS if self._rounds is None else self._rounds.state_dict()),
            "skipped_modules": self._skipped_modules,
            "savings": self._savings,
            "budget": config.budget and list(config.budget),
            "schedule": self._schedule._asdict(),
            "is_frozen": config.context == "running",
            "context_recorded": getattr(config, "context_recorded", False),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of `state_dict`, and brings the model to where it was then, but for its weights.

        Raises:
            ValueError: for the state of another search than this model needs.
        """
        strategy = resumed_strategy(self.strategy, state, self.eas, self._skipped_modules)
        self._savings = state.get("savings")
        if strategy is not None:
            self._rounds = Rounds(strategy, self._losses, self.num_candidates, state)
            if state["skipped_modules"] is None:
                self.eas.set_skipped_modules(strategy.best())
            else:
                self._fix(state["skipped_modules"])
        self._schedule = self._resumed_schedule(self._schedule, state)
        self.step = state["step"]
        self._end_step()
        # Earlier versions' states do not tell; there the schedule does.
        if self.eas.active_config.context == "prompt" and state.get("is_frozen", self._is_freeze_due):
            self.eas.freeze_context(is_resumed=True)
            self.eas.active_config.context_recorded = state.get("context_recorded", False)

    @staticmethod
    def _resumed_schedule(schedule: Schedule, state: dict[str, Any] | None) -> Schedule:
        if state is None or "schedule" not in state:  # as in earlier versions' states
            return schedule
        return schedule.resumed(Schedule(**state["schedule"]), state["step"])

    def _measured(self, given: Savings | Callable[[], Savings] | None) -> Savings:
        if given is None:
            given = savings_of_batches(self.eas.active_config, self.model, self.held_out.batches)
        savings = given() if callable(given) else given
        values = list(savings.saved.values())
        self._savings = {"unit": savings.unit, "total": savings.base, "per_candidate": values}
        return savings

    # --- the search ------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        is_grown = not self.strategy.grows or self._schedule.growth(self.step) == 1.0
        self._rounds.compare(self.step, may_settle=self._ends_when_settled and is_grown)
        self.eas.set_skipped_modules(self.strategy.best())
        self.eas.active_config.note_scores(self._rounds.scores)

    def _losses(self, sets: Sequence[Sequence[str]], number: int) -> list[float]:
        """The loss with each set skipped, on held-out batch `number`. All is afterwards what it was."""
        self._anneal_context(self._schedule.running_share(self.step))
        try:
            return self.held_out(sets, number)
        finally:
            self._anneal_context(0.0)
            self._end_step()

    def _end_search(self) -> None:
        self._fix(self._rounds.choose(self.step, self.held_out.num_batches))
        self._schedule = self._schedule._replace(search_end=self.step)
        tell_of_choice(self.strategy, len(self._skipped_modules), self._rounds.measured, self.interval)

    def _fix(self, names: Sequence[str]) -> None:
        # An optimizer that is not given keeps the parameters that are dropped here; without gradients it never touches
        # them again. When a run is resumed, the optimizer is made for a model that still has every adapter; Trainer
        # loads its saved state before any callback is called, and the two fit because none ever left a parameter out.
        before = list(self.eas.parameters())
        self.eas.fix_skipped_modules(names)
        if self.optimizer is not None:
            forget(self.optimizer, set(before) - set(self.eas.parameters()))
        self._skipped_modules = self.eas.skipped_modules
        # In the adapter's config, its model card finds them.
        self.eas.active_config.scores = self._rounds.scores
        self.eas.active_config.search = self._summary()

    def _summary(self) -> dict[str, Any]:
        """What the config keeps of a finished search."""
        state = self.state_dict()
        own = {"strategy": state["strategy"]["strategy"], "unit": self._rounds.unit}
        return {**own, **{name: state[name] for name in ("curve", "measured", "savings")}}

    def _end_step(self) -> None:
        self._has_begun = False
        if isinstance(self.eas, EASModel):
            self.eas.end_step()
        else:
            self._anneal_context(0.0)
        if self.is_searching and list(self.eas.skipped_modules) != self.strategy.best():
            self.eas.set_skipped_modules(self.strategy.best())

    def _anneal_context(self, share: float) -> None:
        if self.eas.active_config.context == "prompt":
            self.eas.anneal_context(share)

    @property
    def _is_freeze_due(self) -> bool:
        freeze_step = self._schedule.freeze_step
        return freeze_step is not None and freeze_step <= self.step and self.eas.active_config.context == "prompt"
