"""Pretrains the small METER of the examples: `python -m examples.meter.pretrain`.

Its vision tower is that of examples/easy_vqa/base, which has learnt the colours and shapes, and stays as it is. The
rest starts at random, and learns as METER did, by image-text matching and by words behind masks. Like the
base, it must know the words and the images and must not know the tasks of the examples, which are to answer "what"
questions, to judge statements about two images, and to tell descriptions such as "a red circle" apart. So it is
trained on the training images with nothing but

1. claims that are true or false by one yes/no question and its answer: statements such as "there is a red shape", and
   the questions with an answer behind them. Whether one is true is what the matching head learns; in the true ones,
   words are masked;
2. wordings like those of the three tasks, for masked words alone, each with an image and with a colour or shape drawn
   at random, so that the words tell nothing about the image.

It never sees the answer of a "what" question, a true statement about two images, a colour and a shape that belong
together, nor anything of the test split.

A run saves its state regularly and, started again with the same options, goes on where it was and ends with the same
weights. It shows its speed, and prints its figures at the end.

The weights in examples/meter/base come from the default options, with one thread of a 2-core Intel Xeon that did other
work too (torch 2.13, transformers 5.23): 1,500 steps at 4 steps/s where it had a core to itself, which is 7 minutes in
all. On the test images they answer 91.27 % of the yes/no questions, by matching, and name the right colour in
100.00 % and the right shape in 98.03 %. Other machines and versions round otherwise and end with other weights.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoProcessor,
    CLIPProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from examples.easy_vqa.data import COLORS, IGNORE, SHAPES, Question, load_images, load_questions, preprocess
from examples.easy_vqa.pretrain import (
    AFFIRMATIONS,
    WORDS,
    augment,
    bounding_boxes,
    fact,
    known_facts,
    statements,
    train,
)
from examples.meter.modeling_meter import MeterConfig, MeterForPreTraining
from examples.meter.wordings import DESCRIPTIONS, thing

BASE = Path(__file__).parents[1] / "easy_vqa" / "base"
WIDTH = 96
# Of the claims, statements of what is there. The model has to learn to compare text and image by these, before it can
# learn by negations, each of which turns the truth around.
PLAIN_SHARE = 0.6
PLAIN_CLAIMS = (*AFFIRMATIONS, "a {}", "an image of a {}", "this is a {}", "the image shows a {}")
# With the words of the statements about two images, though worded otherwise.
PAIR_WORDINGS = tuple(
    f"there is a {{}} in {where}"
    for where in (
        "both images",
        "at least one image",
        "exactly one image",
        "neither image",
        "the left image",
        "the right image",
    )
)
NAMES_MASKED, OTHERS_MASKED = 0.6, 0.15  # shares of the colours and shapes in a text, and of its other words
SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}  # in RoBERTa's order


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly the words in `texts`, with RoBERTa's special tokens and their numbers."""
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())})
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def build_model(base: LlavaForConditionalGeneration, vocab_size: int) -> MeterForPreTraining:
    """The untrained model, 2 million parameters, with the base's vision tower, which is frozen."""
    shape = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # With the usual 0.02, so narrow a model takes far longer to start comparing the text with the image.
        "initializer_range": 0.06,
    }
    text = RobertaConfig(
        vocab_size=vocab_size, num_hidden_layers=2, max_position_embeddings=34, type_vocab_size=1, **shape
    )
    model = MeterForPreTraining(MeterConfig(vision_config=base.config.vision_config, text_config=text, **shape))
    model.meter.vision_model.load_state_dict(base.model.vision_tower.state_dict())
    model.meter.vision_model.requires_grad_(False)
    return model


def build_claims(questions: Sequence[Question]) -> dict[tuple[str, bool], list[str]]:
    """By word and whether it is claimed to be there: the wordings of that claim, the plain ones first."""
    claims = {(word, False): statements(word, False) for word in WORDS}
    claims |= {(word, True): [text.format(thing(word)) for text in PLAIN_CLAIMS] for word in WORDS}
    for text in sorted({question.text for question in questions}):
        for answer in ("yes", "no"):
            claims[fact(Question(text, answer, 0))].append(f"{text} {answer}")
    return claims


