"""BANKING77 as a task for a language model: it writes the intent of a bank customer's query, one of 77.

Casanueva et al., arXiv 2003.04807. The data lie in a folder with train.csv and test.csv, each with the columns `text`
and `category` (https://github.com/PolyAI-LDN/task-specific-datasets, banking_data).
"""

import copy
import csv
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.shared.measure import on_device
from examples.shared.task import Task

HELD_BACK = 0.05  # of the training queries, for the search's rewards
BATCH = 64  # of queries that are answered together

Example = tuple[list[int], list[int]]  # the tokens of a prompt and of its answer


def read_queries(file: Path) -> list[tuple[str, str]]:
    """The queries and their intents, in words.

    Raises:
        SystemExit: where there is no such file.
    """
    if not file.is_file():
        raise SystemExit(f"{file} is missing. Give the folder with BANKING77's train.csv and test.csv.")
    with file.open(encoding="utf-8", newline="") as lines:
        return [(row["text"].strip(), row["category"].replace("_", " ")) for row in csv.DictReader(lines)]


class Collator:
    """Makes batches of examples: padded on the right with labels for training, on the left without for generation."""

    def __init__(self, pad_token_id: int, prompt_only: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.prompt_only = prompt_only

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and, for training, labels, each (B, T)."""
        rows = [prompt if self.prompt_only else prompt + answer for prompt, answer in examples]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for i, (row, (prompt, _)) in enumerate(zip(rows, examples)):
            place = slice(length - len(row), length) if self.prompt_only else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row), 1
            labels[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
        batch = {"input_ids": ids, "attention_mask": mask}
        return batch if self.prompt_only else {**batch, "labels": labels}


def banking77(
    folder: Path,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_test: int | None = None,
    validate: bool = False,
    **settings: int | float,
) -> Task:
    """The task for a causal language model; `num_test` of the test queries, drawn at random, are answered.

    With `validate`, these are training queries, which are then not trained on: for a comparison that decides
    something. `settings` take the place of `steps`, `batch_size` and `learning_rate`.
    """
    shuffle = random.Random(0).shuffle

    def examples(file: str) -> list[Example]:
        queries = read_queries(folder / file)
        shuffle(queries)
        return [
            (tokenizer(f"Query: {text}\nIntent:").input_ids, [*tokenizer(f" {intent}").input_ids, eos])
            for text, intent in queries
        ]

    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train, test = examples("train.csv"), [] if validate else examples("test.csv")[:num_test]
    if validate:
        train, test = train[num_test:], train[:num_test]
    num_reward = max(1, round(HELD_BACK * len(train)))
    longest = max(len(answer) for _, answer in test)
    prompts = Collator(pad, prompt_only=True)

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        right = 0
        for start in range(0, len(test), BATCH):
            part = test[start : start + BATCH]
            batch = on_device(prompts(part), model)
            ids = model.generate(**batch, max_new_tokens=longest, do_sample=False, pad_token_id=pad, eos_token_id=eos)
            written = ids[:, batch["input_ids"].shape[1] :].tolist()
            right += sum(tokens[: len(answer)] == answer for tokens, (_, answer) in zip(written, part))
        return {"accuracy": right / len(test)}

    return Task(
        name="banking77",
        load_base=lambda: copy.deepcopy(base),
        train=train[num_reward:],
        reward=train[:num_reward],
        test=test,
        collate=Collator(pad),
        score=score,
        eas={"task_type": "CAUSAL_LM", "r": 32, "attention_r": 16, "dropout": 0.0},
        lora_targets=r".*\.(q|k|v|o|gate|up|down)_proj",
        deployed_batch=lambda: prompts(test[:32]),
        **{"steps": 400, "batch_size": 32, "learning_rate": 2e-3, **settings},
    )
