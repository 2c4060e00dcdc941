"""A search that decides how many are skipped: by a loss, a speed-up, or a KV cache."""

import math
import statistics

import pytest
import torch
from conftest import LAYERS, build_model
from peft import get_peft_model
from skippable import Blocks
from training import SCHEDULE, Sentences, make_model, make_trainer

from peft_eas import EASCallback, EASConfig, EASSearch
from peft_eas.search.check import log_increase
from peft_eas.search.savings import Savings

OPEN = {"num_skip": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_skip": 2, "target_speedup": 1.2}, "num_skip=2, target_speedup=1.2.*takes one of these"),
        ({"max_loss_increase": 0.1, "target_kv_cache": 0.5}, "takes one of these"),
        ({"max_loss_increase": 0.0}, "max_loss_increase must be a number above 0"),
        ({"target_speedup": 1.0}, "target_speedup must be a number above 1"),
        ({"target_kv_cache": 1.0}, "above 0 and below 1"),
    ],
)
def test_the_config_takes_one(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        EASConfig(**options)


def test_half_of_the_cache(tmp_path) -> None:
    callback = EASCallback(**SCHEDULE)
    trainer = make_trainer(tmp_path, callback, make_model(**OPEN, target_kv_cache=0.5))
    trainer.train()
    assert len(trainer.model.base_model.skipped_modules) == LAYERS // 2
    record = callback.record
    assert record["savings"]["unit"] == "bytes"
    assert sum(record["savings"]["per_candidate"]) == record["savings"]["total"]
    config = trainer.model.peft_config["default"]
    assert config.search["measured"] == record["measured"]
    merged = trainer.model.merge_and_unload()
    ids = Sentences(size=1).ids
    cache = merged(input_ids=ids, use_cache=True).past_key_values
    sizes = [layer.keys.numel() for layer in cache.layers if layer.keys is not None]
    assert sum(size > 0 for size in sizes) == LAYERS // 2


def test_a_speed_up_by_given_times() -> None:
    """The cheapest that reach it: one attention that takes half of the time, rather than two of a tenth."""
    blocks = Blocks(**OPEN, target_speedup=1.9)
    savings = Savings("seconds", 1.0, dict(zip(blocks.candidates, (0.05, 0.5, 0.1, 0.1, 0.05))))
    search = EASSearch(
        blocks, 40, lambda _: 1.0 + len(blocks.skipped_modules), savings=savings, search_steps=0.5, warmup_steps=0
    )
    for _ in range(40):
        search.before_step()
        search.after_step()
    assert blocks.skipped_modules == ["1"]
    assert search.state_dict()["savings"]["per_candidate"] == [0.05, 0.5, 0.1, 0.1, 0.05]


@pytest.mark.parametrize(("increase", "expected"), [(0.5, ["1", "3"]), (2.5, ["1", "2", "3"])])
def test_as_many_as_the_loss_allows(increase, expected) -> None:
    costs = {"0": 5.0, "1": 0.01, "2": 1.0, "3": 0.01, "4": 5.0}
    blocks = Blocks(**OPEN, max_loss_increase=increase)

    def loss(_) -> float:
        return 1.0 + sum(costs[name] for name in blocks.skipped_modules)

    search = EASSearch(blocks, 60, loss, search_steps=0.8, warmup_steps=0, interval=1)
    for _ in range(60):
        search.before_step()
        search.after_step()
    assert blocks.skipped_modules == expected
    measured = {point["num_skip"]: point["increase"] for point in search.state_dict()["measured"]}
    assert measured[len(expected)] == pytest.approx(torch.tensor(loss(None)).log().item(), abs=1e-3)


@pytest.mark.parametrize(("options", "is_kept_up"), [({"max_loss_increase": 0.1}, True), ({"num_skip": 2}, False)])
def test_what_losses_are_held_against_is_trained_as_well(options, is_kept_up) -> None:
    """Otherwise nothing skipped would fall behind, and any set would look good beside it."""
    blocks = Blocks(**{**OPEN, **options})
    search = EASSearch(blocks, 100, lambda _: 1.0 + 0.01 * len(blocks.skipped_modules), search_steps=80)
    sizes = []
    while search.is_searching:
        search.before_step()
        sizes.append(len(blocks.skipped_modules))
        search.after_step()
    grown = sizes[60:]
    assert all((size == 0) == (is_kept_up and number % 4 == 0) for number, size in enumerate(grown))


@pytest.mark.parametrize("free", [0, 1, 3, 5])
def test_a_loss_decides_by_what_was_measured(free) -> None:
    """Costs that do not add up: as many as `free` are skipped for nothing, and one more costs a lot."""
    blocks = Blocks(**OPEN, max_loss_increase=0.02)
    search = EASSearch(blocks, 100, lambda _: 3.0 if len(blocks.skipped_modules) > free else 1.0)
    while search.is_searching:
        search.before_step()
        search.after_step()
    assert len(blocks.skipped_modules) == free
    measured = {point["num_skip"]: point["increase"] for point in search.state_dict()["measured"]}
    assert free == 0 or measured[free] == 0.0
    assert free == 5 or measured[free + 1] == pytest.approx(math.log(3.0))


def test_the_rise_of_a_loss_is_that_of_its_mean() -> None:
    nothing, losses = [0.5, 1.5, math.nan, 1.0], [0.6, 1.6, 1.0, 1.1]
    increase, error = log_increase(nothing, losses)
    assert increase == pytest.approx(math.log(1.1))
    differences = [0.6 / 1.1 - 0.5, 1.6 / 1.1 - 1.5, 0.0]
    assert error == pytest.approx(statistics.stdev(differences) / math.sqrt(3))
    assert log_increase([1.0, -1.0, 1.0], [1.0, 1.0, 1.0]) is None
    assert log_increase([1.0, math.inf], [1.0, 1.0]) == (0.0, None)  # one batch has no spread
    assert log_increase([math.nan, math.inf], [1.0, 1.0]) is None


def test_percent_in_the_place_of_a_share_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"max_loss_increase=2\) lets the loss rise by 200%.*2 % is 0\.02"):
        EASConfig(max_loss_increase=2)
    with pytest.raises(ValueError, match=r"target_kv_cache must be .* below 1, as a share \(2 % is 0\.02\)"):
        EASConfig(target_kv_cache=50)


