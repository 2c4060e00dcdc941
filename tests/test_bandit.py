"""The bandit: its update by hand-checked numbers, its draws by their distribution, and that it resumes exactly."""

import json
import math
import warnings
from collections import Counter

import pytest

from peft_eas.strategies.bandit import RELATIVE_GAIN, AttentionBandit

NAMES = [f"layers.{i}.self_attn" for i in range(4)]


def make_bandit(num: int = 8, k: int = 4, **options) -> AttentionBandit:
    return AttentionBandit([f"layers.{i}.self_attn" for i in range(num)], k, **options)


def damage(names: list[str]) -> float:
    """Loss of a set in which skipping an MHA of the first half of eight layers costs something."""
    return sum(1.0 for name in names if int(name.split(".")[1]) < 4)


def search(bandit: AttentionBandit, loss_of, rounds: int = 40) -> AttentionBandit:
    for step in range(rounds):
        sets = bandit.sample_sets(3)
        bandit.update(sets, [loss_of(names) for names in sets], step=step)
    return bandit


# --- the update ----------------------------------------------------------------------------------------------------


def test_exp_reward_moves_the_scores_by_the_papers_rule():
    bandit = AttentionBandit(NAMES, 1, lr=2.0, reward="exp")
    bandit.update([[NAMES[0]], [NAMES[2]]], [0.0, math.log(2.0)])
    # v = 1 and 1/2, mean 3/4; p = 1/4 for each of four, so p (1 − p) = 3/16.
    assert bandit.scores == pytest.approx([2 * 0.25 * 3 / 16, 0.0, -2 * 0.25 * 3 / 16, 0.0])


def test_update_uses_the_probabilities_from_before_the_round():
    bandit = AttentionBandit(NAMES, 2, lr=1.0, temperature=10.0, reward="exp")
    bandit.scores = [0.1, 0.0, 0.0, 0.0]
    p = math.e / (math.e + 3.0)
    assert bandit.probabilities()[0] == pytest.approx(p)
    bandit.update([NAMES[:2], [NAMES[0], NAMES[2]]], [0.0, math.log(2.0)])
    q = (1.0 - p) / 3.0
    # The first is in both sets, whose advantages are 1/4 and −1/4.
    assert bandit.scores == pytest.approx([0.1, 0.25 * q * (1 - q), -0.25 * q * (1 - q), 0.0])


def test_relative_reward_counts_spreads_of_the_round():
    bandit = AttentionBandit(NAMES, 1, lr=2.0)
    bandit.update([[NAMES[0]], [NAMES[1]], [NAMES[2]]], [1.0, 2.0, 3.0])
    unit = 2.0 * RELATIVE_GAIN * math.sqrt(1.5) * 3 / 16  # standard deviation √(2/3), p (1 − p) = 3/16
    assert bandit.scores == pytest.approx([unit, 0.0, -unit, 0.0])


def test_scores_stay_when_all_losses_are_equal():
    for reward in ("relative", "exp"):
        bandit = AttentionBandit(NAMES, 1, reward=reward)
        bandit.update([[name] for name in NAMES], [0.7] * 4)
        assert bandit.scores == [0.0] * 4


def test_one_outlier_neither_saturates_the_scores_nor_ends_the_learning():
    bandit = search(make_bandit(), damage, rounds=10)
    before = list(bandit.scores)
    sets = bandit.sample_sets(3)
    bandit.update(sets, [1e30, 1.0, 1.0])
    assert max(abs(a - b) for a, b in zip(before, bandit.scores)) < 2 * 2.0 * 3 * RELATIVE_GAIN / 4
    search(bandit, damage, rounds=60)
    assert damage(bandit.best()) == 0.0


@pytest.mark.parametrize("level", [0.01, 8.0])
def test_relative_reward_tells_good_sets_from_bad_at_any_level_of_loss_and_exp_hardly(level):
    """Losses from `level` to 1.1 × `level`: the relative reward makes up its mind at 0.01 and at 8, exp at neither."""

    def loss_of(names: list[str]) -> float:
        return level * (1.0 + 0.025 * damage(names))

    start = math.log(8)
    relative = [search(make_bandit(seed=seed), loss_of) for seed in range(10)]
    assert all(damage(bandit.best()) == 0.0 for bandit in relative)
    assert all(bandit.entropy() < math.log(4) + 0.5 * (start - math.log(4)) for bandit in relative)
    exp = [search(make_bandit(seed=seed, reward="exp"), loss_of) for seed in range(10)]
    assert all(bandit.entropy() > start - 0.001 for bandit in exp)


