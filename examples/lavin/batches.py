"""Batches to train a LaVIN model on that waste little: samples of similar length, and no logits but the answers'."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from examples.lavin.processing_lavin import LavinProcessor
from examples.lavin.samples import IGNORE, LavinCollator, Sample

# So many batches are sorted by length at a time: enough for little padding, few enough to stay mixed.
SORTED_TOGETHER = 16


def order_by_length(lengths: Sequence[int], batch_size: int, num_batches: int, seed: int = 0) -> list[int]:
    """Indices of samples, `batch_size` after `batch_size` a batch of similar lengths; the batches in random order.

    Each sample comes once in an epoch, as often as it takes to fill `num_batches`; an epoch need not end with a batch.
    """
    generator = random.Random(seed)

    def endless() -> Iterator[int]:
        while True:
            yield from generator.sample(range(len(lengths)), len(lengths))

    stream, order = endless(), []
    together = batch_size * min(SORTED_TOGETHER, max(1, len(lengths) // batch_size))
    while len(order) < batch_size * num_batches:
        chunk = sorted(islice(stream, together), key=lengths.__getitem__)
        batches = [chunk[start : start + batch_size] for start in range(0, len(chunk), batch_size)]
        generator.shuffle(batches)
        order += [index for batch in batches for index in batch]
    return order[: batch_size * num_batches]


@dataclass
class AnswerCollator:
    """As `LavinCollator`, padded on the left, so that the head need compute no logits in front of the answers.

    `labels` (B, K) belong to the last K = `logits_to_keep` positions; `eas_prompt_mask` (B, T) tells the adapters what
    the prompt is, which labels of that shape cannot.
    """

    processor: LavinProcessor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = LavinCollator(self.processor, padding_side="left")(samples)
        is_answer = batch["labels"] != IGNORE
        # One position more: what is in front of the longest answer's first token predicts it.
        kept = int(is_answer.sum(1).max()) + 1
        batch.setdefault("eas_prompt_mask", batch["attention_mask"].bool() & ~is_answer)
        return {**batch, "labels": batch["labels"][:, -kept:], "logits_to_keep": kept}
