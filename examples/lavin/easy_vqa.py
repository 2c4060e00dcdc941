"""easy-VQA as a task for a small LaVIN, made of the parts of the shipped base model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration

from examples.easy_vqa.data import Kind, Question, Split, exact_match, load_images, load_questions, preprocess
from examples.lavin.modeling_lavin import EAS_ARGUMENTS, LavinForConditionalGeneration
from examples.lavin.processing_lavin import LavinProcessor
from examples.lavin.samples import LavinCollator, Sample
from examples.shared.task import Task

BASE = Path(__file__).parents[1] / "easy_vqa" / "base"
KINDS: tuple[Kind, ...] = ("what", "yes/no")
TEST_EVERY = 4  # of the test questions one in so many is asked, which leaves more than 2,400


def load_lavin(seed: int = 0) -> tuple[LavinForConditionalGeneration, LavinProcessor]:
    """A LaVIN of the shipped base's Llama and CLIP tower, with a fresh projector and modality embeddings; float32."""
    llava = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    parts = AutoProcessor.from_pretrained(BASE, use_fast=False)
    llm = LlamaForCausalLM(llava.config.text_config)
    llm.model, llm.lm_head = llava.model.language_model, llava.lm_head
    llm.generation_config = llava.generation_config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Every layer's state is an image token: the tower has four layers.
        model = LavinForConditionalGeneration.from_parts(
            llm, llava.model.vision_tower, parts.tokenizer, vision_layer_interval=1
        )
    return model, LavinProcessor(parts.tokenizer, parts.image_processor, model.config.num_image_tokens)


def lavin_easy_vqa() -> Task:
    """The task: all questions of easy-VQA, of which one in twenty training images is held back for the rewards.

    The most frequent answer is right on 17.7 % of the test split's "what" questions and on 82.5 % of the others.
    """
    _, processor = load_lavin()
    pixel_values = {split: preprocess(processor, load_images(split)) for split in ("train", "test")}
    questions = [question for kind in KINDS for question in load_questions(kind, "train")]

    def samples(questions: Iterable[Question], split: Split) -> list[Sample]:
        return [Sample(q.text, f" {q.answer}", pixel_values[split][q.image]) for q in questions]

    tests = {kind: samples(load_questions(kind, "test")[::TEST_EVERY], "test") for kind in KINDS}
    collate = LavinCollator(processor)

    def score(model: nn.Module) -> dict[str, float]:
        shares = {
            kind: exact_match(model, DataLoader(t, batch_size=128, collate_fn=collate)) for kind, t in tests.items()
        }
        right = sum(share * len(tests[kind]) for kind, share in shares.items())
        return {"accuracy": right / sum(map(len, tests.values())), **shares}

    return Task(
        name="lavin-easy-vqa",
        load_base=lambda: load_lavin()[0],
        train=samples((q for q in questions if q.image % 20 != 0), "train"),
        reward=samples((q for q in questions if q.image % 20 == 0), "train"),
        test=[sample for part in tests.values() for sample in part],
        collate=collate,
        score=score,
        eas={
            "task_type": "CAUSAL_LM",
            **EAS_ARGUMENTS,
            "r": 32,
            "attention_r": 16,
            "dropout": 0.0,
        },
        lora_targets=r".*(language_model|vision_tower).*\.self_attn\.(q|v)_proj",
        steps=1000,
        batch_size=32,
        learning_rate=3e-3,
        deployed_batch=lambda: dict(LavinCollator(processor, "left", prompt_only=True)(tests["what"][:32])),
    )
