"""Three tasks for METER, made of easy-VQA's images: visual question answering, NLVR2 and retrieval.

What an image shows is known from the questions about it: its colour and its shape are the answers of its "what"
questions, or a yes/no question and its answer say that they are there. Images of which only one of the two is known
are used for visual question answering alone. Every twentieth training image is held back for the search's reward.

The base (see pretrain.py) has never seen an answer of a "what" question, a true statement about two images, or a
colour and a shape that belong together.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    CLIPProcessor,
)

from examples.easy_vqa.data import COLORS, SHAPES, Split, blind_accuracy, load_images, load_questions, preprocess
from examples.easy_vqa.pretrain import fact
from examples.meter.modeling_meter import (
    CROSS_MODAL_MHAS,
    MeterForImagesAndTextClassification,
    MeterForImageTextRetrieval,
    MeterForVisualQuestionAnswering,
    MeterPreTrainedModel,
)
from examples.meter.wordings import DESCRIPTIONS, STATEMENTS
from examples.shared.measure import on_device
from examples.shared.task import Task
from peft_eas.evaluation import evaluation_mode

BASE = Path(__file__).parent / "base"
Part = Literal["train", "reward", "test"]
ANSWERS = COLORS + SHAPES
NUM_TEXTS = 4  # for an image in a batch of the retrieval task: the right one and three others
GALLERY_COPIES = 4  # images of each colour and shape in a gallery of the retrieval task
# METER's ranks, 144 and 96 at a width of 768, in the same proportion; adapters without a router.
EAS = {"target_modules": CROSS_MODAL_MHAS, "r": 18, "attention_r": 12, "output_r": 0, "paths": 1, "dropout": 0.0}
TRAINED_WITH_HEADS = ["cross_modal_text_pooler", "cross_modal_image_pooler", "meter.token_type_embeddings"]
LORA_TARGETS = CROSS_MODAL_MHAS + r"\.self\.(query|value)"


@dataclass(frozen=True)
class Shown:
    """What an image shows, and its index within the split."""

    image: int
    color: str
    shape: str

    def has(self, word: str) -> bool:
        """Whether it shows a colour or a shape."""
        return word in (self.color, self.shape)


def part_of(image: int, split: Split) -> Part:
    """Which part of the data an image belongs to."""
    return "test" if split == "test" else "reward" if image % 20 == 0 else "train"


def split_of(part: Part) -> Split:
    """Which split of easy-VQA a part of the data is of."""
    return "test" if part == "test" else "train"


@cache
def _words_by_image(split: Split) -> dict[int, set[str]]:
    """The colours and shapes that are known of each image."""
    words: dict[int, set[str]] = {}
    for question in load_questions("what", split):
        words.setdefault(question.image, set()).add(question.answer)
    for question in load_questions("yes/no", split):
        word, present = fact(question)
        if present:
            words.setdefault(question.image, set()).add(word)
    return words


@cache
def load_shown(part: Part) -> tuple[Shown, ...]:
    """The images of a part whose colour and shape are both known."""
    split = split_of(part)
    return tuple(
        Shown(image, *sorted(found, key=lambda word: word in SHAPES))
        for image, found in sorted(_words_by_image(split).items())
        if len(found) == 2 and part_of(image, split) == part
    )


@cache
def load_processor() -> CLIPProcessor:
    """The processor of the base."""
    return AutoProcessor.from_pretrained(BASE)


@cache
def load_pixel_values(split: Split) -> Tensor:
    """All images of a split, as the base's vision tower takes them."""
    return preprocess(load_processor(), load_images(split))


def load_base(model_class: type[MeterPreTrainedModel], **config: Any) -> MeterPreTrainedModel:
    """The base with a head that is new, and the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class.from_pretrained(BASE, dtype=torch.float32, **config)


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One sample.

    Attributes:
        texts: the question or statement, or the descriptions to choose from. images: indices within the split.
        label: the index of the answer, of the class, or of the description that fits.
    """

    texts: tuple[str, ...]
    images: tuple[int, ...]
    label: int


class MeterDataset(Dataset):
    """Items with the split that their images are of."""

    def __init__(self, items: Sequence[Item], split: Split) -> None:
        self.items = list(items)
        self.split: Split = split

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Item, Tensor]:
        """An item, and its images, (images, 3, height, width)."""
        item = self.items[index]
        return item, load_pixel_values(self.split)[list(item.images)]


