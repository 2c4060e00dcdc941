"""Wherever Ctrl+C or an exception ends a run, the best set is evaluated, saved and merged, and no annealed context."""

import copy
import json
import logging

import pytest
import torch
from conftest import build_model, difference, logits, make_inputs, mha_names
from peft import PeftModel, get_peft_model
from training import NAMES, SCHEDULE, Sentences, make_trainer
from transformers import Trainer, TrainerCallback

from peft_eas import EASCallback, EASConfig, EASSearch

FAMILIES = ("llama", "gpt2")
# Within the search, which has rewards from step 4 on; and behind it, while contexts are still annealed.
IN_SEARCH, IN_TUNING = 8, 14


def make_model(family: str = "llama", **options) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(
        build_model(family), EASConfig(task_type="CAUSAL_LM", **{"num_skip": 2, "r": 8, "attention_r": 4, **options})
    )


class Fails(TrainerCallback):
    """Raises `error` at an event of Trainer, or within a step, when `step` steps are done."""

    def __init__(self, event: str, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error
        if event == "forward":
            self.on_step_begin = self.watch
        elif event == "optimizer":
            self.on_pre_optimizer_step = self.fail
        else:
            setattr(self, event, self.fail)

    def fail(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise self.error("in the middle")

    def watch(self, args, state, control, model, **kwargs) -> None:
        def fail(*_) -> None:
            raise self.error("in the middle")

        if state.global_step == self.step:
            last = mha_names(model.config.model_type, [3])[0]
            self.handle = model.get_submodule(f"base_model.model.{last}").register_forward_hook(fail)


def interrupt(folder, family: str, event: str, step: int, error: type[BaseException], **options) -> Trainer:
    fails = Fails(event, step, error)
    model = options.pop("model", None) or make_model(family)
    trainer = make_trainer(folder, EASCallback(**SCHEDULE, strategy="bandit"), model, **options)
    trainer.add_callback(fails)
    with pytest.raises(error, match="in the middle"):
        trainer.train()
    if hasattr(fails, "handle"):
        fails.handle.remove()
    trainer.remove_callback(fails)
    return trainer


def check(trainer: Trainer, family: str, folder, best: list[str]) -> None:
    """What Trainer saves and evaluates, and a merge of the model, skip `best` and take each prompt's own context."""
    trainer.save_model(str(folder / "saved"))
    config = json.loads((folder / "saved/adapter_config.json").read_text())
    assert (config["skipped_modules"], config["context"]) == (best, "prompt")
    card = (folder / "saved/README.md").read_text()
    assert f"{len(best)} of 4" in card
    loaded = PeftModel.from_pretrained(build_model(family), folder / "saved").eval()
    assert loaded.base_model.skipped_modules == best
    inputs = make_inputs(family, "cpu")
    expected = logits(loaded, inputs)
    figures = trainer.evaluate()
    assert torch.equal(logits(trainer.model, inputs), expected)
    assert trainer.model.base_model.skipped_modules == best
    of_loaded = Trainer(loaded, trainer.args, eval_dataset=trainer.eval_dataset).evaluate()
    assert figures["eval_loss"] == pytest.approx(of_loaded["eval_loss"], rel=1e-6)
    for in_training in (True, False):
        merged = copy.deepcopy(trainer.model).train(in_training).merge_and_unload(context="prompt").eval()
        deleted = sorted(merged.config.eas["skipped"])  # relative names
        assert all(name.endswith(f".{short}") for name, short in zip(sorted(best), deleted, strict=True))
        assert difference(logits(merged, inputs), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("forward", KeyboardInterrupt),
        ("optimizer", RuntimeError),
        ("on_step_begin", KeyboardInterrupt),
        ("on_step_end", RuntimeError),
        ("on_log", KeyboardInterrupt),
    ],
)
def test_within_a_search(family, event, error, tmp_path) -> None:
    trainer = interrupt(tmp_path, family, event, IN_SEARCH, error)
    search = trainer.callback_handler.callbacks[0]._search
    check(trainer, family, tmp_path, [n for n in trainer.model.base_model.candidates if n in search.strategy.best()])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_had_drawn_another_set_and_annealed(family, tmp_path) -> None:
    """So that the tests above test something; back in training mode it does again, until the step is ended."""
    trainer = interrupt(tmp_path, family, "forward", IN_SEARCH, KeyboardInterrupt)
    model, inputs = trainer.model, make_inputs(family, "cpu")
    assert model.training
    drawn = model.base_model.skipped_modules
    expected = logits(model.eval(), inputs)
    best = model.base_model.skipped_modules
    assert drawn != best
    model.train()
    assert model.base_model.skipped_modules == drawn
    model.base_model.end_step()
    assert model.base_model.skipped_modules == best
    assert torch.equal(logits(model.eval(), inputs), expected)


@pytest.mark.parametrize("skipped", [None, [NAMES[0], NAMES[2]]])
def test_after_the_search_and_without_one(skipped, tmp_path) -> None:
    model = make_model(skipped_modules=skipped, num_skip=None if skipped else 2)
    trainer = interrupt(tmp_path, "llama", "forward", IN_TUNING, KeyboardInterrupt, model=model)
    check(trainer, "llama", tmp_path, trainer.model.base_model.skipped_modules)


@pytest.mark.parametrize("event", ["on_evaluate", "on_save", "on_prediction_step"])
def test_between_steps(event, tmp_path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    trainer = interrupt(tmp_path, "llama", event, 5, RuntimeError, **options)
    search = trainer.callback_handler.callbacks[0]._search
    check(trainer, "llama", tmp_path, search.strategy.best())


def test_in_rewards(tmp_path) -> None:
    class Broken(Sentences):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 14:  # in the second round
                raise KeyboardInterrupt("in the middle")
            return super().__getitem__(index)

    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE, reward_dataset=Broken(size=20, seed=1)), make_model())
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        trainer.train()
    search = trainer.callback_handler.callbacks[0]._search
    assert len(search.strategy.rounds) > 0
    check(trainer, "llama", tmp_path, search.strategy.best())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_is_finished_by_hand(family, tmp_path, caplog) -> None:
    callback = EASCallback()
    with pytest.raises(RuntimeError, match="before training has begun"):
        callback.finish()
    trainer = interrupt(tmp_path, family, "forward", IN_SEARCH, KeyboardInterrupt)
    callback, config = trainer.callback_handler.callbacks[0], trainer.model.peft_config["default"]
    best = callback.record["strategy"]
    with caplog.at_level(logging.WARNING):
        callback.finish()
    assert "training stopped at step 8, before the search was over at step 12" in caplog.text
    assert len(config.skipped_modules) == 2
    assert json.loads((tmp_path / "eas_search.json").read_text())["strategy"] == best
    assert sum("eas_pia" in n and n.endswith("router.weight") for n, _ in trainer.model.named_parameters()) == 2
    check(trainer, family, tmp_path, config.skipped_modules)
    caplog.clear()
    callback.finish()
    assert not caplog.text


