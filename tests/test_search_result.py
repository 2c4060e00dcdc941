"""What a search found, in words: increases of the loss, the chosen point, the table around it."""

import math

import pytest

from peft_eas.reporting.search_result import SearchResult, increase_text

FOUND = {
    "strategy": "ThompsonSampling",
    "curve": {
        "num_skip": list(range(9)),
        "increase": [math.log1p(0.01 * i) for i in range(9)],
        "deviation": [0.01] * 9,
    },
    "measured": [{"num_skip": 5, "increase": math.log(1.06), "deviation": 0.02}],
    "savings": {"unit": "seconds", "total": 10.0, "per_candidate": [0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]},
}
# The second candidate is the cheapest, then come the first, the third, …
SCORES = dict(zip("abcdefgh", (-0.2, -0.1, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8)))


@pytest.mark.parametrize(
    ("increase", "deviation", "text"),
    [
        (0.0, None, "+0.00 %"),
        (math.log(1.004), None, "+0.40 %"),
        (math.log(1.004), 0.002, "+0.40 ± 0.20 %"),
        (math.log(1.004), 0.05, "+0.4 ± 5.0 %"),
        (math.log(1.25), 0.1, "+25.0 ± 12.5 %"),
        (math.log(0.9), 0.01, "-10.0 ± 0.9 %"),
        (math.log(3.0), 0.1, "×3.0 ± 0.3"),
        (math.log(1200.0), None, "×1,200"),
        (300.0, None, "×2.7e+43"),
    ],
)
def test_increases_of_the_log_loss_are_told_as_those_of_the_loss(increase, deviation, text):
    assert increase_text(increase, "log loss", deviation) == text


def test_increases_of_the_loss_itself():
    assert increase_text(-0.012, "loss", 0.001) == "-0.012 ± 0.001"
    assert increase_text(2.0, "loss") == "+2.000"


def test_the_chosen_point():
    result = SearchResult.of(FOUND)
    assert result.sentence(SCORES, list("abcde")) == (
        "The search (ThompsonSampling) chose 5 of 8 candidates to skip. When it ended, that changed the held-out loss "
        "against nothing skipped by +6.0 ± 2.1 % (measured)."
    )
    assert result.sentence(SCORES, list("dcba")).endswith("by +4.0 ± 1.0 % (expected).")


def test_a_lower_loss_than_with_nothing_skipped_is_not_told_as_a_gain():
    measured = [{"num_skip": 5, "increase": -0.4, "deviation": 0.01}]
    said = SearchResult.of({**FOUND, "measured": measured}).sentence(SCORES, list("abcde"))
    assert "by -33.0 ± 0.7 % (measured). The model had learned less with nothing skipped" in said
    measured[0]["deviation"] = 0.3
    assert "learned less" not in SearchResult.of({**FOUND, "measured": measured}).sentence(SCORES, list("abcde"))


def test_the_table_around_the_choice():
    head, *rows = SearchResult.of(FOUND).table(SCORES, list("abcde"))
    assert head == ("Skipped", "Change of the loss, expected", "Measured", "Speed-up")
    assert [row[0] for row in rows] == ["2", "3", "4", "5, the choice", "6", "7", "8"]
    # The first of the ranking saves a tenth, each other a twentieth.
    assert rows[0] == ("2", "+2.0 ± 1.0 %", "", "1.18×")
    assert rows[3] == ("5, the choice", "+5.0 ± 1.1 %", "+6.0 ± 2.1 %", "1.43×")
    measured = [{"num_skip": 0, "increase": 0.0, "deviation": None}]
    rows = SearchResult.of({**FOUND, "measured": measured, "savings": None}).table(SCORES, list("abcdefg"))[1:]
    assert [row[0] for row in rows] == ["0", "4", "5", "6", "7, the choice", "8"]
    assert rows[0] == ("0", "+0.0 ± 1.0 %", "+0.00 %")


def test_the_kv_cache_that_is_left():
    savings = {"unit": "bytes", "total": 4.0, "per_candidate": [1.0] * 4}
    assert SearchResult.of({**FOUND, "savings": savings}).saved([3, 2, 1, 0]) == (
        "KV cache left",
        ["100 %", "75 %", "50 %", "25 %", "0 %"],
    )


def test_scores_are_costs_where_there_is_a_curve():
    scores = {"a": -0.5, "b": -0.1, "c": -0.3}
    costs = SearchResult.of(FOUND).values(scores, ["b", "c"])
    assert costs == pytest.approx({"a": 0.3, "b": -0.1, "c": 0.1})
    result = SearchResult.of({"strategy": "AttentionBandit", "curve": None, "measured": None})
    assert (result.unit, result.values(scores, ["b"]), result.table(scores, ["b"])) == ("score", scores, [])
    assert (
        result.sentence(scores, ["b", "of an earlier merge"])
        == "The search (AttentionBandit) chose 1 of 3 candidates to skip."
    )
    assert SearchResult.of(None) is None