def test_relative_reward_does_not_depend_on_scale_or_shift():
    plain, scaled, shifted = (
        search(make_bandit(), loss_of).scores
        for loss_of in (damage, lambda names: damage(names) / 100, lambda names: damage(names) + 8)
    )
    assert scaled == pytest.approx(plain)
    assert shifted == pytest.approx(plain)


def test_exp_reward_stands_a_very_negative_loss():
    bandit = AttentionBandit(NAMES, 1, reward="exp")
    bandit.update([[NAMES[0]], [NAMES[1]]], [-1e9, 0.0])
    assert all(math.isfinite(score) for score in bandit.scores)


# --- losses that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["relative", "exp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_warned_about_counted_and_left_out(bad, reward):
    with_bad, without = (AttentionBandit(NAMES, 1, reward=reward) for _ in range(2))
    with pytest.warns(UserWarning, match=r"left out 1 of 3 skip sets.*NaN or infinite.*1 so far"):
        with_bad.update([[NAMES[0]], [NAMES[1]], [NAMES[2]]], [1.0, bad, 2.0])
    without.update([[NAMES[0]], [NAMES[2]]], [1.0, 2.0])
    assert with_bad.scores == without.scores
    assert with_bad.num_nonfinite == 1


def test_a_round_with_fewer_than_two_finite_losses_changes_nothing():
    bandit = AttentionBandit(NAMES, 1)
    with pytest.warns(UserWarning, match="left out 2 of 3"):
        bandit.update([[NAMES[0]], [NAMES[1]], [NAMES[2]]], [math.nan, 1.0, math.nan])
    assert bandit.scores == [0.0] * 4
    assert bandit.num_nonfinite == 2
    assert "NaN" not in json.dumps(bandit.state_dict())


def test_learning_goes_on_after_rounds_without_a_finite_loss():
    bandit = make_bandit()
    for _ in range(12):
        with pytest.warns(UserWarning, match="left out 3 of 3"):
            bandit.update(bandit.sample_sets(3), [math.nan] * 3)
    assert bandit.mean_loss() is None
    assert bandit.mean_reward() is None
    assert damage(search(bandit, damage).best()) == 0.0


# --- draws ---------------------------------------------------------------------------------------------------------


def test_samples_are_k_distinct_candidates_in_layer_order():
    bandit = make_bandit(num=12, k=5)
    for _ in range(50):
        drawn = bandit.sample()
        assert len(set(drawn)) == 5
        assert drawn == sorted(drawn, key=bandit.candidates.index)
    assert bandit.sample(0) == []
    assert bandit.sample(12) == bandit.candidates


def test_samples_follow_p_without_replacement():
    bandit = AttentionBandit(NAMES[:3], 2)
    bandit.scores = [math.log(weight) / 10.0 for weight in (0.6, 0.3, 0.1)]
    counts = Counter(tuple(bandit.sample()) for _ in range(20_000))
    # First a with p_a, then b with p_b / (1 − p_a), and the other way round.
    p = dict(zip(NAMES, (0.6, 0.3, 0.1)))
    for pair, count in counts.items():
        a, b = (p[name] for name in pair)
        assert count / 20_000 == pytest.approx(a * b / (1 - a) + a * b / (1 - b), abs=0.012)


def test_samples_survive_probabilities_that_underflow():
    bandit = AttentionBandit(NAMES, 3)
    bandit.scores = [1000.0, 0.0, 0.0, 0.0]
    drawn = [tuple(bandit.sample()) for _ in range(30)]
    assert all(NAMES[0] in names for names in drawn)
    assert len(set(drawn)) == 3


def test_sets_of_a_round_are_distinct():
    bandit = make_bandit()
    for _ in range(30):
        sets = bandit.sample_sets(3)
        assert len({tuple(names) for names in sets}) == 3


