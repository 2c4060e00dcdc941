"""Pretrains the small multi-modal model of the easy-VQA example from scratch: `python -m examples.easy_vqa.pretrain`.

The base must know the words and the images, and must not know the task that the example then teaches, which is to
answer the "what" questions. So it is trained on the training images with nothing but

1. yes/no questions and their answers;
2. statements that follow from one such pair, such as "there is a red shape" from "is there not a red shape? no", or
   "there is no circle in the image". About half of the images have a colour named in this way, half a shape;
3. the words of the "what" questions, without answer, as text up to the question mark. Every image is paired with
   every such wording, so that the words tell nothing about the image.

It never sees the answer of a "what" question, nor an image or a question of the test split.

First the vision tower learns alone to say which of the colours and shapes an image shows, from the same yes/no pairs.
Then it is frozen, and the rest of the model learns the texts. There each image is fed once with several texts behind
it. A block mask lets a text see the image and itself only, and its positions start over, so every text is computed
exactly as if it stood alone with the image, at a fraction of the cost.

A run saves its state regularly and, started again with the same options, goes on where it was and ends with the same
weights. It shows its speed, and prints its figures at the end.

The weights in examples/easy_vqa/base come from the default options, with one thread of a 2-core Intel Xeon that did
other work too (torch 2.13, transformers 5.23): 6,000 steps of the vision tower at 11 steps/s and 1,000 steps of the
rest at 1.4 steps/s, 21 minutes in all. On the test images they answer 99.71 % of the yes/no questions (82.54 % can be
had without looking), name the right colour in 100.00 % and the right shape in 98.56 %. Other machines and versions
round otherwise and end with other weights.
"""

import argparse
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from examples.easy_vqa.data import (
    COLORS,
    IGNORE,
    IMAGE_TOKEN,
    SHAPES,
    Question,
    VQADataset,
    accuracy,
    blind_accuracy,
    build_processor,
    load_images,
    load_questions,
    preprocess,
)

