"""The search in every trainer of TRL: it is rewarded with what the trainer itself computes."""

import json
import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import build_model, difference, logits
from peft import get_peft_model
from test_trl import datasets, make_tokenizer, trl

from peft_eas import EASCallback, EASConfig
from peft_eas.search.trainer import calling_trainer

# Eight steps: warm-up to 2, rounds at 4 and 6, when the set is fixed and the context frozen.
SCHEDULE = {"search_steps": 6, "warmup_steps": 2, "interval": 2}


def score(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / (1 + len(text)) for text in completions]


class Setting(NamedTuple):
    """How a trainer is made: columns of its data, in words, and what else its config and itself are given."""

    columns: dict[str, tuple[int, int]]
    config: dict[str, Any]
    trainer: dict[str, Any]
    module: str = "trl"


PROMPT, PAIR = {"prompt": (3, 8)}, {"chosen": (2, 4), "rejected": (2, 4)}
# Nearly greedy, so that the order of a batch makes no difference.
SAMPLED = {"max_completion_length": 6, "temperature": 1e-4}
GROUPS = {**SAMPLED, "num_generations": 2}
SETTINGS = {
    "SFT": Setting({**PROMPT, "completion": (2, 4)}, {}, {}),
    "DPO": Setting({**PROMPT, **PAIR}, {}, {}),
    "KTO": Setting({**PROMPT, "completion": (2, 4), "label": (0, 1)}, {}, {}),
    "Reward": Setting(PAIR, {}, {}),
    "GRPO": Setting(PROMPT, GROUPS, {"reward_funcs": score}),
    "RLOO": Setting(PROMPT, GROUPS, {"reward_funcs": score}),
    "Distillation": Setting(PROMPT, SAMPLED, {"teacher_model": None}),
    "CPO": Setting({**PROMPT, **PAIR}, {}, {}, "trl.experimental.cpo"),
    "ORPO": Setting({**PROMPT, **PAIR}, {}, {}, "trl.experimental.orpo"),
    "TPO": Setting({**PROMPT, **PAIR, "reference": (2, 4)}, {}, {}, "trl.experimental.tpo"),
    "GMPO": Setting(PROMPT, GROUPS, {"reward_funcs": score}, "trl.experimental.gmpo"),
    "OnlineDPO": Setting(PROMPT, {"max_new_tokens": 6}, {"reward_funcs": score}, "trl.experimental.online_dpo"),
}
STABLE = [name for name, setting in SETTINGS.items() if setting.module == "trl"]
EXPERIMENTAL = ["CPO", "ORPO", "TPO", "GMPO"]
GENERATING = ("GRPO", "RLOO", "GMPO")
# Before, and in some experimental trainers, the model is given no labels, of which EAS warns.
PASSES_LABELS = hasattr(trl.trainer.utils, "add_fused_lm_head")


def make_data(columns: dict[str, tuple[int, int]], size: int | None, seed: int):
    if size is None:
        return None
    draw = random.Random(seed)
    rows = []
    for _ in range(size):
        text = {name: [f"w{draw.randrange(2, 60)}" for _ in range(draw.randint(*n))] for name, n in columns.items()}
        row = {name: ("" if name == "prompt" else " ") + " ".join(words) for name, words in text.items()}
        rows.append({**row, "label": bool(text["label"])} if "label" in row else row)
    return datasets.Dataset.from_list(rows)


def make_trainer(
    name: str, folder: Path, callback: EASCallback, family="llama", model=None, max_steps=8, num_held_out=4, **options
):
    """A trainer of TRL; on a new model with an adapter to search for, or on `model` as it is."""
    setting = SETTINGS[name]
    module = pytest.importorskip(setting.module)
    trainer_class = getattr(module, f"{name}Trainer", None)
    if trainer_class is None:
        pytest.skip(f"this version of trl has no {name}Trainer")
    given = {key: build_model(family, seed=3) if key == "teacher_model" else v for key, v in setting.trainer.items()}
    if model is None:
        context = "none" if name == "Distillation" else "prompt"  # it calls the body alone, without labels
        head = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}[family]
        model = build_model(family, **({"model_class": head, "num_labels": 1} if name == "Reward" else {}))
        task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        given["peft_config"] = EASConfig(task_type=task, num_skip=2, r=8, attention_r=4, context=context)
    args = getattr(module, f"{name}Config")(
        str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **{**setting.config, **options},
    )
    return trainer_class(
        model,
        args=args,
        train_dataset=make_data(setting.columns, size=24, seed=0),
        eval_dataset=make_data(setting.columns, size=num_held_out, seed=1),
        processing_class=make_tokenizer(),
        callbacks=[callback],
        **given,
    )


