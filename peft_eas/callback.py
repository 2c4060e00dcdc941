"""`EASCallback`: runs the search through Trainer."""

import inspect
import json
import logging
import os
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .bandit import AttentionBandit, Reward, check_search_values
from .model import EASModel
from .reward import RewardSet, choose_reward_set, hold_back
from .trainer import (
    calling_trainer,
    check_labels_reach_model,
    describe_progress,
    forget_best_checkpoint,
    move_to_front,
    saved_record,
)
from .values import is_int, python_number

logger = logging.getLogger(__name__)

SEARCH_FILE = "eas_search.json"


class EASCallback(TrainerCallback, ExportableState):
    """Finds the MHAs to skip while Trainer trains, skips them for good, and freezes the context for the last part.

    Source: arXiv 2403.15226, section 3; see `AttentionBandit` for the search itself. A run goes through four phases:

    - "warm-up": each optimizer step trains with `num_skip` MHAs drawn at random skipped.
    - "search": the same, drawn from p; every `interval` steps, `num_candidates` sets are compared on a held-out batch.
    - "tune": the best set is skipped for good.
    - "frozen": the same, with context="running", so that what is trained is exactly what a merge folds.

    Evaluation and checkpoints during the search see the best set so far, never one that was drawn. A checkpoint holds
    the state of the search: `trainer.train(resume_from_checkpoint=...)` goes on as if it had not been interrupted, on
    a model made by `get_peft_model` as for the first run. Where `EASConfig` gives `skipped_modules`, or `num_skip` is
    0, there is nothing to search and only the context is frozen.

    Trainer's log gets `eas/entropy` (of p, in nats), `eas/loss` and `eas/reward` (mean over the last round's sets of
    the held-out loss and of exp(−loss)), `eas/best` and `eas/phase`; the last two are text and go to
    `state.log_history` alone, as report tools take numbers. The finished search is written to `eas_search.json` in
    `output_dir`.

    Where steps are wanted, an int counts optimizer steps and a float is a fraction of the run.

    Args:
        reward: "relative" compares losses within a round; "exp" is the paper's exp(−loss).
        search_steps: when the search ends.
        warmup_steps: when, within that, rewards begin.
        interval: optimizer steps from one round of rewards to the next.
        num_candidates: sets compared per round.
        score_lr: learning rate η of the scores (2.0; the paper takes 1.0 for VQA).
        score_temperature: temperature κ of the scores.
        reward_dataset: what rewards are computed on, in batches of `per_device_eval_batch_size`. Default: the
            Trainer's eval set (the first, if there are several), whose figures are then slightly selected for. Where
            there is none either, 5 % of the training set, at most 512 samples, are held back from training for it.
        freeze_context_at: when the context is frozen; None for never.
        seed: of all that the search draws. Default: the Trainer's.

    Raises:
        ValueError: for a setting out of range; at the start of training, for settings that do not fit the run.
    """

    def __init__(
        self,
        reward: Reward = "relative",
        search_steps: int | float = 0.3,
        warmup_steps: int | float = 0.1,
        interval: int = 10,
        num_candidates: int = 3,
        score_lr: float = 2.0,
        score_temperature: float = 10.0,
        reward_dataset: Any = None,
        freeze_context_at: int | float | None = 0.8,
        seed: int | None = None,
    ) -> None:
        self.reward: Reward = reward
        self.search_steps = python_number(search_steps)
        self.warmup_steps = python_number(warmup_steps)
        self.interval = python_number(interval)
        self.num_candidates = python_number(num_candidates)
        self.score_lr = python_number(score_lr)
        self.score_temperature = python_number(score_temperature)
        self.reward_dataset = reward_dataset
        self.freeze_context_at = python_number(freeze_context_at)
        self.seed = python_number(seed)
        self._check_arguments()
        self._held_back: Any = None
        self._bandit: AttentionBandit | None = None
        self._reward_set: RewardSet | None = None
        self._reward_source: str | None = None
        self._skipped_modules: list[str] | None = None
        self._warmup_end = self._search_end = 0
        self._freeze_step: int | None = None
        self._shown_phase: str | None = None

    def _check_arguments(self) -> None:
        check_search_values(self.score_temperature, self.score_lr, self.reward)
        _check_steps("search_steps", self.search_steps)
        _check_steps("warmup_steps", self.warmup_steps)
        if self.freeze_context_at is not None:
            _check_steps("freeze_context_at", self.freeze_context_at)
        for name, least in (("interval", 1), ("num_candidates", 2)):
            if not is_int(getattr(self, name), least):
                raise ValueError(
                    f"EASCallback({name}={getattr(self, name)!r}): {name} must be an integer of at least {least}."
                )
        if self.seed is not None and not is_int(self.seed):
            raise ValueError(f"EASCallback(seed={self.seed!r}): seed must be an integer, or None for the Trainer's.")
        data = self.reward_dataset
        is_data = hasattr(data, "__getitem__") or hasattr(data, "__iter__")
        if data is not None and (not is_data or isinstance(data, (str, bytes, dict))):
            raise ValueError(
                f"EASCallback(reward_dataset={data!r}): reward_dataset must be one dataset, such as Trainer takes for "
                "training, or None."
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; see `transformers.trainer_callback.ExportableState`."""
        names = [name for name in inspect.signature(EASCallback).parameters if name != "reward_dataset"]
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}, "record": self.record}

    @property
    def record(self) -> dict[str, Any] | None:
        """The search so far as values for JSON, which `peft_eas.plots` draws; None in a run without a search."""
        if self._bandit is None:
            return None
        return {
            "bandit": self._bandit.state_dict(),
            "skipped_modules": self._skipped_modules,
            "reward_source": self._reward_source,
        }

    # --- events ----------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Holds a slice of the training set back if rewards have to be computed on it."""
        trainer, eas = calling_trainer(), _eas_of(model)
        if self.reward_dataset is not None or trainer.eval_dataset is not None or not _needs_search(eas):
            return
        split = hold_back(trainer.train_dataset, self._seed(args)) if trainer.train_dataset is not None else None
        if split is not None:
            trainer.train_dataset, self._held_back = split
            logger.warning(
                "EAS: there is no reward_dataset and no eval set, so %d of the %d training samples are held back from "
                "training to compute rewards on.",
                len(self._held_back),
                len(self._held_back) + len(trainer.train_dataset),
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Checks the settings against the run, and starts, resumes or leaves out the search."""
        trainer = calling_trainer()
        eas = _eas_of(model)
        config = eas.peft_config[eas.active_adapters[0]]
        if not _is_frozen(eas):
            check_labels_reach_model(trainer, eas)
        move_to_front(trainer, self)

        self._bandit = self._reward_set = self._reward_source = self._shown_phase = None
        self._skipped_modules = config.skipped_modules
        saved = saved_record(state, type(self).__name__)
        if saved is not None or _needs_search(eas):
            self._bandit = AttentionBandit(
                eas.candidates,
                config.num_skip,
                temperature=self.score_temperature,
                lr=self.score_lr,
                reward=self.reward,
                seed=self._seed(args),
            )
            if saved is not None:
                self._resume(eas, saved)
            elif state.global_step > 0:
                raise ValueError(
                    f"The checkpoint of step {state.global_step} holds no search to resume: it was written without "
                    "EASCallback. Start the run anew, or name the MHAs to skip in EASConfig(skipped_modules=...)."
                )
        elif config.skipped_modules is None and config.num_skip:  # all candidates: there is nothing to choose
            eas.fix_skipped_modules(eas.candidates)
        self._set_schedule(state.max_steps)
        if self._is_searching:
            self._reward_set = choose_reward_set(trainer, self.reward_dataset, self._held_back, self._seed(args))
            self._reward_source = self._reward_set.source
            if saved is not None and saved["reward_source"] != self._reward_source:
                raise ValueError(
                    f"The search was rewarded on the {saved['reward_source']}, but this run offers the "
                    f"{self._reward_source}. Give Trainer and EASCallback the same data as in the first run, and "
                    "leave restore_callback_states_from_checkpoint off: the callback resumes without it."
                )
            eas.set_skipped_modules(self._bandit.best())
        self._freeze_if_due(eas, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Draws the skip set to train with; it stays the same over the micro-batches of an optimizer step."""
        if self._is_searching:
            _eas_of(model).set_skipped_modules(self._bandit.sample())
        self._show_phase(state, model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Computes rewards, ends the search, freezes the context, each when its time has come."""
        eas = _eas_of(model)
        eas.sync_context()
        if self._is_searching:
            steps = state.global_step - self._warmup_end
            if steps > 0 and steps % self.interval == 0:
                sets = self._bandit.sample_sets(self.num_candidates)
                losses = self._reward_set.losses(sets, number=len(self._bandit.rounds))
                self._bandit.update(sets, losses, step=state.global_step)
                eas.peft_config[eas.active_adapters[0]].note_scores(self._scores)
            eas.set_skipped_modules(self._bandit.best())
            if state.global_step >= self._search_end:
                self._fix(args, state, eas)
        self._freeze_if_due(eas, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Ends a search that training did not reach the end of."""
        if self._is_searching:
            logger.warning(
                "EAS: training stopped at step %d, before the search was over at step %d. The best MHAs so far are "
                "skipped; the adapters have not been trained with them fixed.",
                state.global_step,
                self._search_end,
            )
            self._fix(args, state, _eas_of(model))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds where the search stands to Trainer's training log."""
        if not logs or "loss" not in logs:
            return
        numbers, texts = {}, {"eas/phase": self._phase(state.global_step, kwargs["model"])}
        if self._bandit is not None:
            numbers["eas/entropy"] = self._bandit.entropy()
            texts["eas/best"] = ", ".join(self._skipped_modules or self._bandit.best())
            if self._bandit.mean_loss() is not None:
                numbers |= {"eas/loss": self._bandit.mean_loss(), "eas/reward": self._bandit.mean_reward()}
        logs.update(numbers)
        state.log_history[-1].update(numbers | texts)  # Trainer has copied `logs` there already

    # --- the search ------------------------------------------------------------------------------------------------

    @property
    def _is_searching(self) -> bool:
        return self._bandit is not None and self._skipped_modules is None

    @property
    def _scores(self) -> dict[str, float]:
        return dict(zip(self._bandit.candidates, self._bandit.scores))

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed if self.seed is None else self.seed

    def _set_schedule(self, max_steps: int) -> None:
        """Turns fractions into steps. Raises a ValueError where they leave no room for a round, or overlap."""
        self._search_end = _to_steps(self.search_steps, max_steps)
        self._warmup_end = _to_steps(self.warmup_steps, max_steps)
        self._freeze_step = None if self.freeze_context_at is None else _to_steps(self.freeze_context_at, max_steps)
        if not self._is_searching:
            return
        if not self._warmup_end + self.interval <= self._search_end <= max_steps:
            raise ValueError(
                f"A search that ends at step {self._search_end} (search_steps={self.search_steps}) with rewards every "
                f"{self.interval} steps (interval) from step {self._warmup_end} on (warmup_steps={self.warmup_steps}) "
                f"does not fit into a run of {max_steps} steps, or has no rewards. Lower interval or warmup_steps, "
                "change search_steps, or train for longer."
            )
        if self._freeze_step is not None and self._freeze_step < self._search_end:
            raise ValueError(
                f"freeze_context_at={self.freeze_context_at} is step {self._freeze_step}, before the search is over "
                f"at step {self._search_end} (search_steps={self.search_steps}). Freeze later, or search for less."
            )

    def _resume(self, eas: EASModel, saved: dict[str, Any]) -> None:
        self._bandit.load_state_dict(saved["bandit"])
        self._reward_source = saved["reward_source"]
        if saved["skipped_modules"] is not None:
            eas.fix_skipped_modules(saved["skipped_modules"])
            self._skipped_modules = eas.skipped_modules
            self._note_scores(eas)
        elif self._skipped_modules is not None:
            raise ValueError(
                "The checkpoint is from the middle of a search, but this model's skip set is fixed already "
                f"({self._skipped_modules}), so the adapters to search with are gone. Make the model by "
                "get_peft_model with num_skip, as for the first run, and resume with that."
            )

    def _fix(self, args: TrainingArguments, state: TrainerState, eas: EASModel) -> None:
        # The optimizer keeps the parameters that are dropped here; without gradients it never touches them again.
        # When a run is resumed, Trainer makes the optimizer for a model that still has every adapter, loads its saved
        # state, and only then calls a callback: the two fit each other because none ever leaves a parameter out.
        eas.fix_skipped_modules(self._bandit.best())
        self._skipped_modules = eas.skipped_modules
        self._note_scores(eas)
        forget_best_checkpoint(state)
        logger.info("EAS: skipping %s from step %d on.", ", ".join(self._skipped_modules), state.global_step)
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            with open(os.path.join(args.output_dir, SEARCH_FILE), "w", encoding="utf-8") as file:
                json.dump(self.record, file, indent=1, sort_keys=True)  # as in trainer_state.json

    def _freeze_if_due(self, eas: EASModel, state: TrainerState) -> None:
        due = self._freeze_step is not None and self._freeze_step <= state.global_step
        if due and not _is_frozen(eas):
            eas.freeze_context()
            forget_best_checkpoint(state)

    def _phase(self, step: int, model: nn.Module) -> str:
        if self._is_searching:
            return "warm-up" if step < self._warmup_end else "search"
        return "frozen" if _is_frozen(_eas_of(model)) else "tune"

    def _note_scores(self, eas: EASModel) -> None:
        """Leaves the scores in the adapter's config, where its model card finds them."""
        eas.peft_config[eas.active_adapters[0]].scores = self._scores

    def _show_phase(self, state: TrainerState, model: nn.Module) -> None:
        phase = self._phase(state.global_step, model)
        if phase == self._shown_phase:
            return
        self._shown_phase = phase
        logger.info("EAS: %s from step %d of %d on.", phase, state.global_step, state.max_steps)
        describe_progress(calling_trainer(), f"EAS {phase}")


def _eas_of(model: nn.Module) -> EASModel:
    eas = getattr(model, "base_model", None)
    if not isinstance(eas, EASModel):
        raise TypeError(
            f"EASCallback was given a {type(model).__name__} without EAS adapters. Pass Trainer the model that "
            "get_peft_model(model, EASConfig(...)) returns."
        )
    return eas


def _needs_search(eas: EASModel) -> bool:
    config = eas.peft_config[eas.active_adapters[0]]
    return config.skipped_modules is None and 0 < (config.num_skip or 0) < len(eas.candidates)


def _is_frozen(eas: EASModel) -> bool:
    return eas.peft_config[eas.active_adapters[0]].context == "running"


def _check_steps(name: str, value: Any) -> None:
    least = 0 if name == "warmup_steps" else 1
    is_steps = is_int(value, least)
    is_fraction = isinstance(value, float) and (0.0 < value <= 1.0 or value == least == 0)
    if not (is_steps or is_fraction):
        raise ValueError(
            f"EASCallback({name}={value!r}): {name} must be an integer of at least {least} (optimizer steps) or a "
            f"float {'from 0.0' if least == 0 else 'above 0.0'} to 1.0 (fraction of the run)."
        )


def _to_steps(value: int | float, max_steps: int) -> int:
    return round(value * max_steps) if isinstance(value, float) else value
