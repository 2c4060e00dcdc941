"""A task to tune a model on, as the examples and the comparison of methods share it, and how it is tuned."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_eas.plots import plot_search_curve, plot_skip_map


@dataclass(frozen=True)
class Task:
    """One task: a base model, its data, how it is tuned, and how its answers are scored.

    Attributes:
        name: for tables and file names.
        load_base: returns the base model, with the same weights each time.
        train, reward, test: datasets without a sample in common; `reward` is what a search is rewarded on.
        collate: makes a batch of tensors, `labels` among them, from samples of these datasets.
        score: returns the figures of a model on `test`, each a share in [0, 1]; the first is the task's headline.
        eas: arguments of `EASConfig` that the base asks for, such as `target_modules`, ranks and `modules_to_save`.
        lora_targets: a regular expression for the projections that LoRA adapts.
        steps, batch_size, learning_rate: of its tuning.
        deployed_batch: returns a batch without labels, on which the speed of a deployed model is measured.
    """

    name: str
    load_base: Callable[[], PreTrainedModel]
    train: Dataset
    reward: Dataset
    test: Dataset
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    score: Callable[[nn.Module], dict[str, float]]
    eas: dict[str, Any]
    lora_targets: str
    steps: int
    batch_size: int
    learning_rate: float
    deployed_batch: Callable[[], dict[str, Tensor]] = field(repr=False)


def search_share(text: str) -> float:
    """The share of a run after which its search ends, from a command line."""
    share = float(text)
    if not 0.1 < share < 1:
        raise ArgumentTypeError(f"{text} must be above 0.1, when rewards begin, and below 1, to tune what is chosen")
    return share


def plot_search(folder: Path) -> None:
    """Draws the search of the adapter that is saved in `eas` of `folder`: `skip_map.png` and `search_curve.png`."""
    plot_skip_map(folder / "eas", folder / "skip_map.png")
    plot_search_curve(folder / "eas", folder / "search_curve.png")


def tune(
    model: nn.Module,
    task: Task,
    output_dir: Path,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    **overrides: Any,
) -> Trainer:
    """Trains `model` in place on the task with AdamW and a cosine schedule; returns its Trainer, with the log.

    A run that saves checkpoints (`save_strategy="steps"`) goes on from the last one in `output_dir`.

    Args:
        output_dir: where Trainer may write. seed: of the order of the data and of dropout.
        progress: whether to show Trainer's progress bar and log.
        overrides: further `TrainingArguments`, or others in the place of the task's.
    """
    set_seed(seed)
    settings = {
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch_size,
        "per_device_eval_batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.04,
        "logging_steps": max(1, task.steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": not progress,
        "seed": seed,
    }
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(output_dir), **{**settings, **overrides}),
        train_dataset=task.train,
        data_collator=task.collate,
        callbacks=list(callbacks),
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)  # which takes the bar's place
    last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer
