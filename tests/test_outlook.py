"""What is said of a search that is too short, has little to go by or found nothing, and of other quiet mistakes."""

import ast
import itertools
import logging
import math
import random
import re
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from peft import get_peft_model
from skippable import Blocks
from training import NAMES, SCHEDULE, make_model, make_trainer, refuse

from peft_eas import EASCallback, EASConfig, EASSearch
from peft_eas.search.schedule import Schedule, default_interval, what_fits

DEFAULTS = {"search_steps": 0.3, "warmup_steps": 0.1, "interval": None, "freeze_context_at": "search_end"}
WAYS = re.compile(
    r"(?:Set (?P<change>.*?))?(?:, or )?(?:[Tt]rain for (?P<steps>\d+) steps(?: with (?P<also>.*?))?)?\."
)


def arguments(text: str | None) -> dict[str, Any]:
    """Of "search_steps=0.5, interval=2"."""
    pairs = (item.split("=") for item in (text or "").split(", ") if item)
    return {name: ast.literal_eval(value) for name, value in pairs}


# --- settings that fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "rounds", "text"),
    [
        (400, 10, "Set interval=8, or train for 505 steps."),
        (60, 10, "Set interval=1, or train for 505 steps."),
        (20, 10, "Set search_steps=0.5, warmup_steps=0, interval=1, or train for 505 steps."),
        (8, 10, "Set interval=1, or train for 505 steps."),  # one round: there is no room for ten
        (1, 1, "Train for 55 steps."),
    ],
)
def test_the_values_that_are_named(steps, rounds, text) -> None:
    assert what_fits({**DEFAULTS, "interval": 10}, steps, rounds) == text


@pytest.mark.parametrize(
    ("steps", "rounds", "text"),
    [
        (40, 10, "Set search_steps=0.5, or train for 55 steps."),
        (20, 10, "Set search_steps=0.5, warmup_steps=0, or train for 55 steps."),
        (8, 10, "Train for 55 steps."),  # one round fits as it is
        (1, 1, "Train for 10 steps."),
    ],
)
def test_without_an_interval_there_is_one_for_the_run(steps, rounds, text) -> None:
    assert what_fits(DEFAULTS, steps, rounds) == text


def test_they_fit_whatever_did_not() -> None:
    """Each way is tried in turn: what it says makes a run with room for rewards, and steps after the search."""
    tried = 0
    for steps, rounds, interval, search_steps, warmup_steps, freeze_at in itertools.product(
        (1, 2, 5, 20, 100),
        (1, 4, 10),
        (None, 1, 10),
        (0.05, 0.3, 1.0, 1, 30),
        (0, 0.1, 0.5, 40),
        (None, "search_end", 0.3, 16),
    ):
        settings = {"search_steps": search_steps, "warmup_steps": warmup_steps, "interval": interval}
        settings["freeze_context_at"] = freeze_at
        if Schedule.of(settings, steps).has_room(interval or 1, steps, rounds):
            continue
        ways = WAYS.fullmatch(what_fits(settings, steps, rounds))
        assert ways["change"] or ways["steps"]
        if ways["change"]:
            changed = settings | arguments(ways["change"])
            schedule = Schedule.of(changed, steps)
            schedule.check(changed, steps, changed["interval"] or default_interval(schedule, 1), 1)
            assert schedule.has_room(changed["interval"] or 1, steps, 1)
        if ways["steps"]:
            changed, longer = settings | arguments(ways["also"]), int(ways["steps"])
            schedule = Schedule.of(changed, longer)
            schedule.check(changed, longer, interval or default_interval(schedule, rounds), rounds)
            assert schedule.has_room(interval or 1, longer, rounds)
        tried += 1
    assert tried > 1000


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("callback", [EASCallback(), EASCallback], ids=["instance", "class"])
def test_a_run_has_rounds_however_short_it_is(family, callback, tmp_path) -> None:
    def make(callback):
        model = get_peft_model(build_model(family), EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4))
        return make_trainer(tmp_path, callback, model)

    refuse(make(EASCallback(interval=10)), r"or has no rewards\. Set interval=2, or train for 105 steps\.$")
    trainer = make(callback)
    trainer.train()
    assert len(trainer.model.peft_config["default"].skipped_modules) == 2
    found = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EASCallback))
    assert [entry["step"] for entry in found.record["strategy"]["rounds"]] == [3, 4, 5, 6]


def test_trainer_may_be_given_the_class(tmp_path) -> None:
    trainer = make_trainer(tmp_path, EASCallback, max_steps=105)
    trainer.train()
    found = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EASCallback))
    assert [entry["step"] for entry in found.record["strategy"]["rounds"]] == list(range(11, 33))
    assert trainer.model.peft_config["default"].context == "running"


