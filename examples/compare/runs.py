"""One run of the comparison: tunes a method's model, deploys it, scores it, and times it against the base."""

import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback, set_seed

import peft_eas
from examples.compare.methods import METHODS, adapters_of, search_of
from examples.shared.measure import cache_bytes_per_token, generates, num_parameters, on_device, speed_up, time_models
from examples.shared.task import Task, tune
from peft_eas import EASConfig


class SearchTime(TrainerCallback):
    """Notes how long a run took until what it skips was fixed."""

    def __init__(self, model: nn.Module) -> None:
        self.config = getattr(getattr(model, "base_model", model), "active_config", None)
        self.start = time.perf_counter()
        self.seconds = 0.0
        self.is_searching = isinstance(self.config, EASConfig) and self.config.skipped_modules is None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.is_searching and self.config.num_skip:
            self.seconds = time.perf_counter() - self.start
            self.is_searching = self.config.skipped_modules is None


def count_mhas(task: Task) -> int:
    """How many MHAs of the task's base may be skipped."""
    return len(get_peft_model(task.load_base(), EASConfig(num_skip=0, **task.eas)).base_model.candidates)


def settings_of(task: Task, method: str) -> dict[str, Any]:
    """What else a run depends on, as values for JSON."""
    search = search_of(method, task).state()["args"]
    eas = adapters_of(method, task)
    return {"batch_size": task.batch_size, "learning_rate": task.learning_rate, "eas": eas, "search": search}


def run(task: Task, num_mhas: int, method: str, share: float, seed: int, rounds: int) -> dict[str, Any]:
    """Tunes, deploys, scores and times one point of the grid; returns its record."""
    start = time.perf_counter()
    base = task.load_base().eval()
    num_skip = round(share * num_mhas)
    set_seed(seed)  # of the adapters' first weights
    prepared = METHODS[method](task.load_base(), task, num_skip, seed)
    search_time = SearchTime(prepared.model)
    callbacks = [*prepared.callbacks, search_time]
    with tempfile.TemporaryDirectory() as folder:
        tuning = time.perf_counter()
        tune(prepared.model, task, Path(folder), seed, callbacks, progress=False)
        tuning = time.perf_counter() - tuning
    trainable = num_parameters(prepared.model, trainable=True)
    skipped = getattr(getattr(prepared.model, "base_model", prepared.model), "skipped_modules", [])
    deployed = prepared.model.merge_and_unload(**prepared.merge_options).eval()
    scores = task.score(deployed)
    batch = on_device(task.deployed_batch(), deployed)
    models = {"base": base.to(deployed.device), "deployed": deployed}
    seconds = time_models(models, batch, rounds)
    record = {
        "task": task.name,
        "method": method,
        "share": share,
        "seed": seed,
        "steps": task.steps,
        "settings": settings_of(task, method),
        "scores": scores,
        "num_mhas": num_mhas,
        "skipped_modules": skipped,
        "trainable_parameters": trainable,
        "parameters": {name: num_parameters(model) for name, model in models.items()},
        "choice_seconds": prepared.choice_seconds + search_time.seconds,
        "tuning_seconds": tuning,
        "speed_up": {what: speed_up(times, "deployed") for what, times in seconds.items()},
        "seconds": {
            what: {name: statistics.median(own) for name, own in times.items()} for what, times in seconds.items()
        },
    }
    if generates(base):
        record["cache_bytes_per_token"] = {name: cache_bytes_per_token(model, batch) for name, model in models.items()}
    return {**record, "run_seconds": time.perf_counter() - start, **_circumstances()}


def _circumstances() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (peft_eas, peft, transformers, torch)},
    }