def test_a_round_has_fewer_sets_where_there_are_no_more():
    assert len(AttentionBandit(NAMES, 3).sample_sets(10)) == 4
    assert AttentionBandit(NAMES, 4).sample_sets(3) == [NAMES]
    assert AttentionBandit(NAMES, 0).sample_sets(3) == [[]]
    settled = AttentionBandit(NAMES, 1)
    settled.scores = [1000.0, 0.0, 0.0, 0.0]
    assert settled.sample_sets(3) == [[NAMES[0]]]


def test_entropy_falls_from_log_n_as_scores_part():
    bandit = AttentionBandit(NAMES, 1)
    assert bandit.entropy() == pytest.approx(math.log(4))
    bandit.scores = [1000.0, 1000.0, 0.0, 0.0]
    assert bandit.entropy() == pytest.approx(math.log(2))


def test_best_takes_the_highest_scores_and_the_later_layer_of_equals():
    bandit = AttentionBandit(NAMES, 2)
    assert bandit.best() == NAMES[2:]
    bandit.scores = [0.5, 0.0, 0.1, 0.1]
    assert bandit.best() == [NAMES[0], NAMES[3]]
    assert bandit.best(1) == [NAMES[0]]


# --- state ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_search_and_other_seed_other_draws():
    first, second, other = (search(make_bandit(seed=seed), damage) for seed in (3, 3, 4))
    assert first.state_dict() == second.state_dict()
    assert first.rounds != other.rounds


@pytest.mark.parametrize("reward", ["relative", "exp"])
def test_a_search_resumed_from_json_goes_on_bit_equal(reward):
    whole = search(make_bandit(reward=reward, seed=5), damage, rounds=12)
    saved = json.loads(json.dumps(whole.state_dict()))
    search(whole, damage, rounds=15)
    resumed = make_bandit()
    resumed.load_state_dict(saved)
    search(resumed, damage, rounds=15)
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.sample() == whole.sample()


def test_trajectory_goes_through_the_scores_of_the_search_again():
    bandit = make_bandit()
    seen = []
    for step in range(15):
        search(bandit, damage, rounds=1)
        bandit.rounds[-1]["step"] = step
        seen.append(bandit.scores)
    again = AttentionBandit.from_state_dict(json.loads(json.dumps(bandit.state_dict())))
    assert [(record["step"], scores) for record, scores in again.trajectory()] == list(enumerate(seen))


def test_the_state_of_another_search_is_refused():
    state = make_bandit(num=8).state_dict()
    with pytest.raises(ValueError, match=r"saved search has candidates=.*but this one has.*start anew"):
        make_bandit(num=9).load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved search has num_skip=4, but this one has 3"):
        make_bandit(num=8, k=3).load_state_dict(state)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": []}, r"candidates=\[\] must name at least one MHA"),
        ({"candidates": ["a", "a"]}, "each only once"),
        ({"num_skip": 5}, "num_skip=5 is out of range: there are 4 candidates"),
        ({"num_skip": -1}, "num_skip=-1 is out of range"),
        ({"temperature": 0.0}, r"score temperature is 0\.0; it must be a finite number above 0"),
        ({"lr": math.nan}, "score lr is nan"),
        ({"reward": "log"}, "reward='log' is unknown. Choose one of 'relative', 'exp'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionBandit(**{"candidates": NAMES, "num_skip": 2, **change})


def test_bad_rounds_are_refused_and_leave_no_trace():
    bandit = AttentionBandit(NAMES, 1)
    with pytest.raises(ValueError, match="2 sets came with 1 losses"):
        bandit.update([[NAMES[0]], [NAMES[1]]], [1.0])
    with pytest.raises(ValueError, match=r"holds \['lm_head'\], which are no candidates"):
        bandit.update([["lm_head"], [NAMES[1]]], [1.0, 2.0])
    with pytest.raises(ValueError, match="names an MHA twice"):
        bandit.update([[NAMES[0], NAMES[0]], [NAMES[1]]], [1.0, 2.0])
    with pytest.raises(ValueError, match="A set of k=5 MHAs was asked for, of 4"):
        bandit.sample(5)
    assert bandit.rounds == []


def test_no_warning_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(make_bandit(), damage, rounds=5)
