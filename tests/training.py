"""A tiny run under Trainer with `EASCallback`, as the tests of the search share it.

Run as a script with a folder, it trains there and resumes from the last checkpoint if there is one.
"""

import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build_model, mha_names
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_eas import EASCallback, EASConfig

NAMES = mha_names("llama")
# Twenty steps: warm-up to 4, rounds at 6, 8, 10, 12, the set fixed at 12, the context frozen at 16.
SCHEDULE = {"search_steps": 12, "warmup_steps": 4, "interval": 2, "freeze_context_at": 16}
ARGUMENTS = {
    "max_steps": 20,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 0,
}


class Sentences(Dataset):
    """Random tokens with the last four as the answer; `nan` gives labels whose loss is NaN."""

    def __init__(self, size: int = 64, seed: int = 0, nan: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 60, (size, 10), generator=generator)
        self.first_label = 10 if nan else 6
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.seen.append(index)
        labels = self.ids[index].clone()
        labels[: self.first_label] = -100
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(10, dtype=torch.long), "labels": labels}


class Watcher(TrainerCallback):
    """Notes the skip sets that training steps, evaluations and checkpoints see."""

    def __init__(self) -> None:
        self.in_steps: list[tuple[str, ...]] = []
        self.in_evaluation: list[tuple[str, ...]] = []
        self.at_save: list[tuple[str, ...]] = []

    def watch(self, model) -> None:
        def note(module, args) -> None:
            sets = self.in_steps if module.training else self.in_evaluation
            sets.append(tuple(model.base_model.skipped_modules))

        model.base_model.model.register_forward_pre_hook(note)

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        self.at_save.append(tuple(model.base_model.skipped_modules))


def make_model(seed: int = 0, **options):
    model = build_model("llama", seed=seed)
    torch.manual_seed(1)
    defaults = {"task_type": "CAUSAL_LM", "num_skip": 2, "r": 8, "attention_r": 4}
    return get_peft_model(model, EASConfig(**{**defaults, **options}))


def make_trainer(folder: Path, callback: TrainerCallback, model=None, watcher: Watcher | None = None, **options):
    data = {
        name: options.pop(name) for name in ("train_dataset", "eval_dataset", "compute_loss_func") if name in options
    }
    data.setdefault("train_dataset", Sentences())
    data.setdefault("eval_dataset", Sentences(size=20, seed=1))
    model = make_model() if model is None else model
    callbacks = [callback]
    if watcher is not None:
        watcher.watch(model)
        callbacks.append(watcher)
    args = TrainingArguments(str(folder), **{**ARGUMENTS, **options})
    return Trainer(model, args, callbacks=callbacks, **data)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if ".eas_" in name}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def refuse(trainer: Trainer, message: str, error: type[Exception] = ValueError, **options) -> None:
    """`train` fails before any step, and leaves the weights as they were."""
    before = weights(trainer.model)
    with pytest.raises(error, match=message):
        trainer.train(**options)
    assert trainer.state.global_step == 0 or options
    if not options:
        assert_equal(weights(trainer.model), before)


def train_in_process(folder: Path, slow: bool) -> None:
    """Trains in `folder` with a checkpoint every four steps, with `slow` ever more slowly from the second one on."""

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            time.sleep(0.5 if slow and state.global_step > 8 else 0.0)

    trainer = make_trainer(folder, EASCallback(**SCHEDULE), save_strategy="steps", save_steps=4)
    trainer.add_callback(Slow())
    resume = folder.exists() and any(folder.glob("checkpoint-*"))
    print("resumed" if resume else "from the start")
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder))


if __name__ == "__main__":
    train_in_process(Path(sys.argv[1]), slow="slow" in sys.argv)