def collate(samples: Sequence[tuple[Item, Tensor]], name: str) -> dict[str, Tensor]:
    """A batch of the task `name`, in the form that its model takes."""
    items = [item for item, _ in samples]
    texts = load_processor().tokenizer([text for item in items for text in item.texts], padding=True)
    batch = {key: torch.tensor(texts[key]) for key in ("input_ids", "attention_mask")}
    batch["pixel_values"] = torch.stack([images for _, images in samples])
    batch["labels"] = torch.tensor([item.label for item in items])
    if name == "vqa":
        batch["labels"] = nn.functional.one_hot(batch["labels"], len(ANSWERS)).float()
    if name != "nlvr2":
        batch["pixel_values"] = batch["pixel_values"][:, 0]
    if name == "retrieval":
        batch |= {key: batch[key].unflatten(0, (len(items), -1)) for key in ("input_ids", "attention_mask")}
    return batch


@cache
def vqa_data(part: Part) -> MeterDataset:
    """The "what" questions, with 11 answers."""
    questions = load_questions("what", split_of(part))
    items = [
        Item((question.text,), (question.image,), ANSWERS.index(question.answer))
        for question in questions
        if part_of(question.image, split_of(part)) == part
    ]
    return MeterDataset(items, split_of(part))


@cache
def nlvr2_data(part: Part) -> MeterDataset:
    """Statements about the shapes in two images, true or false; as many of each, for every wording and every shape.

    What makes it true or false, that one image shows the shape, the other, both or neither, takes turns.
    """
    draw = random.Random(f"nlvr2 {part}")
    shown = load_shown(part)
    num_pairs = {"train": 240, "reward": 20, "test": 60}[part]  # for every wording, shape and truth
    items = []
    for shape in SHAPES:
        having = [one.image for one in shown if one.has(shape)]
        lacking = [one.image for one in shown if not one.has(shape)]
        for statement, is_true in STATEMENTS.items():
            for truth in (False, True):
                cases = [case for case in product((False, True), repeat=2) if is_true(*case) == truth]
                for number in range(num_pairs):
                    left, right = cases[number % len(cases)]
                    first = draw.choice(having if left else lacking)
                    second = draw.choice([image for image in (having if right else lacking) if image != first])
                    items.append(Item((statement.format(shape),), (first, second), int(truth)))
    draw.shuffle(items)
    return MeterDataset(items, split_of(part))


def describe(one: Shown, wording: str) -> str:
    """A description that fits an image."""
    return wording.format(color=one.color, shape=one.shape)


@cache
def retrieval_data(part: Part) -> MeterDataset:
    """Images with a description that fits and `NUM_TEXTS` - 1 that do not, one of which has the right shape, one the
    right colour.
    """
    draw = random.Random(f"retrieval {part}")
    items = []
    for one in load_shown(part):
        for wording in DESCRIPTIONS:
            colors = draw.sample([color for color in COLORS if color != one.color], 2)
            shapes = draw.sample([shape for shape in SHAPES if shape != one.shape], 2)
            others = [(colors[0], one.shape), (one.color, shapes[0]), (colors[1], shapes[1])]
            texts = [wording.format(color=color, shape=shape) for color, shape in others]
            label = draw.randrange(NUM_TEXTS)
            texts.insert(label, describe(one, wording))
            items.append(Item(tuple(texts), (one.image,), label))
    draw.shuffle(items)
    return MeterDataset(items, split_of(part))


@dataclass(frozen=True)
class Gallery:
    """Images and descriptions to find in each other.

    Attributes:
        images: indices within the test split. texts: descriptions, each of another colour and shape.
        fits: (images, texts), where a description fits an image: one for each image, several images for each.
    """

    images: tuple[int, ...]
    texts: tuple[str, ...]
    fits: Tensor


@cache
def galleries() -> tuple[Gallery, ...]:
    """Galleries of the test images without an image in common.

    Each has all 24 descriptions of a colour and a shape in one wording, and `GALLERY_COPIES` images of each.
    """
    by_kind: dict[tuple[str, str], list[Shown]] = {(color, shape): [] for color in COLORS for shape in SHAPES}
    for one in load_shown("test"):
        by_kind[one.color, one.shape].append(one)
    result = []
    for number, wording in enumerate(DESCRIPTIONS):
        part = slice(number * GALLERY_COPIES, (number + 1) * GALLERY_COPIES)
        texts = tuple(describe(found[0], wording) for found in by_kind.values())
        chosen = [one for found in by_kind.values() for one in found[part]]
        fits = torch.tensor([[text == describe(one, wording) for text in texts] for one in chosen])
        result.append(Gallery(tuple(one.image for one in chosen), texts, fits))
    return tuple(result)


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, data: MeterDataset, name: str, batch_size: int = 128) -> float:
    """The share of samples for which the class or answer of the highest logit is right."""
    right = 0
    with evaluation_mode(model):
        for batch in DataLoader(data, batch_size=batch_size, collate_fn=partial(collate, name=name)):
            labels = batch.pop("labels")
            logits = model(**on_device(batch, model)).logits.cpu()
            right += (logits.argmax(-1) == (labels.argmax(-1) if labels.dim() > 1 else labels)).sum().item()
    return right / len(data)


