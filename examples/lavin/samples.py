"""Prompts with answers, and with images or without, as batches for a LaVIN model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from examples.lavin.processing_lavin import LavinProcessor, pad

IGNORE = -100  # the label of a token that has no loss


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer, which begins with the space between the two, if there is to be one.

    `image` is a picture, pixel values (3, H, W), or None.
    """

    prompt: str
    answer: str
    image: Any = None


@dataclass
class LavinCollator:
    """Makes a batch from samples: what the processor returns, and `labels`, which are `IGNORE` on prompt and padding.

    The answer ends with the end-of-sequence token.

    Args:
        padding_side: "right" for training and scoring in one pass, "left" for generation.
        prompt_only: leave the answers and `labels` out, as generation needs it.
    """

    processor: LavinProcessor
    padding_side: Literal["left", "right"] = "right"
    prompt_only: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        prompts = [self.processor.encode(sample.prompt, sample.image is not None) for sample in samples]
        answers = [[] if self.prompt_only else self._answer(sample) for sample in samples]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = dict(self.processor.batch(rows, [sample.image for sample in samples], self.padding_side))
        if not self.prompt_only:
            labels = [torch.tensor([IGNORE] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]
            batch["labels"] = pad(labels, IGNORE, self.padding_side)
        return batch

    def _answer(self, sample: Sample) -> list[int]:
        ids = self.processor.encode_answer(sample.prompt, sample.answer)
        return [*ids, self.processor.tokenizer.eos_token_id]