@pytest.mark.parametrize(
    ("options", "fitting"),
    [
        ({"search_steps": 100}, {"search_steps": 0.3}),
        ({"freeze_context_at": 30}, {"freeze_context_at": "search_end"}),
        ({"freeze_context_at": 30, "search_steps": 100}, {"freeze_context_at": 0.5}),
    ],
)
def test_a_freeze_beyond_the_run_names_one_within(options, fitting) -> None:
    model = make_model(num_skip=None, skipped_modules=[NAMES[1]])
    ((name, value),) = fitting.items()
    with pytest.raises(ValueError, match=rf"beyond a run of 20 steps\. Set {name}={value!r}, or freeze never"):
        EASSearch(model, 20, **options)
    EASSearch(model, 20, **{**options, **fitting})


# --- how much a search sees ------------------------------------------------------------------------------------------


def begin(steps: int, model=None, **options) -> EASSearch:
    return EASSearch(make_model() if model is None else model, steps, lambda batch: 1.0, **options)


def test_the_log_tells_how_much_a_search_will_see(caplog) -> None:
    with caplog.at_level(logging.INFO, "peft_eas"):
        begin(105, interval=10)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == "EAS: the search for 2 of 4 candidates to skip has 2 rounds of 3 sets."
    caplog.clear()
    with caplog.at_level(logging.INFO, "peft_eas"):
        begin(20, make_model(num_skip=1, target_modules=NAMES[:2]), interval=4)  # there are only two sets
    assert caplog.messages == ["EAS: the search for 1 of 2 candidates to skip has 1 round of 2 sets."]


@pytest.mark.parametrize("make", [make_model, lambda: Blocks(context="prompt")], ids=["EAS", "another"])
def test_few_rounds_are_warned_of_with_values_that_are_enough(make, caplog) -> None:
    begin(60, make(), interval=10)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    text = record.getMessage()
    assert "has 1 round of 3 sets. That is few" in text
    assert text.endswith("Set interval=6, or train for 105 steps.")
    caplog.clear()
    begin(60, make(), interval=6)
    begin(105, make(), interval=10)
    begin(60, make())
    assert not caplog.records


def test_a_resumed_search_is_not_warned_of_again(caplog) -> None:
    state = begin(60, interval=10).state_dict()
    caplog.clear()
    begin(60, interval=10, state=state)
    assert not caplog.records


@pytest.mark.parametrize("search_steps", [1.0, 20])
def test_a_search_to_the_last_step_is_warned_of(search_steps, caplog) -> None:
    begin(20, search_steps=search_steps, warmup_steps=2, interval=2)
    (text,) = caplog.messages
    assert f"ends with the last of 20 steps (search_steps={search_steps})" in text
    assert text.endswith(
        "Set search_steps=0.5." if search_steps == 1.0 else "Set search_steps=0.5, or train for 21 steps."
    )
    caplog.clear()
    begin(20, search_steps=0.5, warmup_steps=2, interval=2)
    assert not caplog.records


def run_search(search: EASSearch, losses) -> None:
    """A search alone, whose n-th evaluation has the loss losses(skipped names)."""
    search.held_out.batch_loss = lambda batch: losses(search.eas.skipped_modules)
    for _ in range(search.num_steps):
        search.before_step()
        search.after_step()


SHORT = {"search_steps": 0.8, "warmup_steps": 0, "interval": 1}


@pytest.mark.parametrize(("interval", "ways"), [(1, "a higher search_steps"), (2, "a lower interval, a higher")])
def test_a_search_that_has_not_settled_is_warned_of(interval, ways, caplog) -> None:
    """The losses are noise."""
    search = begin(20, Blocks(), **{**SHORT, "interval": interval})
    generator = random.Random(0)
    run_search(search, lambda names: generator.uniform(1.0, 3.0))
    (text,) = caplog.messages
    assert f"after {16 // interval} rounds the choice has not settled: another set of 2 of 5" in text
    gain = 1 - math.exp(-search.figures()["eas/expected_gain"])
    assert f"may well have a loss that is lower by {gain:.1%}. Give the search more rounds ({ways}" in text


@pytest.mark.parametrize("reward", ["relative", "exp"])
def test_a_bandit_that_told_nothing_apart_is_warned_of(reward, caplog) -> None:
    """All losses are equal, or with reward="exp" so high that every exp(−loss) is about 0."""
    search = begin(20, Blocks(), strategy="bandit", reward=reward, **SHORT)
    run_search(search, lambda names: 1.0 if reward == "relative" else 20.0 + len({"0", "2"} & set(names)))
    (text,) = caplog.messages
    assert f"after 16 rounds the search has hardly told the 5 candidates apart (entropy {math.log(5):.3f} of" in text
    assert ("reward='relative'" in text) == (reward == "exp")
    assert "strategy='thompson'" in text


