"""easy-VQA's "what" questions as a task for a small LaVIN, made of the parts of the shipped base model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lavin.modeling_lavin import LavinForConditionalGeneration
from lavin.processing_lavin import LavinProcessor
from lavin.samples import LavinCollator, Sample
from task import Task
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration
from vqa import Question, exact_match, load_images, load_questions, preprocess

BASE = Path(__file__).parents[1] / "base"


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
    """The task; the majority answer is right on 17.7 % of its test questions."""
    _, processor = load_lavin()
    pixel_values = {split: preprocess(processor, load_images(split)) for split in ("train", "test")}

    def samples(questions: Sequence[Question], images: Tensor) -> list[Sample]:
        return [Sample(question.text, question.answer, images[question.image]) for question in questions]

    questions = load_questions("what", "train")
    train = samples([q for q in questions if q.image % 20 != 0], pixel_values["train"])
    reward = samples([q for q in questions if q.image % 20 == 0], pixel_values["train"])
    test = samples(load_questions("what", "test"), pixel_values["test"])
    collate = LavinCollator(processor)

    def score(model: nn.Module) -> dict[str, float]:
        return {"accuracy": exact_match(model, DataLoader(test, batch_size=128, collate_fn=collate))}

    return Task(
        name="lavin-easy-vqa",
        load_base=lambda: load_lavin()[0],
        train=train,
        reward=reward,
        test=test,
        collate=collate,
        score=score,
        eas={
            "task_type": "CAUSAL_LM",
            "target_modules": r".*(language_model|vision_tower).*self_attn",
            "kept_modules": r".*vision_tower.*self_attn",
            "r": 32,
            "attention_r": 16,
            "dropout": 0.0,
            "modules_to_save": ["multi_modal_projector", "modality_embedding"],
        },
        lora_targets=r".*(language_model|vision_tower).*\.self_attn\.(q|v)_proj",
        steps=300,
        batch_size=32,
        learning_rate=3e-3,
        deployed_batch=lambda: dict(LavinCollator(processor, "left", prompt_only=True)(test[:32])),
    )
