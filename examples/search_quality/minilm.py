"""The problem `minilm`: all-MiniLM-L6-v2, whose 6 attentions make 64 sets, as a classifier of BANKING77's queries."""

from pathlib import Path

from examples.search_quality.problem import Problem, problem_of
from examples.shared.minilm import BATCH, HEAD_STEPS, NUM_SEARCH, load_base, load_queries

NUM_SKIP = (2, 3)
NUM_HELD_OUT = 32  # batches


def problem(data: Path, output_dir: Path) -> Problem:
    """The problem; nothing is tuned with an attention skipped."""
    queries = load_queries(data)
    samples = queries.search + queries.held_out[: BATCH * NUM_HELD_OUT]
    batches = [queries.collate(samples[start : start + BATCH]) for start in range(0, len(samples), BATCH)]
    settings = {"model": "all-MiniLM-L6-v2", "data": "BANKING77", "head_steps": HEAD_STEPS, "batch": BATCH}
    base = load_base(queries, output_dir / "minilm")
    return problem_of(base, batches, NUM_SEARCH, output_dir / "minilm_losses.jsonl", settings)
