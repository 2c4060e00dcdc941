"""What a search's state brings back, and what is said of it, in the cases that are easily forgotten."""

import json
import random

import pytest
from skippable import BLOCKS, Blocks
from training import SCHEDULE, make_model, make_trainer

from peft_eas import EASCallback, EASSearch, Strategy, ThompsonSampling
from peft_eas.reporting.search_result import SearchResult
from peft_eas.search.savings import Savings
from peft_eas.strategies import AttentionBandit

STEPS = 40
SETTINGS = {"search_steps": 0.7, "warmup_steps": 0.1, "interval": 5}
SAVINGS = Savings("bytes", float(BLOCKS), {str(i): 1.0 for i in range(BLOCKS)})
GOALS = [{"num_skip": 2}, {"num_skip": None, "max_loss_increase": 0.3}, {"num_skip": None, "target_kv_cache": 0.6}]


def make(goal: dict, **options) -> EASSearch:
    options = {"num_steps": STEPS, "savings": SAVINGS, **SETTINGS, **options}
    return EASSearch(Blocks(**goal), options.pop("num_steps"), lambda batch: 1.0, **options)


def go_on(search: EASSearch, last: int = STEPS) -> EASSearch:
    """To the step `last`, with losses that depend on step and set, as under noise."""

    def loss(number: int) -> float:
        names = search.eas.skipped_modules
        return 1.0 + 0.1 * sum(map(int, names)) + random.Random(str((search.step, number, names))).uniform(0, 0.3)

    search.held_out.batch_loss = loss
    while search.step < last:
        search.before_step()
        search.after_step(loss(-1))
    return search


def all_steps(search: EASSearch) -> None:
    for _ in range(STEPS):
        search.before_step()
        search.after_step()


def kept(search: EASSearch) -> dict:
    return json.loads(json.dumps(search.state_dict()))


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: next(reversed(goal)))
@pytest.mark.parametrize("step", [9, 17, 24, 30])
@pytest.mark.parametrize("way", ["state=", "load_state_dict"])
def test_a_search_that_is_resumed_stays_the_same(goal, step, way) -> None:
    """Also where training losses came after the last round: the search ends at step 28, behind the round of 24."""
    for seed in range(3):
        state = kept(go_on(make(goal, seed=seed), step))
        again = make(goal, seed=seed, state=state if way == "state=" else None)
        if way != "state=":
            again.load_state_dict(state)
        assert kept(again) == state
        whole = go_on(make(goal, seed=seed))
        assert kept(go_on(again)) == kept(whole)
        assert again.eas.active_config.search == whole.eas.active_config.search
        assert again.eas.active_config.scores == whole.eas.active_config.scores
        assert whole.eas.skipped_modules == whole.strategy.best() or "max_loss_increase" in goal


class Own(ThompsonSampling):
    """A strategy of one's own."""


class Simple(Strategy):
    """Knows of no doubt."""

    def _draw(self, k: int) -> list[int]:
        return sorted(self._random().sample(range(len(self.candidates)), k))

    def _learn(self) -> None:
        self.scores = [float(i) for i in range(len(self.candidates))]


@pytest.mark.parametrize("strategy", [Own, Simple, AttentionBandit])
def test_ones_own_strategy_is_resumed(strategy) -> None:
    class Mine(strategy):
        """Even of the bandit."""

    goal = {"num_skip": 2}
    state = kept(go_on(make(goal, strategy=Mine), 17))
    assert kept(go_on(make(goal, strategy=Mine, state=state))) == kept(go_on(make(goal, strategy=Mine)))


def test_a_search_goes_on_by_its_own_strategy_whatever_is_asked_for() -> None:
    state = kept(go_on(make({"num_skip": 2}), 17))
    assert isinstance(make({"num_skip": 2}, strategy="bandit", state=state).strategy, ThompsonSampling)


@pytest.mark.parametrize("before", GOALS)
@pytest.mark.parametrize("now", [*GOALS, {"num_skip": None, "target_kv_cache": 0.4}])
def test_another_goal_is_refused(before, now) -> None:
    state = kept(go_on(make(before), 17))
    if before == now:
        make(now, state=state)
        return
    with pytest.raises(ValueError, match=r"decides by .* how many are skipped, but this model's EASConfig by"):
        make(now, state=state)


def test_in_a_shorter_run_a_search_that_should_be_over_ends() -> None:
    state = kept(go_on(make({"num_skip": 2}, num_steps=100), 40))
    search = go_on(make({"num_skip": 2}, num_steps=50, state=state), 41)
    assert not search.is_searching
    assert len(search.eas.skipped_modules) == 2


def test_a_strategy_without_doubts_does_not_end_a_search_early() -> None:
    search = go_on(make({"num_skip": 2}, strategy=Simple, num_steps=100, search_steps="auto", interval=1), 29)
    assert search.is_searching


@pytest.mark.parametrize("candidates", [4, 12, 13])
def test_before_anything_is_known_the_last_would_be_skipped(candidates) -> None:
    names = [str(i) for i in range(candidates)]
    assert ThompsonSampling(names, 2).best() == names[-2:]


# --- losses that are no losses ---------------------------------------------------------------------------------------


def test_a_share_of_a_reward_is_refused() -> None:
    search = make(GOALS[1])
    search.held_out.batch_loss = lambda batch: -10.0
    with pytest.raises(ValueError, match=r"max_loss_increase is a share of the loss, but .* is -10, as a reward's"):
        all_steps(search)


@pytest.mark.filterwarnings("ignore:The search left out")
def test_where_nothing_can_be_measured_the_log_says_so(caplog) -> None:
    search = make(GOALS[1])
    search.held_out.batch_loss = lambda batch: 1.0 if search.step < 20 else float("nan")
    all_steps(search)
    assert search.eas.skipped_modules == []
    assert search.figures()["eas/best"] == ""
    assert "no set could be held against nothing skipped" in caplog.text


def test_what_negative_losses_cost_is_no_percentage() -> None:
    search = make({"num_skip": 2})
    search.held_out.batch_loss = lambda batch: -20.0 + 0.1 * len({"0", "2"} & {*search.eas.skipped_modules})
    all_steps(search)
    result = SearchResult.of(search.eas.active_config.search)
    assert result.unit == "loss"
    assert "%" not in result.sentence(search.eas.active_config.scores, search.eas.skipped_modules)


# --- few held-out batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_batches", "count"), [(1, 1), (3, 3), (9, 4)])
def test_the_choice_is_measured_once_on_each_batch(num_batches, count, caplog) -> None:
    seen: list[int] = []
    search = make({"num_skip": 2}, batches=list(range(num_batches)))
    with caplog.at_level("INFO", "peft_eas"):
        for _ in range(STEPS):
            search.held_out.batch_loss = lambda batch: seen.append(batch) or 1.0 + 0.1 * batch
            search.before_step()
            was_searching = search.is_searching
            seen.clear()
            search.after_step()
            if was_searching and not search.is_searching:
                break
    assert sorted(seen) == sorted([*{*seen}] * 2)
    assert len({*seen}) == count
    (point,) = search.state_dict()["measured"]
    assert (point["deviation"] is None) == (count == 1)
    assert ("(one batch alone)" in caplog.text) == (count == 1)


def test_under_trainer_too(tmp_path) -> None:
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), make_model(), per_device_eval_batch_size=64)
    trainer.train()
    assert [point["deviation"] for point in trainer.model.peft_config["default"].search["measured"]] == [None]


def test_savings_of_all_that_there_is() -> None:
    assert Savings("seconds", 1.0, {"a": 0.5, "b": 0.5}).speedup(["a", "b"]) == float("inf")