def build_wordings(questions: Sequence[Question]) -> list[str]:
    """Wordings like those of the tasks, with every colour and every shape in them."""
    wordings = {question.text for question in questions}
    wordings |= {statement.format(thing(word)) for statement in PAIR_WORDINGS for word in WORDS}
    wordings |= {
        description.format(color=color, shape=shape)
        for description, color, shape in itertools.product(DESCRIPTIONS, COLORS, SHAPES)
    }
    return sorted(wordings)


class Pretraining:
    """Draws batches of augmented images with texts about them. A batch depends on its seed alone.

    Args:
        questions: yes/no questions. wordings: of the tasks.
        pixel_values: (images, 3, size, size). tokenizer: the model's.
        texts_per_image: an even number; half of them are for matching, half for masked words.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        wordings: Sequence[str],
        pixel_values: Tensor,
        tokenizer: PreTrainedTokenizerFast,
        texts_per_image: int,
    ):
        self.pixel_values = pixel_values
        self.boxes = bounding_boxes(pixel_values)
        self.tokenizer = tokenizer
        self.texts_per_image = texts_per_image
        facts = known_facts(questions, len(pixel_values))
        self.facts = [
            {word: bool(value) for word, value in zip(WORDS, row, strict=True) if value == value}
            for row in facts.tolist()
        ]
        self.images = [image for image, known in enumerate(self.facts) if known]
        self.claims = {
            claim: [torch.tensor(tokenizer(text).input_ids) for text in texts]
            for claim, texts in build_claims(questions).items()
        }
        self.names = torch.tensor(tokenizer.convert_tokens_to_ids(list(WORDS)))
        self.wordings = [torch.tensor(tokenizer(text).input_ids) for text in wordings]

    def batch(self, size: int, seed: int) -> dict[str, Tensor]:
        """The arguments of the model for `size` images drawn with replacement."""
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        images = draw.choices(self.images, k=size)
        texts, itm_labels, is_masked = [], [], []
        for image in images:
            for position in range(self.texts_per_image):
                for_matching = position < self.texts_per_image // 2
                is_true = not for_matching or draw.random() < 0.5
                # A third of the texts with masks are wordings.
                of_image = for_matching or draw.random() < 2 / 3
                texts.append(self._draw_claim(image, is_true, draw) if of_image else draw.choice(self.wordings))
                itm_labels.append(int(is_true) if for_matching else IGNORE)
                is_masked.append(not for_matching)
        input_ids = pad_sequence(texts, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        input_ids, labels = self._mask(input_ids, torch.tensor(is_masked), generator)
        shape = (size, self.texts_per_image, -1)
        indices = torch.tensor(images)
        return {
            "input_ids": input_ids.view(shape),
            "attention_mask": (input_ids != self.tokenizer.pad_token_id).long().view(shape),
            "labels": labels.view(shape),
            "itm_labels": torch.tensor(itm_labels),
            "pixel_values": augment(self.pixel_values, indices, self.boxes[indices], generator),
        }

    def _draw_claim(self, image: int, is_true: bool, draw: random.Random) -> Tensor:
        """A claim about the image, true or not; about what is there as often as about what is not, if it can be."""
        facts = self.facts[image]
        is_plain = draw.random() < PLAIN_SHARE
        wanted = is_true if is_plain else draw.random() < 0.5
        word = draw.choice([word for word, present in facts.items() if present == wanted] or list(facts))
        texts = self.claims[word, facts[word] == is_true]
        return draw.choice(texts[: len(PLAIN_CLAIMS)] if is_plain else texts)

    def _mask(self, input_ids: Tensor, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Puts masks in the place of some words of `rows`; returns the words in the place of the others' labels."""
        is_word = (input_ids >= len(SPECIAL)) & rows[:, None]
        shares = torch.where(torch.isin(input_ids, self.names), NAMES_MASKED, OTHERS_MASKED)
        chosen = is_word & (torch.rand(input_ids.shape, generator=generator) < shares)
        labels = input_ids.masked_fill(~chosen, IGNORE)
        return input_ids.masked_fill(chosen, self.tokenizer.mask_token_id), labels


