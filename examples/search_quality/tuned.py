"""The part `tuned`: the set that a search finds while MiniLM is tuned, against every set, tuned alike.

A run of tuned.jsonl either searches, and tunes what it finds to the end, or tunes a given set from the start. All have
the same steps, data and settings, and are scored on the same held-out queries.
"""

import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from peft import get_peft_model
from tqdm import tqdm
from transformers import set_seed

from examples.shared.json_lines import append_line, read_lines
from examples.shared.minilm import load_queries, minilm_task
from examples.shared.task import tune
from peft_eas import EASCallback, EASConfig
from peft_eas.strategies import STRATEGIES

NUM_SKIP = 3
SEEDS = (0, 1, 2)  # of the searches; the given sets are tuned with the first
KEY = ("strategy", "seed", "given")  # of a record; `given` is the set that was tuned from the start, or None

Record = dict[str, Any]


def read_tuned(folder: Path) -> list[Record]:
    """The finished runs."""
    return read_lines(folder / "tuned.jsonl")


def run(data: Path, folder: Path) -> None:
    """Makes the runs that are not made."""
    queries = load_queries(data)
    task = minilm_task(queries, folder / "minilm")
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
