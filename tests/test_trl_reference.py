"""SFT with the search, then TRL's trainers with a reference model: their copy computes what the policy does.

So theory says what comes first: a loss of log 2 for DPO and of ½ for KTO, and no divergence for GRPO and RLOO.
"""

import math
import random
from pathlib import Path

import pytest
import torch
from conftest import build_model, logits
from peft import PeftModel, get_peft_model
from test_trl import make_data, make_tokenizer
from training import SCHEDULE

from peft_eas import EASCallback, EASConfig

trl = pytest.importorskip("trl", reason="needs the package trl (extra `test`)")
datasets = pytest.importorskip("datasets", reason="needs the package datasets, which comes with trl")

FAMILIES = ("llama", "gpt2")
ARGUMENTS = {"learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
ARGUMENTS |= {"per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and an adapter of it as SFT leaves it: two of four MHAs skipped, the context frozen."""
    folder = tmp_path_factory.mktemp(request.param)
    config = EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4)
    trainer = trl.SFTTrainer(
        get_peft_model(build_model(request.param), config),
        trl.SFTConfig(str(folder), max_steps=20, per_device_eval_batch_size=4, **ARGUMENTS),
        train_dataset=make_data(("prompt", "completion")),
        eval_dataset=make_data(("prompt", "completion"), size=12, seed=1),
        processing_class=make_tokenizer(),
        callbacks=[EASCallback(**SCHEDULE)],
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return request.param, folder / "adapter"


def load(tuned: tuple[str, Path]) -> PeftModel:
    family, folder = tuned
    return PeftModel.from_pretrained(build_model(family), folder, is_trainable=True)


def preferences(labelled: bool):
    draw = random.Random(3)

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(2, 60)}" for _ in range(number))

    rows = []
    for number in range(16):
        row = {"prompt": words(draw.randint(3, 8))}
        if labelled:
            row |= {"completion": f" {words(3)}", "label": number % 2 == 0}
        else:
            row |= {"chosen": f" {words(3)}", "rejected": f" {words(2)}"}
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def lengths(completions: list[str], **kwargs: object) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def make_trainer(method: str, model: PeftModel, folder: Path):
    config_class, trainer_class = getattr(trl, f"{method}Config"), getattr(trl, f"{method}Trainer")
    options = {"max_steps": 1, **ARGUMENTS}
    if method in ("GRPO", "RLOO"):
        options |= {"beta": 0.1, "num_generations": 4, "max_completion_length": 4, "disable_dropout": True}
        data = {"train_dataset": make_data(("prompt",)), "reward_funcs": lengths}
    else:
        data = {"train_dataset": preferences(labelled=method == "KTO")}
    args = config_class(str(folder), **options)
    return trainer_class(model=model, args=args, processing_class=make_tokenizer(), **data)


# What the log of the first step says, and what theory does.
FIRST = {"DPO": ("loss", math.log(2)), "KTO": ("loss", 0.5), "GRPO": ("kl", 0.0), "RLOO": ("kl", 0.0)}


@pytest.mark.parametrize("method", FIRST)
def test_the_first_step_is_what_theory_says(tuned, method, tmp_path) -> None:
    model = load(tuned)
    trainer = make_trainer(method, model, tmp_path)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    model.eval()
    policy = logits(model, {"input_ids": ids})
    model.set_adapter("ref")
    assert torch.equal(logits(model, {"input_ids": ids}), policy)
    with model.disable_adapter():
        assert not torch.equal(logits(model, {"input_ids": ids}), policy)
    model.set_adapter("default")
    name, expected = FIRST[method]
    trainer.train()
    assert trainer.state.log_history[0][name] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(reference(model, ids), policy)  # which does not move
    assert not torch.equal(logits(model.eval(), {"input_ids": ids}), policy)


def reference(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    model.eval().set_adapter("ref")
    output = logits(model, {"input_ids": ids})
    model.set_adapter("default")
    return output
