"""Tokens that a chat template adds, in TRL's trainers: trained, saved, merged, and part of the reference."""

import math
from pathlib import Path

import pytest
import torch
from conftest import build_model, difference, logits
from peft import AutoPeftModelForCausalLM, get_peft_model
from test_trl import datasets, make_tokenizer, trl
from test_trl_trainers import SCHEDULE, make_data, make_trainer
from transformers import AddedToken, AutoModelForCausalLM

from peft_eas import EASCallback, EASConfig

INPUTS = {"input_ids": torch.tensor([[60, 5, 7, 61, 3], [4, 61, 60, 9, 2]])}
ARGUMENTS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def make_template(folder: Path) -> str:
    """A tokenizer with a chat template and two tokens, 60 and 61, that `make_tokenizer`'s has not."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|user|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }} <|end|> {% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_conversations(names: tuple[str, ...], size: int, seed: int):
    rows = make_data(dict.fromkeys(names, (4, 8)), size, seed)
    said = {"prompt": "user", "completion": "assistant", "chosen": "user", "rejected": "user"}
    return datasets.Dataset.from_list(
        [{name: [{"role": said[name], "content": row[name]}] for name in names} for row in rows]
    )


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gemma3", True), ("qwen3", False)], ids=str
)
def test_a_template_that_adds_tokens(tmp_path, family, tied) -> None:
    """As for LoRA, TRL trains these tokens and the output layer; if that is tied, its rows of the tokens."""
    build_model(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4)
    names = ("prompt", "completion")
    trainer = trl.SFTTrainer(
        base,
        trl.SFTConfig(str(tmp_path / "run"), chat_template_path=make_template(tmp_path / "template"), **ARGUMENTS),
        train_dataset=make_conversations(names, size=24, seed=0),
        eval_dataset=make_conversations(names, size=8, seed=1),
        processing_class=make_tokenizer(),
        callbacks=[EASCallback(**SCHEDULE)],
        peft_config=config,
    )
    rows = trainer.model.get_input_embeddings().weight.detach().clone()
    trainer.train()
    assert config.trainable_token_indices == {"embed_tokens": [60, 61, 62, 63]}
    assert config.modules_to_save == (None if tied else ["lm_head"])
    assert len(config.skipped_modules) == 2
    model = trainer.model.eval()
    expected = logits(model, INPUTS)

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, INPUTS), expected)

    merged = model.merge_and_unload()
    changed = (merged.get_input_embeddings().weight != rows).any(1).nonzero().flatten().tolist()
    assert {60, 61} <= set(changed) <= {60, 61, 62, 63}
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    assert difference(logits(merged, INPUTS), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged", processing_class=trainer.processing_class)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(reloaded, INPUTS), logits(merged, INPUTS))


def test_a_template_that_adds_tokens_for_a_reward_model(tmp_path) -> None:
    """TRL names an output layer to train there, too, which a reward model does not have."""
    names = ("chosen", "rejected")
    config = EASConfig(task_type="SEQ_CLS", num_skip=2, r=8, attention_r=4)
    trainer = trl.RewardTrainer(
        build_model("llama", model_class="LlamaForSequenceClassification", num_labels=1),
        trl.RewardConfig(str(tmp_path), chat_template_path=make_template(tmp_path / "template"), **ARGUMENTS),
        train_dataset=make_conversations(names, size=24, seed=0),
        eval_dataset=make_conversations(names, size=8, seed=1),
        processing_class=make_tokenizer(),
        callbacks=[EASCallback(**SCHEDULE)],
        peft_config=config,
    )
    head = trainer.model.base_model.model.score.weight.detach().clone()
    trainer.train()
    model = trainer.model.eval()
    expected = logits(model, INPUTS)
    merged = model.merge_and_unload()
    assert difference(logits(merged, INPUTS), expected) < 1e-5
    assert not torch.equal(merged.score.weight, head)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_of_dpo_has_the_trained_tokens(tmp_path, family, tied) -> None:
    config = EASConfig(
        **{"task_type": "CAUSAL_LM", "num_skip": 0, "r": 8, "attention_r": 4, "context": "none"},
        **{"dropout": 0.0, "trainable_token_indices": list(range(2, 40))},
    )
    model = get_peft_model(build_model(family, tie_word_embeddings=tied), config)
    rows = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    with torch.no_grad():
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    expected = logits(model.eval(), INPUTS_OF_WORDS)
    trainer = make_trainer("DPO", tmp_path, EASCallback(), family, model, max_steps=1)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval(), INPUTS_OF_WORDS), expected)
    model.set_adapter("default")
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-6)


INPUTS_OF_WORDS = {"input_ids": torch.tensor([[2, 5, 7, 41, 3], [4, 55, 30, 9, 2]])}
