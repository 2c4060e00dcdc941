"""The runs: each is a model that is tuned with some attentions skipped from the start, and a line of runs.jsonl."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import TrainerCallback, set_seed

from examples.recovery.variants import LORA, REFERENCES, VARIANTS, Variant
from examples.shared.json_lines import append_line, read_lines
from examples.shared.measure import num_parameters
from examples.shared.task import Task, tune
from peft_eas import EASCallback, EASConfig, attention_similarities

KEY = ("model", "num_skip", "variant", "seed")  # of a record: what tells a run from others
FIT_TOKENS = 8192
NUM_COMPARED = 256  # samples that the attentions are compared on
LORA_LEARNING_RATE = 1e-3

Record = dict[str, Any]


def read_runs(folder: Path) -> list[Record]:
    """The finished runs."""
    return read_lines(folder / "runs.jsonl")


def run(task: Task, sizes: Sequence[int], names: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Makes the runs that are not made: of each variant of `names`, for each number of skipped attentions, and of each
    reference."""
    order = _most_similar(task)
    points = [(task.name, k, name, seed) for seed in seeds for k in sizes for name in names if name in VARIANTS]
    points += [(task.name, 0, name, seed) for seed in seeds for name in names if name in REFERENCES]
    done = [tuple(record[key] for key in KEY) for record in read_runs(folder)]
    with tqdm([point for point in points if point not in done], desc=task.name, unit="run") as bar:
        for point in bar:
            _, k, name, seed = point
            bar.set_postfix_str(f"{k} skipped, {name}, seed {seed}")
            record = _lora(task, seed) if name == LORA else _eas(task, order[:k], VARIANTS.get(name, Variant()), seed)
            append_line(folder / "runs.jsonl", dict(zip(KEY, point)) | record)


def _most_similar(task: Task) -> list[str]:
    """The candidates, those that change least what passes them first: a choice that favours no variant."""
    model = get_peft_model(task.load_base(), EASConfig(num_skip=1, **task.eas))
    samples = [task.reward[i] for i in range(min(NUM_COMPARED, len(task.reward)))]
    starts = range(0, len(samples), task.batch_size)
    similarities = attention_similarities(model, [task.collate(samples[i : i + task.batch_size]) for i in starts])
    return sorted(similarities, key=similarities.get, reverse=True)


def _lora(task: Task, seed: int) -> Record:
    """LoRA on all projections."""
    set_seed(seed)  # of the adapters' first weights
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task.eas["task_type"])
    return _tuned(get_peft_model(task.load_base(), config), task, seed, [], learning_rate=LORA_LEARNING_RATE)


def _eas(task: Task, given: list[str], variant: Variant, seed: int) -> Record:
    """Skips the attentions `given`, or, with a search, as many."""
    set_seed(seed)  # of the adapters' first weights
    skips = {"num_skip": len(given)} if variant.is_searched else {"skipped_modules": given}
    model: PeftModel = get_peft_model(task.load_base(), EASConfig(**skips, **{**task.eas, **variant.options()}))
    reward = {"reward_dataset": task.reward} if variant.is_searched else {}
    callback = EASCallback(fit_tokens=FIT_TOKENS if variant.fit else 0, **reward)
    record = _tuned(model, task, seed, [callback])
    return record | {"skipped": model.base_model.skipped_modules}


def _tuned(model: PeftModel, task: Task, seed: int, callbacks: list[TrainerCallback], **overrides: Any) -> Record:
    """Tunes and scores a model; `overrides` as of `tune`."""
    figures = {"skipped": [], "trainable": num_parameters(model, trainable=True), "steps": task.steps}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as outputs:
        tune(model, task, Path(outputs), seed, callbacks, progress=False, **overrides)
    figures["cpu_seconds"] = round(time.process_time() - started, 1)
    return figures | {name: round(value, 5) for name, value in task.score(model).items()}
