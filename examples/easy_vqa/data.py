"""easy-VQA for Llava-like models: questions, images, batches, and exact-match accuracy.

easy-VQA (https://github.com/vzhou842/easy-VQA, MIT) has 5,000 images of one coloured shape each and 48,248 questions:
"what" questions with 11 answers (8 colours, 3 shapes) and yes/no questions. `pip install easy-vqa` brings them all.
Nothing here knows one model: the tokenizer, the image size and the wording of the prompt come from the processor and
the arguments, and an answer may be one token or several.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from examples.shared.measure import on_device
from peft_eas.evaluation import evaluation_mode

Kind = Literal["what", "yes/no"]
Split = Literal["train", "test"]

IMAGE_TOKEN = "<image>"
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
IGNORE = -100  # the label of a token that has no loss


@dataclass(frozen=True)
class Question:
    """One question, its answer, and the index of its image within the split."""

    text: str
    answer: str
    image: int


def load_questions(kind: Kind, split: Split) -> list[Question]:
    """All questions of one kind; "what" questions are those not answered by yes or no."""
    rows = json.loads((_data_folder(split) / "questions.json").read_text())
    questions = [Question(*row) for row in rows]
    return [question for question in questions if (question.answer in ("yes", "no")) == (kind == "yes/no")]


def load_images(split: Split) -> Tensor:
    """All images of a split as uint8 (images, 3, 64, 64), in the order that `Question.image` counts."""
    paths = sorted((_data_folder(split) / "images").glob("*.png"), key=lambda path: int(path.stem))
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _data_folder(split: Split) -> Path:
    return Path(distribution("easy-vqa").locate_file(f"easy_vqa/data/{split}"))


def majority_accuracy(questions: Sequence[Question]) -> float:
    """The accuracy of always giving the most frequent answer."""
    return Counter(question.answer for question in questions).most_common(1)[0][1] / len(questions)


def blind_accuracy(questions: Sequence[Question]) -> float:
    """The accuracy of giving each wording its most frequent answer: what can be had without looking at the image."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.text, Counter())[question.answer] += 1
    return sum(counts.most_common(1)[0][1] for counts in answers.values()) / len(questions)


def build_processor(tokenizer: PreTrainedTokenizerBase, image_size: int, patch_size: int) -> LlavaProcessor:
    """A `LlavaProcessor` for square images and a vision tower whose class token is dropped.

    Adds `<image>` to a tokenizer that lacks it; the model's embeddings must then be resized to `len(tokenizer)`.
    """
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    size = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )


def preprocess(processor: LlavaProcessor, images: Tensor, chunk: int = 500) -> Tensor:
    """Pixel values, float32 (images, 3, height, width), of uint8 images (images, 3, 64, 64)."""
    chunks = [processor.image_processor(list(part), return_tensors="pt").pixel_values for part in images.split(chunk)]
    return torch.cat(chunks)


class VQADataset(Dataset):
    """Questions as `input_ids`, `labels` and `pixel_values`, ready for `Trainer` with `VQACollator`.

    The prompt is `template`, with the image tokens and the question filled in, under the tokenizer's own rules for
    special tokens. The answer follows it after a space and ends with the end-of-sequence token. Labels are `IGNORE`
    on the prompt.

    Args:
        questions: what to ask.
        pixel_values: `preprocess` of all images of the same split; held in memory once, shared by the questions.
        processor: the model's processor.
        template: the prompt; must contain "{image}" and "{question}".
    """

    def __init__(
        self,
        questions: Sequence[Question],
        pixel_values: Tensor,
        processor: LlavaProcessor,
        template: str = "{image} {question}",
    ):
        self.questions = questions
        self.pixel_values = pixel_values
        tokenizer = processor.tokenizer
        # All images have one size, hence one number of image tokens: any picture will do to lay out the prompts.
        picture = Image.new("RGB", (64, 64))

        @cache
        def prompt_ids(text: str) -> list[int]:
            prompt = template.format(image=processor.image_token, question=text)
            return processor(images=picture, text=prompt).input_ids[0]

        @cache
        def answer_ids(answer: str) -> list[int]:
            return [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]

        self._token_ids = [(prompt_ids(question.text), answer_ids(question.answer)) for question in questions]
        self.max_answer_tokens = max(len(answer) for _, answer in self._token_ids)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, answer = self._token_ids[index]
        return {
            "input_ids": torch.tensor(prompt + answer),
            "labels": torch.tensor([IGNORE] * len(prompt) + answer),
            "pixel_values": self.pixel_values[self.questions[index].image],
        }


@dataclass
class VQACollator:
    """Pads a list of `VQADataset` items to a batch with an `attention_mask`.

    Args:
        pad_token_id: fills `input_ids`; hidden by the mask, so any id but the image token's will do.
        padding_side: "right" for training and `accuracy`, "left" for generation.
        prompt_only: drop the answers and `labels`, as generation needs it.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"
    prompt_only: bool = False

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        kept = [slice(None) if not self.prompt_only else item["labels"] == IGNORE for item in items]
        input_ids = [item["input_ids"][part] for item, part in zip(items, kept, strict=True)]
        batch = {
            "input_ids": self._pad(input_ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(ids) for ids in input_ids], 0),
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        }
        if not self.prompt_only:
            batch["labels"] = self._pad([item["labels"] for item in items], IGNORE)
        return batch

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.padding_side)


def accuracy(model: nn.Module, dataset: VQADataset, pad_token_id: int, batch_size: int = 128) -> float:
    """The share of questions whose whole answer, end-of-sequence token included, greedy decoding gets right."""
    return exact_match(model, DataLoader(dataset, batch_size=batch_size, collate_fn=VQACollator(pad_token_id)))


@torch.no_grad()
def exact_match(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """The share of sequences in `batches`, with labels, whose whole answer greedy decoding gets right.

    One forward pass per batch is enough: greedy decoding gives the reference answer exactly if, with that answer fed
    in, the argmax over the full vocabulary is right at each of its positions.
    """
    right, total = 0, 0
    with evaluation_mode(model):
        for batch in batches:
            batch = on_device(batch, model)
            # The labels go along because some adapters learn from them where the prompt ends.
            predicted = model(**batch).logits[:, :-1].argmax(-1)
            labels = batch["labels"][:, 1:]
            right += ((predicted == labels) | (labels == IGNORE)).all(-1).sum().item()
            total += len(labels)
    return right / total


@torch.no_grad()
def generate_answers(
    model: nn.Module, dataset: VQADataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 128, **kwargs
) -> list[str]:
    """The model's own answers, by greedy decoding of left-padded batches; `kwargs` go to `generate`.

    An answer may be as long as the longest that `dataset` knows.
    """
    answers = []
    collator = VQACollator(tokenizer.pad_token_id, padding_side="left", prompt_only=True)
    kwargs = {"max_new_tokens": dataset.max_answer_tokens, "do_sample": False} | kwargs
    with evaluation_mode(model):
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collator):
            batch = on_device(batch, model)
            token_ids = model.generate(
                **batch, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **kwargs
            )
            new_ids = token_ids[:, batch["input_ids"].shape[1] :]
            answers += [text.strip() for text in tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    return answers