@torch.no_grad()
def yes_no_accuracy(model: MeterForPreTraining, processor: CLIPProcessor, pixel_values: Tensor) -> float:
    """How often the matching head prefers a test question with its answer to that with the other one."""
    questions, right = load_questions("yes/no", "test"), 0
    for start in range(0, len(questions), 128):
        part = questions[start : start + 128]
        scores = []
        for answer in ("no", "yes"):
            texts = processor.tokenizer(
                [f"{question.text} {answer}" for question in part], padding=True, return_tensors="pt"
            )
            output = model(texts.input_ids, texts.attention_mask, pixel_values[[question.image for question in part]])
            scores.append(output.itm_logits.log_softmax(-1)[:, 1])
        says_yes = (scores[1] > scores[0]).tolist()
        right += sum((question.answer == "yes") == said for question, said in zip(part, says_yes, strict=True))
    return right / len(questions)


@torch.no_grad()
def naming_accuracy(
    model: MeterForPreTraining, processor: CLIPProcessor, pixel_values: Tensor, words: Sequence[str]
) -> float:
    """How often the masked word of "there is a <mask> (shape)" is the test image's own one of `words`."""
    truth = {
        question.image: question.answer for question in load_questions("what", "test") if question.answer in words
    }
    text = f"there is a {thing(words[0]).replace(words[0], '<mask>')}"
    input_ids = processor.tokenizer(text, return_tensors="pt").input_ids.expand(len(truth), -1)
    logits = model(input_ids, pixel_values=pixel_values[list(truth)]).mlm_logits
    logits = logits[input_ids == processor.tokenizer.mask_token_id]
    predicted = logits[:, processor.tokenizer.convert_tokens_to_ids(list(words))].argmax(-1).tolist()
    return sum(words[index] == word for index, word in zip(predicted, truth.values(), strict=True)) / len(truth)


def report(folder: Path) -> None:
    """Prints the figures of the saved model."""
    model = MeterForPreTraining.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    pixel_values = preprocess(processor, load_images("test"))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, saved in {folder}")
    print("on the test images:")
    print(f"  yes/no questions {yes_no_accuracy(model, processor, pixel_values):.2%}")
    print(f"  naming the color {naming_accuracy(model, processor, pixel_values, COLORS):.2%}")
    print(f"  naming the shape {naming_accuracy(model, processor, pixel_values, SHAPES):.2%}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base", help="folder for the model")
    parser.add_argument("--checkpoints", type=Path, default=Path("outputs/pretrain_meter"), help="to resume from")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    options = parser.add_argument_group("options that make the weights")
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--batch-size", type=int, default=16, help="images per step")
    options.add_argument("--texts-per-image", type=int, default=4)
    options.add_argument("--learning-rate", type=float, default=1e-3, help="the highest; a half cosine goes to 0")
    options.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    base = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    base_processor: LlavaProcessor = AutoProcessor.from_pretrained(BASE)
    questions = load_questions("yes/no", "train")
    wordings = build_wordings(load_questions("what", "train"))
    claims = [text for texts in build_claims(questions).values() for text in texts]
    tokenizer = build_tokenizer(claims + wordings)
    processor = CLIPProcessor(base_processor.image_processor, tokenizer)
    model = build_model(base, len(tokenizer))
    pixel_values = preprocess(processor, load_images("train"))
    data = Pretraining(questions, wordings, pixel_values, tokenizer, args.texts_per_image)

    first_seed = args.seed * 10_000_000
    names = ("steps", "batch_size", "texts_per_image", "learning_rate", "seed")
    train(
        model,
        lambda step: model(**data.batch(args.batch_size, first_seed + step)).loss,
        args.steps,
        args.learning_rate,
        args.checkpoints / "model.pt",
        args.save_every,
        {name: getattr(args, name) for name in names},
    )
    with torch.no_grad():  # as METER starts the token type of a pair's second image
        embeddings = model.meter.token_type_embeddings.weight
        embeddings[2] = embeddings[1]
    model.half().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    report(args.output)


if __name__ == "__main__":
    main()
