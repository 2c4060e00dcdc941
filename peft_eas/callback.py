"""`EASCallback`: runs the search through Trainer."""

import inspect
import json
import logging
import os
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .model import EASModel
from .search.choice import savings_of
from .search.fitting import fit_in_trainer
from .search.loop import EASSearch
from .search.rewards import RewardSet, choose_reward_set, hold_back
from .search.savings import Savings
from .search.schedule import SETTINGS, FreezeAt, StrategyName, check_settings
from .search.trainer import (
    TrainingLosses,
    calling_trainer,
    check_context_of_batches,
    check_generation,
    describe_progress,
    forget_best_checkpoint,
    move_to_front,
    saved_search,
)
from .search.workload import check_shapes
from .skippable import eas_of, needs_search
from .strategies import Strategy
from .strategies.bandit import Reward
from .values import is_int, python_number

logger = logging.getLogger(__name__)

# Of Adam, for adapters that are trained from scratch: below this they learn next to nothing in an ordinary run.
LEAST_LEARNING_RATE = 3e-4

SEARCH_FILE = "eas_search.json"
# Of a search's state, what tells of the search itself.
RECORDED = ("strategy", "skipped_modules", "curve", "measured", "savings", "schedule")


class EASCallback(TrainerCallback, ExportableState):
    """Runs the search, `EASSearch`, while Trainer trains.

    Before the first step, adapters are fitted to stand for their MHAs (`fit_tokens`). The run then goes through the
    phases "warm-up", "search" and "frozen", which `EASSearch` explains. With
    `freeze_context_at`, "tune" comes before the last, or is the last. Evaluation and checkpoints during the search see
    the best set so far, never one that was drawn, and each prompt's own context, never an annealed one; so they and a
    merge do after Ctrl+C or an exception, and `finish()` then ends the search. A checkpoint holds the state of the
    search: `trainer.train(resume_from_checkpoint=...)` goes on as if it had not been interrupted, on a model made by
    `get_peft_model` as for the first run. If `EASConfig` gives `skipped_modules`, or `num_skip` is 0, nothing is
    searched; the context is still annealed and frozen, so that the merge is exact. Any other `Skippable` model is
    searched in the same way.

    Trainer's log gets `EASSearch.figures()`: `eas/expected_gain`, `eas/loss`, `eas/reward` and `eas/best` until the
    search is over, and `eas/phase` always. The last two are text, and report tools take numbers, so these go to
    `state.log_history` alone. The finished search is written to `eas_search.json` in `output_dir`.

    Args:
        strategy, reward, search_steps, warmup_steps, interval, num_candidates, score_lr, score_temperature,
            freeze_context_at: as in `EASSearch`.
        reward_dataset: what rewards are computed on, in batches of `per_device_eval_batch_size`. Default: the
            Trainer's eval set (the first, if there are several). The search then chooses what does well on that set,
            so its figures come out slightly too good. Without an eval set, 5 % of the training set, at most 512
            samples, are held back. The loss of a batch is what the Trainer computes in its own evaluation; of
            completions that it generates and scores (TRL's GRPO, RLOO), whose loss tells nothing of the model, minus
            their mean reward.
        seed: for everything that the search draws. Default: the Trainer's.
        workload: with `EASConfig(target_speedup=...)` or `target_kv_cache`, what the model is to be fast at:
            "batch_size", "prompt_tokens" and "new_tokens", as of `measure_time`. Default: one forward pass over a
            batch of rewards.
        fit_tokens: how many tokens of training batches the adapters are fitted to before the first step, as by
            `fit_adapters`; adapters that are trained already are left as they are. 0: they begin as the identity, as
            in the paper.

    Raises:
        ValueError: for a setting out of range; at the start of training, for settings that do not fit the run.
    """

    def __init__(
        self,
        reward: Reward = "relative",
        search_steps: int | float | Literal["auto"] = 0.3,
        warmup_steps: int | float = 0.1,
        interval: int | None = None,
        num_candidates: int = 3,
        score_lr: float = 2.0,
        score_temperature: float = 10.0,
        reward_dataset: Any = None,
        freeze_context_at: FreezeAt = "search_end",
        seed: int | None = None,
        strategy: StrategyName | type[Strategy] = "thompson",
        workload: dict[str, int] | None = None,
        fit_tokens: int = 8192,
    ) -> None:
        self.strategy = strategy
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
        self.workload = workload
        self.fit_tokens = python_number(fit_tokens)
        self._check_arguments()
        self._held_back: Any = None
        self._search: EASSearch | None = None
        self._reward_set: RewardSet | None = None
        self._reward_source: str | None = None
        self._shown_phase: str | None = None
        self._fit_errors: dict[str, float] | None = None
        self._losses: TrainingLosses | None = None
        self._run: tuple[TrainingArguments, TrainerState] | None = None

    def _check_arguments(self) -> None:
        check_settings(type(self).__name__, **{name: getattr(self, name) for name in SETTINGS})
        if self.seed is not None and not is_int(self.seed):
            raise ValueError(f"EASCallback(seed={self.seed!r}): seed must be an integer, or None for the Trainer's.")
        if not is_int(self.fit_tokens, 0):
            raise ValueError(
                f"EASCallback(fit_tokens={self.fit_tokens!r}): fit_tokens must be an integer of at least 1, or 0 for "
                "adapters that begin as the identity."
            )
        shapes = {"batch_size": None, "prompt_tokens": None, "new_tokens": 0}
        if self.workload is not None and not (isinstance(self.workload, dict) and self.workload.keys() <= set(shapes)):
            raise ValueError(
                f"EASCallback(workload={self.workload!r}): workload must be a dict of batch_size, prompt_tokens and "
                "new_tokens, or None."
            )
        check_shapes(**{**shapes, **(self.workload or {})})
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
        arguments = {name: getattr(self, name) for name in names}
        if isinstance(self.strategy, type):
            arguments["strategy"] = self.strategy.__name__
        state = {} if self._search is None else self._search.state_dict()
        record = self.record
        # Without a search there is no record, but a schedule there is.
        left_out = {"step", *RECORDED} - (set() if record else {"schedule"})
        course = {name: value for name, value in state.items() if name not in left_out}
        if self._fit_errors is not None:
            course["fit_errors"] = self._fit_errors
        return {"args": arguments, "attributes": {}, "record": record, "course": course}

    @property
    def record(self) -> dict[str, Any] | None:
        """The search so far as values for JSON, which `peft_eas.plots` draws; None in a run without a search."""
        if self._search is None or self._search.strategy is None:
            return None
        state = self._search.state_dict()
        return {**{name: state[name] for name in RECORDED}, "reward_source": self._reward_source}

    def finish(self) -> None:
        """Ends the search with the best set so far, as at the end of training: for a run that was interrupted.

        Without it, after Ctrl+C or an exception, evaluation, checkpoints and merges see the best set so far, but the
        model keeps the adapters of every candidate. To go on instead, resume from a checkpoint.

        Raises:
            RuntimeError: before training has begun.
        """
        if self._search is None or self._run is None:
            raise RuntimeError("EASCallback.finish() was called before training has begun: there is no search to end.")
        args, state = self._run
        was_searching = self._search.is_searching
        self._search.finish()
        self._losses.stop()
        if was_searching:
            forget_best_checkpoint(state)
            self._write_record(args, state)

    # --- events ----------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Holds a slice of the training set back if rewards have to be computed on it."""
        trainer, eas = calling_trainer(), eas_of(model, type(self).__name__, "Trainer")
        if self.reward_dataset is not None or trainer.eval_dataset is not None or not needs_search(eas):
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
        check_generation(trainer)
        eas = eas_of(model, type(self).__name__, "Trainer")
        check_context_of_batches(trainer, eas)
        move_to_front(trainer, self)

        self._search = self._reward_set = self._reward_source = self._shown_phase = None
        saved = saved_search(state, type(self).__name__)
        settings = {name: getattr(self, name) for name in SETTINGS}
        # Otherwise Trainer resumes with an optimizer that has every parameter; see `EASSearch`.
        optimizer = kwargs.get("optimizer") if trainer.is_fsdp_enabled else None
        search = EASSearch(
            model,
            state.max_steps,
            self._batch_loss,
            optimizer=optimizer,
            seed=self._seed(args),
            savings=partial(self._savings, trainer, model),
            state={**saved, "step": state.global_step} if state.global_step > 0 else None,
            **settings,
        )
        self._reward_source = saved.get("reward_source")
        if search.is_searching:
            self._choose_rewards(trainer)
            if self._reward_source not in (None, self._reward_set.source):
                raise ValueError(
                    f"The search was rewarded on the {self._reward_source}, but this run offers the "
                    f"{self._reward_set.source}. Give Trainer and EASCallback the same data as in the first run, and "
                    "leave restore_callback_states_from_checkpoint off: the callback resumes without it."
                )
            self._reward_source = self._reward_set.source
            search.held_out.num_batches = self._reward_set.num_batches
        if isinstance(eas, EASModel):
            self._fit(trainer, model, eas, saved)
        self._search, self._run = search, (args, state)
        if self._losses is not None:  # of a run that was interrupted
            self._losses.stop()
        self._losses = TrainingLosses(trainer)
        if isinstance(eas, EASModel):
            _check_learning_rate(trainer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Draws the skip set to train with; it stays the same over the micro-batches of an optimizer step."""
        self._search.before_step()
        self._show_phase(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Computes rewards, ends the search, freezes the context, each when its time has come."""
        was_searching, phase = self._search.is_searching, self._search.phase
        self._search.step = state.global_step - 1  # Trainer's count, should a subclass leave steps out
        self._search.after_step(self._losses.take())
        if not self._search.is_searching:
            self._losses.stop()
        if self._search.phase != phase and not self._search.is_searching:
            forget_best_checkpoint(state)
        if was_searching and not self._search.is_searching:
            self._write_record(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Ends what training did not reach the end of: a step, the search."""
        self.finish()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds where the search stands to Trainer's training log; once it is over, and was logged so, the phase."""
        if not logs or "loss" not in logs or self._search is None:
            return
        figures = self._search.figures()
        phases = (entry["eas/phase"] for entry in reversed(state.log_history[:-1]) if "eas/phase" in entry)
        if next(phases, None) in ("tune", "frozen"):
            figures = {"eas/phase": figures["eas/phase"]}
        logs.update({name: value for name, value in figures.items() if not isinstance(value, str)})
        state.log_history[-1].update(figures)  # Trainer has copied `logs` there already

    # --- what the search needs of Trainer --------------------------------------------------------------------------

    def _seed(self, args: TrainingArguments) -> int:
        return args.seed if self.seed is None else self.seed

    def _fit(self, trainer: Trainer, model: nn.Module, eas: EASModel, saved: dict[str, Any]) -> None:
        """Fits the adapters where a run begins; where one goes on, notes what its beginning has left."""
        if trainer.state.global_step > 0:
            eas.active_config.fit_errors = saved.get("fit_errors", eas.active_config.fit_errors)
        elif self.fit_tokens:
            fit_in_trainer(trainer, model, eas, self.fit_tokens, self._seed(trainer.args))
        self._fit_errors = eas.active_config.fit_errors

    def _choose_rewards(self, trainer: Trainer) -> RewardSet:
        if self._reward_set is None:
            seed = self._seed(trainer.args)
            self._reward_set = choose_reward_set(trainer, self.reward_dataset, self._held_back, seed)
        return self._reward_set

    def _savings(self, trainer: Trainer, model: nn.Module) -> Savings:
        batch = self._choose_rewards(trainer).inputs(0)
        config = eas_of(model, type(self).__name__, "Trainer").active_config
        savings = savings_of(config, model, batch, **(self.workload or {}))
        logger.info(
            "EAS: without attentions, the merged model would need %.1f %% of the base's %s.",
            100 * savings.left(savings.saved),
            savings.unit,
        )
        return savings

    def _batch_loss(self, number: int) -> torch.Tensor:
        return self._reward_set.loss(number)

    def _write_record(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            with open(os.path.join(args.output_dir, SEARCH_FILE), "w", encoding="utf-8") as file:
                json.dump(self.record, file, indent=1, sort_keys=True)  # as in trainer_state.json

    def _show_phase(self, state: TrainerState) -> None:
        phase = self._search.phase
        if phase == self._shown_phase:
            return
        self._shown_phase = phase
        logger.info("EAS: %s from step %d of %d on.", phase, state.global_step, state.max_steps)
        describe_progress(calling_trainer(), f"EAS {phase}")


def _check_learning_rate(trainer: Trainer) -> None:
    """Warns of a learning rate that is meant for whole models, such as Trainer's default."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's has it inside
    # Other optimizers have rates of another size; so have TRL's methods with a `beta`, such as DPO and GRPO.
    if "adam" not in type(optimizer).__name__.lower() or hasattr(trainer.args, "beta"):
        return
    # While a schedule warms up, "lr" is lower than what it was given.
    highest = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    if highest < LEAST_LEARNING_RATE:
        logger.warning(
            "EAS: the learning rate is %g, with which adapters that are trained from scratch hardly learn. Set "
            "learning_rate to between 1e-3 and 3e-3.",
            highest,
        )