def test_trained_again_it_begins_anew(tmp_path) -> None:
    again = interrupt(tmp_path, "llama", "forward", IN_SEARCH, KeyboardInterrupt)
    again.train()
    config = again.model.peft_config["default"]
    assert (len(config.skipped_modules), config.context) == (2, "running")


def test_resumed_from_the_last_checkpoint_it_ends_as_if_nothing_had_happened(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", EASCallback(**SCHEDULE, strategy="bandit"), make_model(), **options)
    whole.train()
    interrupt(tmp_path / "again", "llama", "forward", IN_SEARCH, KeyboardInterrupt, **options)
    again = make_trainer(tmp_path / "again", EASCallback(**SCHEDULE, strategy="bandit"), make_model(), **options)
    again.train(resume_from_checkpoint=True)
    for (name, mine), other in zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_loop_of_ones_own(family, tmp_path) -> None:
    """Evaluation in the middle of a step sees the best set, and the step goes on with its own."""
    model, inputs = make_model(family).train(), make_inputs(family, "cpu")
    generator = torch.Generator().manual_seed(0)
    search = EASSearch(model, 20, lambda batch: torch.rand((), generator=generator), **SCHEDULE)
    labels = inputs["input_ids"].masked_fill(torch.arange(12) < 8, -100)
    for _ in range(8):
        search.before_step()
        model(**inputs, labels=labels)
        search.after_step()
    with torch.no_grad():  # no longer the identity
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.normal_(std=0.1)
    expected = logits(model.eval(), inputs)
    model.train()
    search.before_step()
    drawn, best = model.base_model.skipped_modules, search.strategy.best()
    context = next(value for name, value in model.named_buffers() if name.endswith("running_context"))
    assert torch.equal(logits(model.eval(), inputs), expected)
    assert sorted(model.base_model.skipped_modules) == sorted(best)
    model.save_pretrained(tmp_path)
    assert sorted(EASConfig.from_pretrained(tmp_path).skipped_modules) == sorted(best)
    before = context.clone()
    model.train()
    assert model.base_model.skipped_modules == drawn
    model(**inputs, labels=labels)
    search.after_step()
    assert sorted(model.base_model.skipped_modules) == sorted(search.strategy.best())
    assert before.shape == context.shape


def test_a_step_that_cannot_begin_changes_nothing() -> None:
    model = make_model().eval()
    model.set_skipped_modules(NAMES[:2])
    for names, share, message in ((["x"], 0.5, "which cannot be skipped"), (NAMES[2:], 2.0, "from 0.0 to 1.0")):
        with pytest.raises(ValueError, match=message):
            model.base_model.begin_step(names, share)
        assert model.base_model.skipped_modules == NAMES[:2]
        assert model.train().base_model.skipped_modules == NAMES[:2]
