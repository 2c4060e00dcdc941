"""The problems `smollm2` and `smollm2-fitted`: SmolLM2-135M, without any training, on science text."""

import json
from pathlib import Path

import torch

from examples.search_quality.problem import Problem, problem_of
from examples.shared.smollm2 import load_smollm2

NUM_SKIP, NUM_SKIP_FITTED = (8, 12, 15), (12, 15, 20)
TOKENS = 128  # of a batch
NUM_SEARCH, NUM_HELD_OUT = 64, 16
MAX_CHARACTERS = 600_000


def read_text(folder: Path) -> str:
    """ScienceQA's lectures, each once, questions and solutions.

    Raises:
        SystemExit: where there is no such file.
    """
    file = folder / "problems.json"
    if not file.is_file():
        raise SystemExit(f"{file} is missing. Give the folder with ScienceQA's problems.json.")
    problems = json.loads(file.read_text(encoding="utf-8")).values()
    texts = [text for one in problems for text in (one["lecture"], f"{one['question']} {one['solution']}")]
    return "\n\n".join(dict.fromkeys(text.strip() for text in texts))[:MAX_CHARACTERS]


def problem(data: Path, output_dir: Path, is_fitted: bool = False) -> Problem:
    """The problem, in which fitted adapters may stand for what is dropped; a batch is one piece of text."""
    base, tokenizer = load_smollm2()
    ids = torch.tensor(tokenizer(read_text(data)).input_ids)
    pieces = ids[: len(ids) // TOKENS * TOKENS].view(-1, 1, TOKENS)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": piece, "labels": piece} for piece in pieces[order[: NUM_SEARCH + NUM_HELD_OUT]]]
    settings = {"model": "SmolLM2-135M-Instruct", "text": "ScienceQA", "tokens": TOKENS}
    if is_fitted:
        settings["adapters"] = "fitted"
    file = output_dir / f"smollm2{'_fitted' if is_fitted else ''}_losses.jsonl"
    return problem_of(base, batches, NUM_SEARCH, file, settings, is_fitted, task_type="CAUSAL_LM")
