"""The part `tuned`: the set that a search finds while MiniLM is tuned, against every set, tuned alike.

A run of tuned.jsonl either searches, and tunes what it finds to the end, or tunes a given set from the start. All have
the same steps, data and settings, and are scored on the same held-out queries.
"""

import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from examples.search_quality.minilm import Queries, load_base, load_queries
from examples.shared.json_lines import append_line, read_lines
from examples.shared.task import Task, tune
from peft_eas import EASCallback, EASConfig
from peft_eas.evaluation import evaluation_mode
from peft_eas.strategies import STRATEGIES

NUM_SKIP = 3
STEPS, BATCH, LEARNING_RATE = 240, 16, 2e-3
NUM_HELD_OUT = 1024
SEEDS = (0, 1, 2)  # of the searches; the given sets are tuned with the first
KEY = ("strategy", "seed", "given")  # of a record; `given` is the set that was tuned from the start, or None

Record = dict[str, Any]


def read_tuned(folder: Path) -> list[Record]:
    """The finished runs."""
    return read_lines(folder / "tuned.jsonl")


def run(data: Path, folder: Path) -> None:
    """Makes the runs that are not made."""
    queries = load_queries(data)
    task = _task(queries, folder / "minilm")
    candidates = get_peft_model(task.load_base(), EASConfig(num_skip=0, **task.eas)).base_model.candidates
    points = [(strategy, seed, None) for seed in SEEDS for strategy in STRATEGIES]
    points += [(None, SEEDS[0], list(one)) for one in combinations(range(len(candidates)), NUM_SKIP)]
    done = [[record[key] for key in KEY] for record in read_tuned(folder)]
    with tqdm([point for point in points if list(point) not in done], desc="tuned", unit="run") as bar:
        for strategy, seed, given in bar:
            bar.set_postfix_str(f"{strategy or given}, seed {seed}")
            set_seed(seed)  # of the adapters' first weights
            model = get_peft_model(task.load_base(), EASConfig(num_skip=NUM_SKIP, **task.eas))
            if given is not None:
                model.base_model.fix_skipped_modules([candidates[index] for index in given])
            search = {} if strategy is None else {"strategy": strategy, "reward_dataset": task.reward}
            with tempfile.TemporaryDirectory() as outputs:
                tune(model, task, Path(outputs), seed, [EASCallback(**search)], progress=False)
            found = [candidates.index(name) for name in model.base_model.skipped_modules]
            record = dict(zip(KEY, (strategy, seed, given))) | {"skipped": found, "steps": task.steps}
            append_line(folder / "tuned.jsonl", record | task.score(model))


def _task(queries: Queries, base: Path) -> Task:
    test = queries.held_out[:NUM_HELD_OUT]

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        losses, right = 0.0, 0
        with evaluation_mode(model):
            for start in range(0, len(test), 64):
                batch = queries.collate(test[start : start + 64])
                output = model(**batch)
                losses += output.loss.item() * len(batch["labels"])
                right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
        return {"accuracy": right / len(test), "loss": losses / len(test)}

    return Task(
        name="minilm-banking77",
        load_base=lambda: load_base(queries, base),
        train=queries.train,
        reward=queries.search,
        test=test,
        collate=queries.collate,
        score=score,
        eas={"task_type": "SEQ_CLS", "r": 32, "attention_r": 8, "dropout": 0.0},
        lora_targets=r".*\.(query|value)",
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        deployed_batch=lambda: queries.collate([{**sample, "labels": 0} for sample in test[:BATCH]]),
    )
