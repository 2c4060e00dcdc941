"""Other tasks and Trainers than a causal model under the plain one: the search runs, and its model merges exactly."""

import pytest
import torch
import training
from conftest import build_model, difference, logits, mha_names
from families import ARCHITECTURES
from peft import get_peft_model
from torch.utils.data import Dataset
from training import SCHEDULE, Sentences
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from peft_eas import EASCallback, EASConfig

ARGUMENTS = {**training.ARGUMENTS, "eval_strategy": "steps", "eval_steps": 5, "disable_tqdm": True}
OPTIONS = {"num_skip": 2, "r": 8, "attention_r": 4}


class Padded(Dataset):
    """Sentences of 6 to 10 random tokens, padded on the right, to be classified as a whole or token by token."""

    def __init__(self, size: int, per_token: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, 60, (size, 10), generator=generator)
        self.lengths = torch.randint(6, 11, (size,), generator=generator)
        self.per_token = per_token

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        attended = torch.arange(10) < self.lengths[index]
        ids = self.ids[index] * attended
        labels = torch.where(attended, ids % 3, -100) if self.per_token else ids[0] % 3
        return {"input_ids": ids, "attention_mask": attended.long(), "labels": labels}


def count_right(prediction) -> dict[str, float]:
    is_counted = prediction.label_ids != -100
    is_right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(is_right[is_counted].mean()), "counted": int(is_counted.sum())}


def check_search(trainer: Trainer, family: str) -> None:
    """A search has run in `trainer`, two of four MHAs are skipped, and merged the model computes the same."""
    model = trainer.model.eval()
    losses = [
        entry["eas/loss"]
        for entry in trainer.state.log_history
        if entry.get("eas/phase") in ("search", "tune")
        if "eas/loss" in entry
    ]
    assert len(set(losses)) == 4
    assert len(model.peft_config["default"].skipped_modules) == 2
    assert set(model.peft_config["default"].skipped_modules) < set(mha_names(family))
    batch = {key: torch.stack([trainer.eval_dataset[i][key] for i in range(4)]) for key in trainer.eval_dataset[0]}
    del batch["labels"]
    expected = logits(model, batch)
    assert difference(logits(model.merge_and_unload(), batch), expected) < 1e-5


@pytest.mark.parametrize("per_token", [False, True])
def test_classification_with_bert(tmp_path, per_token) -> None:
    kind, task = ("Token", "TOKEN_CLS") if per_token else ("Sequence", "SEQ_CLS")
    model = build_model("bert", model_class=f"BertFor{kind}Classification")
    head = model.classifier.weight.clone()
    model = get_peft_model(model, EASConfig(task_type=task, **OPTIONS))
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **ARGUMENTS),
        train_dataset=Padded(64, per_token),
        eval_dataset=Padded(20, per_token, seed=1),
        compute_metrics=count_right,
        callbacks=[EASCallback(**SCHEDULE)],
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    assert all(
        entry["eval_counted"] == trainer.eval_dataset.lengths.sum() if per_token else 20 for entry in evaluations
    )
    assert not torch.equal(model.base_model.model.classifier.weight, head), "PEFT trains a classifier's head"
    check_search(trainer, "bert")


class Questions(Sentences):
    """For an encoder-decoder, what it is asked and what it answers; a decoder takes both in a row."""

    def __init__(self, size: int, seed: int = 0, in_a_row: bool = True) -> None:
        super().__init__(size, seed)
        self.in_a_row = in_a_row

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.in_a_row:
            return super().__getitem__(index)
        ids = self.ids[index]
        return {"input_ids": ids[:6], "attention_mask": torch.ones(6, dtype=torch.long), "labels": ids[6:]}


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM")]
)
def test_seq2seq_trainer_that_predicts_by_generating(tmp_path, family, task) -> None:
    in_a_row = task == "CAUSAL_LM"
    base = build_model(family) if in_a_row else ARCHITECTURES[family].build()
    model = get_peft_model(base, EASConfig(task_type=task, **OPTIONS))
    shapes = []

    def note_shape(prediction) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {}

    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, generation_max_length=14, **ARGUMENTS),
        train_dataset=Questions(64, in_a_row=in_a_row),
        eval_dataset=Questions(20, seed=1, in_a_row=in_a_row),
        compute_metrics=note_shape,
        callbacks=[EASCallback(**SCHEDULE)],
    )
    trainer.train()
    assert [shape[0] for shape in shapes] == [20] * 4  # evaluations in every phase; rewards generate nothing
    predicted = torch.tensor(trainer.predict(trainer.eval_dataset).predictions)
    inputs = torch.stack([trainer.eval_dataset[i]["input_ids"] for i in range(20)])
    generated = model.generate(input_ids=inputs, max_length=14, do_sample=False)
    assert torch.equal(predicted[:, : generated.shape[1]], generated)
    if in_a_row:
        check_search(trainer, family)
    else:
        assert len(model.peft_config["default"].skipped_modules) == 2