def test_a_search_that_found_something_is_not(caplog) -> None:
    search = begin(20, Blocks(), **SHORT)
    run_search(search, lambda names: 1.0 + len({"0", "2", "4"} & set(names)))
    assert search.eas.skipped_modules == ["1", "3"]
    assert not caplog.records


def test_a_limit_that_limits_nothing_is_warned_of(caplog) -> None:
    """With nothing skipped the loss is the highest."""
    search = begin(20, make_model(num_skip=None, max_loss_increase=0.02), **SHORT)
    run_search(search, lambda names: 2.0 - 0.1 * len(names))
    assert len(search.eas.skipped_modules) == LAYERS
    text = next(text for text in caplog.messages if "limits little" in text)
    assert f"with {LAYERS} skipped, the loss on held-out batches is -20.0 ± 0.0 %" in text
    caplog.clear()
    search = begin(20, make_model(num_skip=None, max_loss_increase=0.02), **SHORT)
    run_search(search, lambda names: 2.0 + 0.01 * len(names))
    assert "limits little" not in caplog.text


def test_neither_num_skip_nor_skipped_modules_is_warned_of(tmp_path, caplog) -> None:
    trainer = make_trainer(tmp_path, EASCallback(), make_model(num_skip=None), max_steps=2)
    trainer.train()
    (text,) = caplog.messages
    assert "neither num_skip nor skipped_modules" in text
    assert f"how many of the {LAYERS} candidates are to be skipped, such as num_skip=1, or to 0" in text
    caplog.clear()
    for options in ({"num_skip": 0}, {"num_skip": None, "skipped_modules": []}, {"num_skip": LAYERS}):
        EASSearch(make_model(**options), 20)
    assert not caplog.records
    EASSearch(Blocks(num_skip=None), 20)
    assert "how many of the 5 candidates" in caplog.text


# --- the learning rate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"learning_rate": 5e-5}, "5e-05"),
        ({"learning_rate": 1e-4, "warmup_steps": 10}, "0.0001"),
        ({"learning_rate": 2.9e-4, "optim": "adamw_torch"}, "0.00029"),
        ({"learning_rate": 3e-4, "warmup_steps": 10}, None),  # it begins at 0
        ({"learning_rate": 1e-3}, None),
        ({"learning_rate": 1e-4, "optim": "sgd"}, None),
    ],
)
def test_a_learning_rate_for_whole_models_is_warned_of_once(options, warned, tmp_path, caplog) -> None:
    make_trainer(tmp_path, EASCallback(**SCHEDULE), **options).train()
    texts = [text for text in caplog.messages if "learning rate" in text]
    assert len(texts) == (warned is not None)
    if warned:
        assert f"learning rate is {warned}, " in texts[0]
        assert texts[0].endswith("Set learning_rate to between 1e-3 and 3e-3.")


def test_the_learning_rate_is_the_optimizers_own(tmp_path, caplog) -> None:
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), learning_rate=5e-5)
    trainer.optimizer = torch.optim.Adam((p for p in trainer.model.parameters() if p.requires_grad), lr=1e-3)
    trainer.train()
    assert "learning rate" not in caplog.text


def test_methods_that_hold_to_a_reference_model_ask_for_lower_rates(tmp_path, caplog) -> None:
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), learning_rate=1e-5)
    trainer.args.beta = 0.1  # as in TRL's DPOConfig or GRPOConfig
    trainer.train()
    assert "learning rate" not in caplog.text


# --- modules_to_save -------------------------------------------------------------------------------------------------


def head_config(**options) -> EASConfig:
    return EASConfig(num_skip=2, r=8, attention_r=4, **options)


@pytest.mark.parametrize(("family", "head"), [("llama", "score"), ("llama", "qa_outputs"), ("bert", "scores")])
def test_a_head_that_the_model_lacks_is_refused(family, head) -> None:
    """Also by a name that PEFT adds itself for another task."""
    model = build_model(family)
    with pytest.raises(ValueError, match=rf"modules_to_save=\['{head}'\]: '{head}' is no module of"):
        get_peft_model(model, head_config(modules_to_save=[head]))
    assert not any("eas_" in name for name, _ in model.named_modules())


def test_names_that_peft_adds_for_the_task_pass() -> None:
    model = get_peft_model(build_model("bert"), head_config(task_type="SEQ_CLS"))
    assert {"classifier", "score"} <= set(model.peft_config["default"].modules_to_save)
    config = head_config(modules_to_save=["score"], inference_mode=True)  # as an adapter on disk may have it
    assert get_peft_model(build_model("llama"), config).peft_config["default"].modules_to_save == ["score"]
