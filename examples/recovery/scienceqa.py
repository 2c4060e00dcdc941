"""ScienceQA as a task of the ablation: SmolLM2 names the letter of the right choice."""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from examples.scienceqa.answering import num_tokens, rank_letters
from examples.scienceqa.data import ScienceQADataset, read_problems
from examples.scienceqa.task import load_lavin, make_task
from examples.shared.measure import on_device
from examples.shared.task import Task
from peft_eas.evaluation import evaluation_mode

FORMAT, MAX_TOKENS = "QCM-A", 160  # longer problems are left out
LOADING = {"llm": "smollm2"}


def scienceqa_task(folder: Path, **settings: int | float) -> Task:
    """The task; images are told by their captions alone, and no problem of the split "test" is used.

    A third of the split "val" is for searches, the rest for the scores: `accuracy`, of the letters that rank first,
    and `loss`, of the right answers' tokens. `settings` take the place of `steps`, `batch_size` and `learning_rate`.
    """
    _, processor = load_lavin(**LOADING)

    validation = read_problems(folder, "val")
    lengths = num_tokens(ScienceQADataset(validation, FORMAT, "none"), processor)
    short = [problem for problem, length in zip(validation, lengths) if length <= MAX_TOKENS]
    held_out = [problem for index, problem in enumerate(short) if index % 3]
    # Of the others, `make_task` leaves out the longer ones itself.
    parts = {"train": read_problems(folder, "train"), "reward": short[::3], "test": held_out}
    sizes = {"steps": 200, "batch_size": 8, "learning_rate": 2e-3, "attention_r": 16, **settings}
    task = make_task(parts, LOADING, processor, prompt_format=FORMAT, max_length=MAX_TOKENS, **sizes)

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        with evaluation_mode(model):
            letters = rank_letters(model, task.test, processor)
            batches = DataLoader(task.test, collate_fn=task.collate)
            losses = [model(**on_device(batch, model)).loss.item() for batch in batches]
        right = sum(letter == problem.answer for letter, problem in zip(letters, task.test.problems))
        return {"accuracy": right / len(letters), "loss": statistics.fmean(losses)}

    return replace(task, score=score)