@torch.no_grad()
def gallery_scores(model: nn.Module, gallery: Gallery, batch_size: int = 8) -> Tensor:
    """The model's score of every image with every text, (images, texts)."""
    texts = load_processor().tokenizer(list(gallery.texts), padding=True, return_tensors="pt")
    scores = []
    with evaluation_mode(model):
        for images in torch.tensor(gallery.images).split(batch_size):
            batch = {key: texts[key].expand(len(images), -1, -1) for key in ("input_ids", "attention_mask")}
            batch["pixel_values"] = load_pixel_values("test")[images]
            scores.append(model(**on_device(batch, model)).logits.cpu())
    return torch.cat(scores)


def recall(scores: Tensor, fits: Tensor, k: int) -> float:
    """Recall@k: the share of rows with a fitting column among the k of the highest scores; both (rows, columns)."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return fits.gather(1, best).any(1).float().mean().item()


def score_retrieval(model: nn.Module) -> dict[str, float]:
    """Recall@1, 5 and 10, the mean over the galleries: of an image's text, and of a text's image.

    An image has one text that fits; every image that shows what a text says counts as found. The headline is the mean
    of both directions' recall@1.
    """
    pairs = [(gallery_scores(model, gallery), gallery.fits) for gallery in galleries()]

    def mean(k: int, transposed: bool) -> float:
        values = [recall(s.T, f.T, k) if transposed else recall(s, f, k) for s, f in pairs]
        return sum(values) / len(values)

    text = {f"text recall@{k}": mean(k, False) for k in (1, 5, 10)}
    image = {f"image recall@{k}": mean(k, True) for k in (1, 5, 10)}
    return {"recall@1": (text["text recall@1"] + image["image recall@1"]) / 2, **text, **image}


# --- tasks -----------------------------------------------------------------------------------------------------------


def _task(name: str, data: Any, head: str, **values: Any) -> Task:
    return Task(
        name=f"meter-{name}",
        train=data("train"),
        reward=data("reward"),
        test=data("test"),
        collate=partial(collate, name=name),
        eas={**EAS, "modules_to_save": [head, *TRAINED_WITH_HEADS]},
        lora_targets=LORA_TARGETS,
        deployed_batch=partial(_deployed_batch, data, name),
        **values,
    )


def _deployed_batch(data: Any, name: str) -> dict[str, Tensor]:
    test = data("test")
    batch = collate([test[index] for index in range(16)], name)
    del batch["labels"]
    return batch


def meter_vqa() -> Task:
    """Which of 11 answers a "what" question has."""
    return _task(
        "vqa",
        vqa_data,
        "vqa_classifier",
        load_base=partial(load_base, MeterForVisualQuestionAnswering, num_labels=len(ANSWERS)),
        score=lambda model: {"accuracy": accuracy(model, vqa_data("test"), "vqa")},
        steps=600,
        batch_size=16,
        learning_rate=3e-3,
    )


def meter_nlvr2() -> Task:
    """Whether a statement about two images is true."""
    return _task(
        "nlvr2",
        nlvr2_data,
        "nlvr2_classifier",
        load_base=partial(load_base, MeterForImagesAndTextClassification),
        score=lambda model: {"accuracy": accuracy(model, nlvr2_data("test"), "nlvr2")},
        steps=1000,
        batch_size=16,
        learning_rate=3e-3,
    )


def meter_retrieval() -> Task:
    """Which image and which description belong together."""
    return _task(
        "retrieval",
        retrieval_data,
        "rank_output",
        load_base=partial(load_base, MeterForImageTextRetrieval),
        score=score_retrieval,
        steps=600,
        batch_size=8,
        learning_rate=3e-3,
    )


def blind_score(name: str) -> float:
    """The headline that can be had without looking: each question's most frequent answer, or chance."""
    if name == "vqa":
        return blind_accuracy(load_questions("what", "test"))
    return 1 / 2 if name == "nlvr2" else 1 / (len(COLORS) * len(SHAPES))


TASKS = {"vqa": meter_vqa, "nlvr2": meter_nlvr2, "retrieval": meter_retrieval}
# By which a merged model of each task is loaded.
AUTO_CLASSES = {
    "vqa": AutoModelForVisualQuestionAnswering,
    "nlvr2": AutoModelForSequenceClassification,
    "retrieval": AutoModelForMultipleChoice,
}
