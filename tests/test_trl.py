"""The search in TRL's SFTTrainer."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from conftest import build_model, difference, logits
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from training import SCHEDULE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_eas import EASCallback, EASConfig

trl = pytest.importorskip("trl", reason="needs the package trl (extra `test`)")
datasets = pytest.importorskip("datasets", reason="needs the package datasets, which comes with trl")

datasets.disable_progress_bars()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 60)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_data(columns: tuple[str, ...], size: int = 40, seed: int = 0):
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(2, 60)}" for _ in range(draw.randint(least, most)))

    lengths = {"text": (6, 12), "prompt": (3, 8), "completion": (2, 4)}
    rows = [{column: words(*lengths[column]) for column in columns} for _ in range(size)]
    for row in rows:
        if "completion" in row:
            row["completion"] = f" {row['completion']}"
    return datasets.Dataset.from_list(rows)


def make_trainer(folder: Path, columns: tuple[str, ...], ready: bool = False, context: str = "prompt", **options):
    config = EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4, context=context)
    model = build_model("llama")
    evaluation = options.pop("eval_dataset", None) or make_data(columns, size=12, seed=1)
    args = trl.SFTConfig(
        str(folder),
        max_steps=20,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy=options.pop("save_strategy", "no"),
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    return trl.SFTTrainer(
        get_peft_model(model, config) if ready else model,
        args,
        train_dataset=make_data(columns),
        eval_dataset=evaluation,
        processing_class=make_tokenizer(),
        callbacks=[EASCallback(**SCHEDULE)],
        peft_config=None if ready else config,
    )


PAIRS, TEXT = ("prompt", "completion"), ("text",)


@pytest.mark.parametrize(
    ("ready", "columns", "options"),
    [
        (True, PAIRS, {"completion_only_loss": True}),
        (False, PAIRS, {"loss_type": "dft"}),
        (False, TEXT, {"gradient_checkpointing": False}),
    ],
    ids=["PeftModel, completions", "peft_config, dft", "peft_config, text"],
)
def test_search_and_merge(tmp_path, ready, columns, options) -> None:
    trainer = make_trainer(tmp_path, columns, ready, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EAS with context='prompt' trains without labels")
        trainer.train()
    rounds = [entry["eas/loss"] for entry in trainer.state.log_history if "eas/loss" in entry]
    assert len(set(rounds)) == 4
    model = trainer.model.eval()
    config = model.peft_config["default"]
    assert (len(config.skipped_modules), config.context) == (2, "running")

    inputs = {"input_ids": torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(0))}
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert difference(logits(merged, inputs), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged", processing_class=trainer.processing_class)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded, inputs), logits(merged, inputs))
    generated = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (merged, loaded)]
    assert torch.equal(*generated)


def test_the_prompt_is_the_context_and_no_answer(tmp_path) -> None:
    """Changing what is to be completed changes no statistic: the running contexts see the prompts alone."""
    contexts = []
    for offset in (0, 1):
        trainer = make_trainer(tmp_path, PAIRS, ready=True, completion_only_loss=True)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        is_answer = batch["labels"] != -100
        batch["input_ids"][is_answer] = (batch["input_ids"][is_answer] + offset).clamp(max=59)
        batch["labels"][is_answer] = batch["input_ids"][is_answer]
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch)
        contexts.append({k: v for k, v in trainer.model.named_buffers() if k.endswith("running_context")})
    # The first layer's input does not depend on other tokens.
    first = next(name for name in contexts[0] if "layers.0.self_attn" in name)
    assert contexts[0][first].abs().max() > 0
    assert torch.equal(contexts[0][first], contexts[1][first])


def test_rewards_stay_out_of_the_evaluations_figures(tmp_path) -> None:
    trainer = make_trainer(tmp_path, PAIRS)
    trainer.train()
    first, second = trainer.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert first[name] == second[name]


def test_rewards_are_computed_on_the_first_of_several_eval_sets(tmp_path) -> None:
    records = []
    for rewards, test in ((2, 3), (2, 4), (3, 4)):
        sets = {"rewards": make_data(PAIRS, size=12, seed=rewards), "test": make_data(PAIRS, size=12, seed=test)}
        make_trainer(tmp_path, PAIRS, eval_dataset=sets).train()
        records.append(json.loads((tmp_path / "eas_search.json").read_text()))
    assert records[0] == records[1] != records[2]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"packing": True, "max_length": 32}, "packing"),
        ({"packing": True, "packing_strategy": "wrapped", "max_length": 32}, "packing"),
        ({"eval_packing": True, "max_length": 32}, "eval_packing"),
        ({"padding_free": True, "max_length": None}, "padding_free"),
    ],
)
def test_packed_sequences_are_refused_with_the_prompt_as_context(tmp_path, options, name) -> None:
    trainer = make_trainer(tmp_path, TEXT, **options)
    message = rf"With {name}, several sequences are packed into one row.*EASConfig\(context='running'\)"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_packed_sequences_are_trained_on_with_the_running_mean_as_context(tmp_path) -> None:
    trainer = make_trainer(tmp_path, TEXT, context="running", packing=True, max_length=32)
    trainer.train()
    assert len(trainer.model.peft_config["default"].skipped_modules) == 2


def test_labels_kept_from_the_model_are_refused(tmp_path) -> None:
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        trainer = make_trainer(tmp_path, PAIRS, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"With label_smoothing_factor=0\.1.*cannot tell the prompt from the answer"):
        trainer.train()


def test_resumed_it_ends_equal(tmp_path) -> None:
    whole = make_trainer(tmp_path, PAIRS, save_strategy="steps", save_steps=8)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", PAIRS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    ours, theirs = ({k: v for k, v in t.model.state_dict().items() if ".eas_" in k} for t in (whole, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