class Comparing(EASCallback):
    """Evaluates, by the trainer's own means, each set that is compared, on the same batch: the whole eval set."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.losses: list[tuple[float, dict[str, float]]] = []

    def _batch_loss(self, number: int) -> torch.Tensor:
        loss = super()._batch_loss(number)
        trainer = calling_trainer()
        trainer.evaluate()
        self.losses.append((float(loss), trainer.state.log_history[-1]))
        return loss


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in STABLE for f in ("llama", "gpt2")] + [(n, "llama") for n in EXPERIMENTAL]
)
def test_a_set_is_rewarded_with_what_the_trainer_computes(tmp_path, name, family) -> None:
    callback = Comparing(**SCHEDULE)
    num_held_out = 2 if name in GENERATING else 4  # two prompts with two completions each
    trainer = make_trainer(name, tmp_path, callback, family, num_held_out=num_held_out)
    with warnings.catch_warnings():
        if PASSES_LABELS and name not in EXPERIMENTAL:
            warnings.filterwarnings("error", message="EAS with context='prompt' trains without labels")
        trainer.train()
    expected = [-f["eval_reward"] if name in GENERATING else f["eval_loss"] for _, f in callback.losses]
    assert len(set(expected)) > 1
    assert [loss for loss, _ in callback.losses] == pytest.approx(expected, rel=1e-5)
    rounds = json.loads((tmp_path / "eas_search.json").read_text())["strategy"]["rounds"]
    searched = [loss for entry in rounds for loss in entry["losses"]]
    assert len(rounds) == 2
    assert searched == [loss for loss, _ in callback.losses][: len(searched)]
    assert len(callback.losses) == len(searched) + 2  # the choice and nothing skipped, in the end
    assert len(trainer.model.peft_config["default"].skipped_modules) == 2


@pytest.mark.parametrize("name", ["DPO", "GRPO", "RLOO", "CPO"])
def test_rewards_stay_out_of_the_trainers_own_figures(tmp_path, name) -> None:
    trainer = make_trainer(name, tmp_path, EASCallback(**SCHEDULE))
    trainer.train()
    for _ in range(2):
        trainer.evaluate()
    first, second = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    figures = {key for key in first if not key.endswith(("runtime", "per_second"))}
    assert len(figures) > 3
    assert all(first[key] == second[key] for key in figures)


@pytest.mark.parametrize("following", ["DPO", "KTO", "GRPO", "RLOO"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_sft_has_found_is_trained_on(tmp_path, family, following) -> None:
    """With the default flow, the next trainer searches no more, leaves the context frozen, and merges exactly."""
    config = EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4)
    model = get_peft_model(build_model(family), config)
    make_trainer("SFT", tmp_path / "sft", EASCallback(**SCHEDULE), family, model).train()
    skipped, before = model.skipped_modules, logits(model.eval(), {"input_ids": torch.arange(2, 12)[None]})
    options = {"temperature": 1.0, "beta": 0.1} if following in ("GRPO", "RLOO") else {}
    callback = EASCallback()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EAS|freeze_context")
        trainer = make_trainer(following, tmp_path, callback, family, model, max_steps=3, **options)
        trainer.train()
    assert callback.record is None
    assert (model.skipped_modules, len(skipped)) == (skipped, 2)
    assert {one.context for one in model.peft_config.values()} == {"running"}
    assert [entry["eas/phase"] for entry in trainer.state.log_history if "loss" in entry] == ["frozen"] * 3

    inputs = {"input_ids": torch.arange(2, 12)[None]}
    trained = logits(model.eval(), inputs)
    assert difference(trained, before) > 1e-4
    assert difference(logits(model.merge_and_unload(), inputs), trained) < 1e-5


def test_a_search_under_dpo_leaves_the_reference_alone(tmp_path) -> None:
    """TRL's reference adapter, a copy of the one it is given, skips nothing and stays as it was."""
    config = EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4)
    model, inputs = get_peft_model(build_model("llama"), config), {"input_ids": torch.arange(2, 12)[None]}
    trainer = make_trainer("DPO", tmp_path, EASCallback(**SCHEDULE), model=model)
    reference = {k: v.clone() for k, v in model.named_parameters() if ".ref." in k}
    trainer.train()
    assert len(model.peft_config["default"].skipped_modules) == 2
    assert all(torch.equal(model.get_parameter(name), value) for name, value in reference.items())
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), inputs), logits(build_model("llama"), inputs))


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "Reward"])
def test_without_an_eval_set_a_slice_of_the_training_set_is_held_back(tmp_path, name) -> None:
    trainer = make_trainer(name, tmp_path, EASCallback(**SCHEDULE), num_held_out=None)
    assert len(trainer.train_dataset) == 23
    trainer.train()
    assert json.loads((tmp_path / "eas_search.json").read_text())["reward_source"].startswith("held-back part")


def test_precomputed_references(tmp_path) -> None:
    """TRL computes them for its own sets, not for a slice that is held back of one."""
    make_trainer("DPO", tmp_path, EASCallback(**SCHEDULE), precompute_ref_log_probs=True).train()
    assert (tmp_path / "eas_search.json").exists()
    trainer = make_trainer("DPO", tmp_path, EASCallback(**SCHEDULE), num_held_out=None, precompute_ref_log_probs=True)
    refuse(trainer, r"no loss on a batch of the held-back part of the training set.*KeyError: 'ref_chosen_logps'")


def refuse(trainer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_that_evaluates_no_loss_is_refused(tmp_path) -> None:
    trainer = make_trainer("OnlineDPO", tmp_path, EASCallback(**SCHEDULE))
    refuse(trainer, r"OnlineDPOTrainer computes no loss on a batch of the eval set.*EASConfig\(skipped_modules=")


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO"])
def test_a_set_that_the_trainer_has_not_prepared_is_refused(tmp_path, name) -> None:
    rewards = make_data(SETTINGS[name].columns, size=4, seed=1)
    trainer = make_trainer(name, tmp_path, EASCallback(**SCHEDULE, reward_dataset=rewards))
    refuse(trainer, rf'{name}Trainer computes no loss on a batch of the reward_dataset.*eval_dataset={{"rewards": ')


def test_vllm_is_refused(tmp_path) -> None:
    trainer = make_trainer("GRPO", tmp_path, EASCallback(**SCHEDULE))
    trainer.args.use_vllm = True  # as a config says where vLLM is installed
    refuse(trainer, r"GRPOTrainer is to generate with vLLM.*stock model, which skips no attention.*Set use_vllm=False")
