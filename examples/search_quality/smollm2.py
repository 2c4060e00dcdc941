"""The problem `smollm2`: SmolLM2-135M, without any training, on science text."""

import json
from pathlib import Path

import torch
from peft import get_peft_model

from examples.search_quality.problem import Problem, Set
from examples.shared.smollm2 import load_smollm2
from peft_eas import EASConfig, attention_similarities

NUM_SKIP = (12, 8, 15)
TOKENS = 128  # of a batch, which is one piece of text
NUM_SEARCH, NUM_HELD_OUT = 64, 16
CALIBRATION_BATCHES = 8  # of the search's, for the cosine similarity
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


def problem(data: Path, output_dir: Path) -> Problem:
    """The problem; a skipped attention is dropped, because an untrained adapter passes on what it gets."""
    base, tokenizer = load_smollm2()
    ids = torch.tensor(tokenizer(read_text(data)).input_ids)
    pieces = ids[: len(ids) // TOKENS * TOKENS].view(-1, 1, TOKENS)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    batches = pieces[order[: NUM_SEARCH + NUM_HELD_OUT]]
    config = EASConfig(task_type="CAUSAL_LM", num_skip=1, r=1, groups=1, paths=1, attention_r=0, context="none")
    model = get_peft_model(base, config).eval()
    names = model.base_model.candidates
    similarities = attention_similarities(model, [{"input_ids": ids} for ids in batches[:CALIBRATION_BATCHES]])

    @torch.no_grad()
    def measure(skipped: Set, batch: int) -> float:
        model.base_model.set_skipped_modules([names[index] for index in skipped])
        return model(input_ids=batches[batch], labels=batches[batch]).loss.item()

    return Problem(
        names,
        [similarities[name] for name in names],
        measure,
        NUM_SEARCH,
        NUM_HELD_OUT,
        output_dir / "smollm2_losses.jsonl",
        {"model": "SmolLM2-135M-Instruct", "text": "ScienceQA", "tokens": TOKENS},
    )
