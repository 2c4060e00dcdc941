"""The held-out batches that the search is rewarded on under Trainer: where they come from, and the loss on them."""

import copy
import logging
import random
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers import Trainer

from ..evaluation import evaluation_mode, preserved_random_state
from .trainer import untouched_metrics

logger = logging.getLogger(__name__)

# A slice of the training set, where one has to do: enough for a batch of its own in most rounds, little to train on.
HELD_BACK_FRACTION, HELD_BACK_MOST = 0.05, 512
# Of a reward set without a length, as many sequences are read at the start and kept.
STREAMED_MOST = 512


def hold_back(dataset: Any, seed: int) -> tuple[Any, Any] | None:
    """Splits 5 % of a training set off, at most 512 samples, drawn by `seed`: (the rest, the slice).

    Returns None for a set that is read as a stream, or has fewer than two samples.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or len(dataset) < 2:
        return None
    size = min(HELD_BACK_MOST, max(1, round(HELD_BACK_FRACTION * len(dataset))))
    held = set(random.Random(seed).sample(range(len(dataset)), size))
    rest = [index for index in range(len(dataset)) if index not in held]
    # A Hugging Face dataset keeps its columns, by which Trainer groups and filters, only under its own `select`.
    select = getattr(dataset, "select", None) or (lambda indices: Subset(dataset, indices))
    return select(rest), select(sorted(held))


def choose_reward_set(trainer: Trainer, given: Any, held_back: Any, seed: int) -> "RewardSet":
    """The set to compute rewards on: the one given, else the eval set, else what was held back from training.

    Raises:
        ValueError: if there is none of these and none can be taken from the training set, or if it is unusable.
    """
    evaluation = trainer.eval_dataset
    if isinstance(evaluation, dict):
        evaluation = next(iter(evaluation.values()), [])
    for dataset, source in (
        (given, "reward_dataset"),
        (evaluation, "eval set"),
        (held_back, "held-back part of the training set"),
    ):
        if dataset is not None:
            return RewardSet(trainer, dataset, source, seed)
    split = hold_back(trainer.train_dataset, seed)
    if split is None:
        raise ValueError(
            "The search has nothing to compute rewards on: there is no reward_dataset, no eval set, and no slice can "
            "be held back from a training set that is a stream or has one sample. Pass "
            "EASCallback(reward_dataset=...)."
        )
    logger.warning(
        "EAS: rewards are computed on %d training samples that are trained on as well, because EASCallback was added "
        "after Trainer was made. Pass it as Trainer(callbacks=[...]) to have them held back.",
        len(split[1]),
    )
    return RewardSet(trainer, split[1], "part of the training set", seed)


class RewardSet:
    """Batches of a held-out set and the model's loss on them.

    The set is gone through in a random order that depends on `seed` alone, a batch per round, again and again; a batch
    is found by its round's number, so that there is nothing to save for a resumed run. Each rank takes a batch of its
    own, of `per_device_eval_batch_size` sequences.

    Args:
        trainer: collates the batches and computes the loss, as for its own evaluation.
        dataset: what the batches are taken from.
        source: what `dataset` is, in words.
        seed: of the order, and of whatever is random in loading a sample.

    Raises:
        ValueError: if the set is empty, or the trainer computes no loss on a batch of it.
    """

    def __init__(self, trainer: Trainer, dataset: Any, source: str, seed: int) -> None:
        self.trainer = trainer
        self.source = source
        self.seed = seed
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            with preserved_random_state(seed):
                dataset = list(islice(dataset, STREAMED_MOST))
        if len(dataset) == 0:
            raise ValueError(
                f"The search has nothing to compute rewards on: the {source} is empty. Pass "
                "EASCallback(reward_dataset=...) or Trainer(eval_dataset=...) with at least one sample that is not "
                "trained on."
            )
        # TRL's trainers that compare completions of one prompt want it several times in a row.
        repeats = getattr(trainer, "num_generations_eval", 1)
        order = random.Random(seed).sample(range(len(dataset)), len(dataset))
        self._order = [index for index in order for _ in range(repeats)]
        self._number: int | None = None
        self._loaded: Any = None
        with preserved_random_state(seed), torch.no_grad(), evaluation_mode(trainer.model):
            self._open(dataset)

    @property
    def num_batches(self) -> int:
        """How many batches this rank has until one begins anew."""
        args = self.trainer.args
        return max(1, len(self._order) // (args.world_size * min(args.eval_batch_size, len(self._order))))

    def loss(self, number: int) -> torch.Tensor:
        """Loss of the model as it is now on this rank's batch of round `number`."""
        if number != self._number:
            self._number, self._loaded = number, self._batch(number)
        return self._loss(self._loaded)

    def inputs(self, number: int) -> Any:
        """This rank's batch of round `number`, on the model's device."""
        return self.trainer._prepare_inputs(copy.copy(self._batch(number)))

    def _batch(self, number: int) -> Any:
        args = self.trainer.args
        size = min(args.eval_batch_size, len(self._order))
        start = (number * args.world_size + args.process_index) * size
        return self._collate([self._samples[self._order[i % len(self._order)]] for i in range(start, start + size)])

    def _loss(self, batch: Any) -> torch.Tensor | None:
        # A copy, as label smoothing takes the labels out. Some trainers collate nothing and take a list of samples.
        batch = [copy.copy(sample) for sample in batch] if isinstance(batch, list) else copy.copy(batch)
        with untouched_metrics(self.trainer):
            loss = self.trainer.prediction_step(self.trainer.model, batch, prediction_loss_only=True)[0]
            rewards = getattr(self.trainer, "_metrics", {}).get("eval", {}).get("reward")
            # The loss of completions that the model has just generated is a gradient's: its value is 0 for every set,
            # but for the penalty and noise.
            return loss.new_tensor(-rewards[-1]) if rewards else loss

    def _open(self, dataset: Any) -> None:
        """Refuses a set, or a trainer, that gives no loss. Where a batch has no labels, only the trainer can tell."""
        batch = error = None
        names = self.trainer.label_names
        try:
            # Trainer's loader for a test set knows the collator and the columns to remove. Only these are used: it is
            # never iterated, so that no worker is started and no random state is touched.
            loader = self.trainer.get_test_dataloader(dataset)
            self._samples: Dataset = loader.dataset
            self._collate = loader.collate_fn
            batch = self._batch(0)
            if isinstance(batch, Mapping) and names and all(batch.get(name) is not None for name in names):
                return
            if self._loss(batch) is not None:
                return
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as caught:
            error = caught
        if error is None and isinstance(batch, Mapping):
            raise ValueError(
                f"The {self.source} gives no loss to compute rewards from: its batches have {sorted(batch)}, but "
                f"label_names are {names}. Give it labels, or set TrainingArguments(label_names=...) to what they are "
                "called."
            )
        why = "it evaluates none" if error is None else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{type(self.trainer).__name__} computes no loss on a batch of the {self.source}, so there is nothing to "
            f"compute rewards from ({why}). Give it samples like those that it evaluates on, such as "
            'eval_dataset={"rewards": ...}, of which it prepares each set and EAS takes the first; or leave the '
            "search out and name the MHAs to skip in EASConfig(skipped_modules=[...]), as attention_similarities() "
            "ranks them."
        ) from error
