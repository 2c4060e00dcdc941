"""A small made-up data set in ScienceQA's layout, and a tiny language model with its tokenizer."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def problem(**fields: Any) -> dict[str, Any]:
    """One problem as problems.json has it."""
    defaults = {
        "question": "Which of these floats?",
        "choices": ["a stone", "a cork"],
        "answer": 1,
        "hint": "",
        "image": None,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "physics",
        "category": "Materials",
        "skill": "Float or sink",
        "lecture": "Light things float.",
        "solution": "A cork is light.",
        "split": "train",
    }
    return {**defaults, **fields}


def write_data(folder: Path, problems: dict[str, dict[str, Any]], captions: dict[str, str]) -> Path:
    """Writes the files; images are left to the caller. The split "trainval" is made of "train" and "val"."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, fields in problems.items():
        splits[fields["split"]].append(number)
    splits["trainval"] = splits["train"] + splits["val"]
    contents = {"problems": problems, "pid_splits": splits, "captions": {"captions": captions}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_many(folder: Path, num_train: int = 24, num_val: int = 8, num_test: int = 8) -> Path:
    """Sums with two or three results to choose from, of all subjects; every second test problem has an image."""
    generator = random.Random(0)
    problems, captions = {}, {}
    splits = ["train"] * num_train + ["val"] * num_val + ["test"] * num_test
    for i, split in enumerate(splits):
        a, b, num_choices = generator.randint(1, 4), generator.randint(1, 4), 2 + i % 2
        answer = generator.randrange(num_choices)
        number = str(100 + i)
        problems[number] = problem(
            question=f"What is {a} + {b}?",
            choices=[str(a + b + choice - answer) for choice in range(num_choices)],
            answer=answer,
            hint="Count." if i % 3 == 0 else "",
            image="image.png" if i % 2 else None,
            grade=f"grade{1 + i % 12}",
            subject=("natural science", "social science", "language science")[i % 3],
            lecture="Adding is counting on.",
            solution=f"{a} and {b} is {a + b}.",
            split=split,
        )
        if i % 2:
            captions[number] = f"{a} dots and {b} dots."
    write_data(folder, problems, captions)
    for number, fields in problems.items():
        if fields["split"] == "test" and fields["image"]:
            write_image(folder / "images" / "test" / number)
    return folder


def write_image(folder: Path) -> None:
    """One small picture, as image.png."""
    folder.mkdir(parents=True)
    Image.new("RGB", (12, 10), "red").save(folder / "image.png")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and "</s>", which ends a text."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def write_llm(folder: Path, layers: int = 4) -> Path:
    """A Llama of random weights that knows the bytes, as a checkpoint."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
