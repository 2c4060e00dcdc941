"""What `EASCallback` must know about transformers' Trainer, and do to it, beyond what its events offer."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainerState

from ..model import EASModel
from ..skippable import Skippable


def calling_trainer() -> Trainer:
    """The Trainer whose event is being handled.

    Trainer tells a callback neither about itself nor, before the first evaluation, about its eval set; but only it
    knows how its batches are collated and its loss is computed. It is found among the callers.

    Raises:
        RuntimeError: if there is none.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    raise RuntimeError(
        "EASCallback was called from outside a transformers.Trainer. Pass it as Trainer(callbacks=[EASCallback()]), "
        "or use EASSearch in a loop of your own."
    )


def move_to_front(trainer: Trainer, callback: TrainerCallback) -> None:
    """Puts a callback in front of the others, so that report tools are given what it adds to the log."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop(callbacks.index(callback)))


def describe_progress(trainer: Trainer, text: str) -> None:
    """Writes `text` in front of Trainer's progress bar, where there is one."""
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None)
        if bar is not None:
            bar.set_description(text)


def check_context_of_batches(trainer: Trainer, eas: Skippable) -> None:
    """Raises a ValueError where the context is the prompt, but Trainer's batches do not tell what the prompt is.

    With remove_unused_columns=False a batch may bring `eas_prompt_mask` in place of the labels; the model warns if it
    does not.
    """
    args = trainer.args
    if eas.active_config.context != "prompt":
        return
    # TRL's settings, and the collator of transformers.
    packing = [name for name in ("packing", "eval_packing", "padding_free") if getattr(args, name, None)]
    if isinstance(trainer.data_collator, DataCollatorWithFlattening):
        packing.append(type(trainer.data_collator).__name__)
    if packing:
        raise ValueError(
            f"With {packing[0]}, several sequences are packed into one row, which context='prompt' would give one "
            "context: the adapters would see other sequences, and what they are to predict. Leave it out, or set "
            "EASConfig(context='running')."
        )
    if not isinstance(eas, EASModel) or not eas.answer_in_input() or not args.remove_unused_columns:
        return
    if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
        option = f"label_smoothing_factor={args.label_smoothing_factor}"
        option = option if trainer.compute_loss_func is None else "compute_loss_func"
        raise ValueError(
            f"With {option}, Trainer takes the labels out of the model's inputs, and context='prompt' cannot tell the "
            "prompt from the answer: the adapters would see what they are to predict. Leave it out, set "
            "EASConfig(context='running'), or add eas_prompt_mask (boolean, the shape of input_ids) to the batches "
            "and set remove_unused_columns=False."
        )


def check_generation(trainer: Trainer) -> None:
    """Raises a ValueError where one of TRL's trainers is to generate with vLLM."""
    args = trainer.args
    if getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url")):  # the asynchronous trainers always do
        raise ValueError(
            f"{type(trainer).__name__} is to generate with vLLM (use_vllm=True), but completions there come from a "
            "stock model, which skips no attention: training and rewards would be of another model than this one. "
            "Set use_vllm=False, in a trainer that has it, so that transformers generates them."
        )


class TrainingLosses:
    """Listens to the losses of a Trainer's training steps, of which it tells no event, until `stop()`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._total: torch.Tensor | None = None
        self._own = trainer.__dict__.get("training_step")
        self._training_step = trainer.training_step
        # The loss of TRL's trainers which score completions of their own tells nothing of the model.
        if not hasattr(trainer, "num_generations"):
            trainer.training_step = self._step

    def _step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self._training_step(*args, **kwargs)
        self._total = loss if self._total is None else self._total + loss
        return loss

    def take(self) -> torch.Tensor | None:
        """The loss of the optimizer step since the last call, a tensor of one element."""
        total, self._total = self._total, None
        return total

    def stop(self) -> None:
        self._trainer.__dict__.pop("training_step", None)
        if self._own is not None:
            self._trainer.training_step = self._own


# Where TRL's trainers gather the figures of each batch for the next log.
_FIGURES = ("_metrics", "_logs", "_textual_logs", "_stored_metrics")


@contextlib.contextmanager
def untouched_metrics(trainer: Trainer) -> Iterator[None]:
    """Keeps losses computed inside out of the next evaluation's log, into which TRL's trainers put figures of each."""
    kept = {name: copy.deepcopy(getattr(trainer, name)) for name in _FIGURES if hasattr(trainer, name)}
    try:
        yield
    finally:
        for name, figures in kept.items():
            setattr(trainer, name, figures)


def saved_search(state: TrainerState, name: str) -> dict[str, Any]:
    """How far the search was in the checkpoint that is resumed; without a strategy where there was no search."""
    saved = state.stateful_callbacks.get(name, {}) if state.global_step > 0 else {}
    if isinstance(saved, list):
        raise ValueError(f"The checkpoint holds {len(saved)} {name}s. Train with one, and resume with one.")
    phases = (entry["eas/phase"] for entry in reversed(state.log_history) if "eas/phase" in entry)
    # Earlier versions' checkpoints have no `course`; their log tells whether the context was frozen.
    course = saved.get("course") or ({"is_frozen": True} if next(phases, None) == "frozen" else {})
    return {**(saved.get("record") or {"strategy": None, "skipped_modules": None}), **course}


def forget_best_checkpoint(state: TrainerState) -> None:
    """Lets `load_best_model_at_end` choose among the checkpoints from here on: the earlier are of another model."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