def test_what_cannot_be_reached_is_an_error_that_names_what_can() -> None:
    blocks = Blocks(**OPEN, target_speedup=3.0)
    savings = Savings("seconds", 1.0, dict.fromkeys(blocks.candidates, 0.1))
    with pytest.raises(ValueError, match=r"speedup of 3.* 2\.000 times as fast"):
        EASSearch(blocks, 20, lambda _: 1.0, savings=savings)


def test_the_bandit_cannot_decide_how_many() -> None:
    with pytest.raises(ValueError, match="cannot decide how many"):
        EASSearch(make_model(**OPEN, max_loss_increase=0.1), 20, lambda _: 1.0, strategy="bandit")


def test_without_a_batch_the_savings_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"EASSearch\(savings=measure_time"):
        EASSearch(make_model(**OPEN, target_speedup=1.1), 20, lambda _: 1.0)


@pytest.mark.parametrize("workload", [[1], {"tokens": 3}, {"batch_size": 0}])
def test_a_workload_that_means_nothing_is_refused(workload) -> None:
    with pytest.raises(ValueError, match=r"workload must be a dict|batch_size=0"):
        EASCallback(workload=workload)


def test_resumed_it_keeps_the_savings_of_the_first_run(tmp_path) -> None:
    def make(folder):
        model = get_peft_model(
            build_model("llama"), EASConfig(task_type="CAUSAL_LM", r=8, attention_r=4, target_speedup=1.01)
        )
        return make_trainer(folder, EASCallback(**SCHEDULE), model, save_strategy="steps", save_steps=8)

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    records = [trainer.callback_handler.callbacks[0].record for trainer in (whole, resumed)]
    assert records[0] == records[1]