IMAGE_SIZE, PATCH_SIZE = 64, 16
WORDS = COLORS + SHAPES
AFFIRMATIONS = ("there is a {}", "there is a {} in the image", "a {} is present", "the image does contain a {}")
DENIALS = ("there is no {}", "there is not a {} in the image", "no {} is present", "the image does not contain a {}")
# How often a text of each kind is drawn for an image: what is there as often as what is not, although four of five
# questions ask for something that is not. Otherwise the model is slow to learn to look at the image.
SHARES = {
    ("question", True): 0.35,
    ("question", False): 0.35,
    ("statement", True): 0.2,
    ("statement", False): 0.05,
    ("wording", None): 0.05,
}


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly the words in `texts`."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())})
    vocabulary = {word: index for index, word in enumerate([*special.values(), IMAGE_TOKEN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[IMAGE_TOKEN], padding_side="left", **special
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained base: a CLIP vision tower of 4 layers and a Llama of 8 layers, 2 million parameters in all."""
    special_ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )
    text = LlamaConfig(
        # With the usual 0.02, so narrow a model takes far longer to start comparing the question with the image.
        initializer_range=0.06,
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **special_ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        **special_ids,
    )
    return LlavaForConditionalGeneration(config)


def fact(question: Question) -> tuple[str, bool]:
    """What a yes/no question and its answer say about the image: a colour or shape, and whether it is there."""
    word = re.search(r"\b(" + "|".join(WORDS) + r")\b", question.text)[0]
    negated = re.search(r"\b(no|not)\b", question.text) is not None
    return word, (question.answer == "yes") != negated


def statements(word: str, present: bool) -> list[str]:
    """Wordings of a fact."""
    thing = word if word in SHAPES else f"{word} shape"
    return [form.format(thing) for form in (AFFIRMATIONS if present else DENIALS)]


class Namer(nn.Module):
    """A vision tower with a linear layer over the mean of its patches that says which of `WORDS` an image shows."""

    def __init__(self, vision_tower: nn.Module):
        super().__init__()
        self.vision_tower = vision_tower
        width = vision_tower.config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(WORDS)))

    def forward(self, pixel_values: Tensor, facts: Tensor) -> Tensor:
        """The loss for `facts` (batch, words): 1 for present, 0 for absent, NaN where nothing is known."""
        patches = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        known = ~facts.isnan()
        return nn.functional.binary_cross_entropy_with_logits(self.head(patches.mean(1))[known], facts[known])


def known_facts(questions: Sequence[Question], num_images: int) -> Tensor:
    """The facts in yes/no questions as (images, words): 1 for present, 0 for absent, NaN for not known."""
    facts = torch.full((num_images, len(WORDS)), torch.nan)
    for question in questions:
        word, present = fact(question)
        facts[question.image, WORDS.index(word)] = float(present)
    return facts


class Pretraining:
    """Draws batches of augmented images, with facts or texts about them. A batch depends on its seed alone."""

    def __init__(
        self,
        questions: Sequence[Question],
        wordings: Sequence[str],
        pixel_values: Tensor,
        processor: LlavaProcessor,
        texts_per_image: int,
        device: torch.device,
    ):
        """Keeps the data.

        Args:
            questions: yes/no questions.
            wordings: questions whose words alone are learned, with every image.
            pixel_values: (images, 3, size, size).
            processor: the model's processor.
            texts_per_image: how many texts follow each image in a batch.
            device: where the batches are wanted.
        """
        self.device = device
        self.texts_per_image = texts_per_image
        self.pixel_values = pixel_values.to(device)
        self.boxes = bounding_boxes(pixel_values)
        self.facts = known_facts(questions, len(pixel_values))
        self._build_texts(questions, wordings, processor.tokenizer)
        self._build_layout(processor)

    def _build_texts(
        self, questions: Sequence[Question], wordings: Sequence[str], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Sets `token_ids` and `labels`, (images, texts, length), and `weights`, (images, texts), to draw by."""

        @cache
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        # A text is (kind, tokens, how many tokens at its start have no loss). The first word never has one, as the
        # token before it ends the image or another text.
        texts = [[(("wording", None), encode(wording), 1) for wording in wordings] for _ in self.pixel_values]
        eos = [tokenizer.eos_token_id]
        for question in questions:
            prompt, answer = encode(question.text), encode(question.answer)
            word, present = fact(question)
            texts[question.image].append((("question", present), prompt + answer + eos, len(prompt)))
            texts[question.image] += [
                (("statement", present), encode(text) + eos, 1) for text in statements(word, present)
            ]

        def padded(rows: list[list], value: float | list) -> list[list]:
            length = max(map(len, rows))
            return [row + [value] * (length - len(row)) for row in rows]

        counts = [Counter(kind for kind, _, _ in row) for row in texts]
        weights = [
            [SHARES[kind] / count[kind] for kind, _, _ in row] for row, count in zip(texts, counts, strict=True)
        ]
        self.weights = torch.tensor(padded(weights, 0.0))
        length = max(len(ids) for row in texts for _, ids, _ in row)

        def table(rows: list[list[list[int]]], value: int) -> Tensor:
            blank = [value] * length
            return torch.tensor(padded([[ids + blank[len(ids) :] for ids in row] for row in rows], blank))

        self.token_ids = table([[ids for _, ids, _ in row] for row in texts], tokenizer.pad_token_id)
        self.labels = table([[[IGNORE] * start + ids[start:] for _, ids, start in row] for row in texts], IGNORE)

    def _build_layout(self, processor: LlavaProcessor) -> None:
        """Sets the image's `prefix` of tokens, and the positions and block mask that all batches share."""
        picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        self.prefix = torch.tensor(processor(images=picture, text=IMAGE_TOKEN).input_ids[0])
        start, length = len(self.prefix), self.token_ids.shape[-1]
        positions = torch.arange(start + length)
        self.position_ids = torch.cat([positions[:start], positions[start:].repeat(self.texts_per_image)])
        block = torch.cat([torch.zeros(start), torch.arange(1, self.texts_per_image + 1).repeat_interleave(length)])
        visible = (block == 0) | (block == block[:, None])
        # Padding needs no mask: it stands at the end of its text, where no token looks.
        self.attention_mask = visible.tril()[None, None]

    def pictures(self, size: int, seed: int) -> dict[str, Tensor]:
        """The arguments of `Namer` for `size` images drawn with replacement."""
        images, generator = self._draw(size, seed)
        facts = self.facts[images].to(self.device)
        return {"pixel_values": augment(self.pixel_values, images, self.boxes[images], generator), "facts": facts}

    def texts(self, size: int, seed: int) -> dict[str, Tensor]:
        """The arguments of the whole model for `size` images drawn with replacement."""
        images, generator = self._draw(size, seed)
        columns = torch.multinomial(self.weights[images], self.texts_per_image, True, generator=generator)
        token_ids = self.token_ids[images[:, None], columns].flatten(1)
        labels = self.labels[images[:, None], columns].flatten(1)
        prefix = self.prefix.expand(size, -1)
        batch = {
            "input_ids": torch.cat([prefix, token_ids], 1),
            "labels": torch.cat([torch.full_like(prefix, IGNORE), labels], 1),
            "position_ids": self.position_ids.expand(size, -1),
            "attention_mask": self.attention_mask.expand(size, -1, -1, -1),
            "pixel_values": augment(self.pixel_values, images, self.boxes[images], generator),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _draw(self, size: int, seed: int) -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(self.weights), (size,), generator=generator), generator


def bounding_boxes(pixel_values: Tensor) -> Tensor:
    """First and last row, first and last column of each image's shape: (images, 4).

    The shape is what differs from the background, the median colour.
    """
    background = pixel_values.flatten(2).median(-1).values[:, :, None, None]
    shape = ((pixel_values - background).abs() > 0.1).any(1)

    def first_and_last(occupied: Tensor) -> list[Tensor]:
        occupied = occupied.int()
        return [occupied.argmax(-1), occupied.shape[-1] - 1 - occupied.flip(-1).argmax(-1)]

    return torch.stack(first_and_last(shape.any(2)) + first_and_last(shape.any(1)), 1)


def augment(pixel_values: Tensor, images: Tensor, boxes: Tensor, generator: torch.Generator) -> Tensor:
    """The chosen images, each shifted, mirrored left to right, and made a little brighter or darker, at random.

    A shift wraps around, and goes only so far that the shape stays whole. No question speaks of places or directions.
    """
    batch, size = len(images), pixel_values.shape[-1]

    def shifted(first: Tensor, last: Tensor) -> Tensor:
        """The row (or column) that each row of the result comes from: (batch, size)."""
        start = (torch.rand(batch, generator=generator) * (size - last + first)).long()
        return (torch.arange(size) + (first - start)[:, None]) % size

    rows, columns = shifted(boxes[:, 0], boxes[:, 1]), shifted(boxes[:, 2], boxes[:, 3])
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    brightness = 0.05 * torch.randn(batch, 1, 1, 1, generator=generator)
    images, rows, columns, brightness = (t.to(pixel_values.device) for t in (images, rows, columns, brightness))
    result = pixel_values[images[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return result + brightness


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a half cosine down to zero."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    peak_learning_rate: float,
    checkpoint: Path,
    save_every: int,
    options: dict[str, float],
) -> None:
    """Trains in place, from the state in `checkpoint` if there is one.

    Args:
        model: what to train.
        loss_of: the loss of the model at a step; may depend on nothing but the model and the step.
        steps: the length of the run.
        peak_learning_rate: see `learning_rate`.
        checkpoint: file for the state of the run, saved every `save_every` steps and at the end.
        save_every: in steps.
        options: must be equal in the run that wrote `checkpoint`.

    Raises:
        ValueError: `checkpoint` is of a run with other options.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu")
        if state["options"] != options:
            raise ValueError(
                f"{checkpoint} is of a run with {state['options']}, and this run has {options}: give the same options "
                "to go on with that run, or delete its checkpoints to start afresh."
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model.train()
    progress = tqdm(range(first_step, steps), checkpoint.stem, initial=first_step, total=steps, mininterval=1.0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_learning_rate)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            partial = checkpoint.with_suffix(".partial")
            torch.save(state | {"step": step + 1, "options": options}, partial)
            os.replace(partial, checkpoint)


@torch.no_grad()
def naming_accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pixel_values: Tensor, words: Sequence[str]
) -> float:
    """How often "there is a" goes on with the test image's own one of `words`, all colours or all shapes.

    The truth is in the answers to the test split's "what" questions; an image without one of `words` is left out.
    """
    truth = {
        question.image: question.answer for question in load_questions("what", "test") if question.answer in words
    }
    batch = processor(images=Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)), text=f"{IMAGE_TOKEN} there is a")
    input_ids = torch.tensor(batch.input_ids, device=model.device).expand(len(truth), -1)
    pixel_values = pixel_values[list(truth)].to(model.device)
    logits = model(input_ids=input_ids, pixel_values=pixel_values).logits[:, -1]
    candidates = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(words)), device=model.device)
    predicted = logits[:, candidates].argmax(-1).tolist()
    return sum(words[index] == word for index, word in zip(predicted, truth.values(), strict=True)) / len(truth)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base", help="folder for the model")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path("outputs/pretrain_base"), help="folder to resume from"
    )
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.add_argument_group("options that make the weights")
    options.add_argument("--vision-steps", type=int, default=6000, help="steps of the vision tower alone")
    options.add_argument("--steps", type=int, default=1000, help="steps of the whole model")
    options.add_argument("--batch-size", type=int, default=64, help="images per step")
    options.add_argument("--texts-per-image", type=int, default=4)
    options.add_argument("--learning-rate", type=float, default=1e-3, help="the highest; see learning_rate()")
    options.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    questions = load_questions("yes/no", "train")
    wordings = sorted({question.text for question in load_questions("what", "train")})
    words = [question.text for question in questions] + wordings + ["yes no"]
    processor = build_processor(build_tokenizer(words), IMAGE_SIZE, PATCH_SIZE)
    pixel_values = preprocess(processor, load_images("train"))
    model = build_model(processor.tokenizer).to(args.device)
    namer = Namer(model.model.vision_tower).to(args.device)
    data = Pretraining(questions, wordings, pixel_values, processor, args.texts_per_image, args.device)

    first_seed = args.seed * 10_000_000
    options = {"batch size": args.batch_size, "learning rate": args.learning_rate, "seed": args.seed}
    options["vision steps"] = args.vision_steps
    train(
        namer,
        lambda step: namer(**data.pictures(args.batch_size, first_seed + step)),
        args.vision_steps,
        args.learning_rate,
        args.checkpoints / "vision.pt",
        args.save_every,
        options,
    )
    model.model.vision_tower.requires_grad_(False)
    first_seed += args.vision_steps
    train(
        model,
        lambda step: model(**data.texts(args.batch_size, first_seed + step)).loss,
        args.steps,
        args.learning_rate,
        args.checkpoints / "model.pt",
        args.save_every,
        options | {"steps": args.steps, "texts per image": args.texts_per_image},
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)

    model = LlavaForConditionalGeneration.from_pretrained(args.output).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(args.output)
    pixel_values = preprocess(processor, load_images("test"))
    test = VQADataset(load_questions("yes/no", "test"), pixel_values, processor)
    pad_token_id = processor.tokenizer.pad_token_id
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, saved in {args.output}")
    print("on the test images:")
    print(f"  yes/no questions {accuracy(model, test, pad_token_id):.2%}, blind {blind_accuracy(test.questions):.2%}")
    print(f"  naming the color {naming_accuracy(model, processor, pixel_values, COLORS):.2%}")
    print(f"  naming the shape {naming_accuracy(model, processor, pixel_values, SHAPES):.2%}")


if __name__ == "__main__":
    main()
