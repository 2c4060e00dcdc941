"""The pictures of a search: drawn from everything a run leaves behind, legible for few and for many attentions."""

import json
import math
import sys

import numpy as np
import pytest
from training import NAMES, SCHEDULE, make_model, make_trainer

from peft_eas import EASCallback
from peft_eas.strategies import AttentionBandit, ThompsonSampling

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from peft_eas.reporting.plots import (  # noqa: E402
    KEPT,
    SKIPPED,
    draw_skip_map,
    plot_loss_curve,
    plot_search_curve,
    plot_skip_map,
    read_search,
)

FAMILIES = {
    "few": [f"model.layers.{i}.self_attn" for i in range(4)],
    "many": [f"model.layers.{i}.self_attn" for i in range(40)],
    "two per layer": [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn", "encoder_attn")],
    "two towers": [f"model.{tower}.encoder.layers.{i}.attn" for tower in ("vision", "text") for i in range(5)],
}


def make_record(names: list[str], rounds: int = 12, is_over: bool = True, reward: str = "relative") -> dict:
    bandit = AttentionBandit(names, len(names) // 2, reward=reward)
    for step in range(rounds):
        sets = bandit.sample_sets(3)
        bandit.update(
            sets, [1.0 + sum(names.index(name) for name in s) / len(names) for s in sets], step=100 + 10 * step
        )
    return {"strategy": bandit.state_dict(), "skipped_modules": bandit.best() if is_over else None}


def make_search(names: list[str], rounds: int = 12, is_over: bool = True, vital: float = 1.0) -> dict:
    """As `make_record`, of the default strategy; the first candidate costs `vital`, the others 0.01, 0.02, …"""
    num, k, rng = len(names), len(names) // 2, np.random.default_rng(0)
    costs = [vital, *(0.01 * i for i in range(1, num))]
    strategy = ThompsonSampling(names, k)

    def loss(names_of_set: list[str], noise: float) -> float:
        return math.exp(sum(costs[names.index(name)] for name in names_of_set) + noise * rng.standard_normal())

    for step in range(10, 10 * rounds + 10, 10):
        for one in range(step - 9, step + 1):
            drawn = strategy.sample()
            strategy.note_step(drawn, loss(drawn, 0.1), one)
        sets = strategy.sample_sets(3)
        strategy.update(sets, [loss(one, 0.01) for one in sets], step=step)
    increases = [0.0, *np.cumsum(sorted(costs)).tolist()]
    return {
        "strategy": strategy.state_dict(),
        "skipped_modules": strategy.best() if is_over else None,
        "schedule": {"warmup_end": 0, "search_end": 10 * rounds, "freeze_step": None},
        "curve": {
            "num_skip": list(range(num + 1)),
            "increase": increases,
            "deviation": [0.01 * i for i in range(num + 1)],
        },
        "measured": [{"num_skip": k, "increase": increases[k] + 0.01, "deviation": 0.02}],
        "savings": {"unit": "seconds", "total": 2.0 * num, "per_candidate": [1.0] * num},
    }


def make_own(costs: list[float] | None = None) -> dict:
    """The record of a strategy that is not the library's, of layers 0 to 3 with 1 and 3 skipped."""
    names = FAMILIES["few"]
    state = {"strategy": "Mine", "candidates": names, "num_skip": 2, "scores": [-2.0, 0.25, -1.0, 0.5]}
    state["rounds"] = [
        {"step": 10, "sets": ["1 3", "0 3", ""], "losses": [2.0, 8.0, 1.0]},
        {"step": 20, "sets": ["1 3", "0 2"], "losses": [1.5, None]},
    ]
    if costs is not None:
        state |= {"scores": [-cost for cost in costs], "costs": costs, "deviations": [0.1] * 4}
    return {"strategy": state, "skipped_modules": [names[1], names[3]]}


def labels_of(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved while a test runs."""
    figures = []
    save = Figure.savefig

    def spy(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: a tick beyond the limits has a label, but shows none."""
    figure.draw_without_rendering()
    beyond = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    return [text for text in set(figure.findobj(Text)) - beyond if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("names", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("plot", "make"),
    [
        *((plot, make) for plot in (plot_skip_map, plot_search_curve) for make in (make_record, make_search)),
        (plot_search_curve, lambda names: make_search(names, rounds=2, is_over=False, vital=8.0)),
        (plot_loss_curve, make_search),
    ],
)
def test_nothing_is_cut_off_or_drawn_over(tmp_path, drawn, plot, make, names):
    path = plot(make(names), tmp_path / "new" / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    figure = drawn[0]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts(figure)]
    inside = figure.bbox.padded(1.0)
    for label, box in boxes:
        assert inside.contains(box.x0, box.y0), label
        assert inside.contains(box.x1, box.y1), label
    for i, (label, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.padded(-1.5).overlaps(other_box.padded(-1.5)), (label, other)


def test_the_map_shows_state_and_score_of_every_layer_in_order(tmp_path, drawn):
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    bandit = AttentionBandit(names, 1)
    bandit.scores = [0.125, -0.25, 0.5]
    plot_skip_map({"strategy": bandit.state_dict(), "skipped_modules": [names[2]]}, tmp_path / "map.png")
    states, scores = drawn[0].axes
    assert [label.get_text() for label in states.get_yticklabels()] == ["0", "1", "2"]
    assert states.get_ylim()[0] > states.get_ylim()[1]  # the first layer on top
    assert states.get_ylabel() == "layer"
    assert [text.get_text() for text in states.texts] == ["kept", "kept", "skipped"]
    assert [text.get_text().strip() for text in scores.texts] == ["+0.125", "-0.250", "+0.500"]
    bars = [bar for bar in scores.patches if bar.get_width()]
    assert [bar.get_width() for bar in bars] == bandit.scores
    assert [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in bars] == [KEPT, KEPT, SKIPPED]
    assert drawn[0].get_suptitle() == "1 of 3 attentions skipped"


@pytest.mark.parametrize("values", ["scores", "probabilities"])
def test_the_curve_shows_every_candidate_and_names_the_skipped(tmp_path, drawn, values):
    names = FAMILIES["few"]
    record = make_record(names)
    plot_search_curve(record, tmp_path / "curve.png", values=values)
    lines, rewards = drawn[0].axes
    bandit = AttentionBandit.from_state_dict(record["strategy"])
    last = bandit.scores if values == "scores" else bandit.probabilities()
    assert [line.get_ydata()[-1] for line in lines.get_lines()] == pytest.approx(last)
    assert list(lines.get_lines()[0].get_xdata()) == [0, 90, *range(100, 220, 10)]
    labels = {text.get_text() for text in lines.texts}
    assert labels == {f"layer {names.index(name)}" for name in record["skipped_modules"]}
    mean = next(line for line in rewards.get_lines() if line.get_label() == "mean of a round")
    first = record["strategy"]["rounds"][0]["losses"]
    assert mean.get_ydata()[0] == pytest.approx(sum(first) / 3)


def test_the_curve_of_the_papers_reward_shows_exp_of_minus_the_loss(tmp_path, drawn):
    record = make_record(FAMILIES["few"], reward="exp")
    plot_search_curve(record, tmp_path / "curve.png")
    rewards = drawn[0].axes[1]
    assert rewards.get_ylabel() == "reward exp(−loss)"
    assert all(0 < value < 1 for line in rewards.get_lines() for value in line.get_ydata())


def test_losses_that_were_not_finite_are_left_out(tmp_path, drawn):
    bandit = AttentionBandit(FAMILIES["few"], 1)
    for losses in ([1.0, float("nan")], [float("nan")] * 2, [2.0, 3.0]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            bandit.update(bandit.sample_sets(2), losses)
    plot_search_curve({"strategy": bandit.state_dict()}, tmp_path / "curve.png")
    mean = next(line for line in drawn[0].axes[1].get_lines() if line.get_label() == "mean of a round")
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([1, 3], [1.0, 2.5])


# --- strategies with costs, and of one's own -------------------------------------------------------------------------


def test_costs_stand_in_their_order_against_the_chosen_and_far_ones_are_cut_off(tmp_path, drawn):
    # Of the chosen, layers 1 and 3, the mean cost is 0.02; layer 0 costs 5 more.
    plot_search_curve(make_own([5.02, 0.03, math.log(1.1) + 0.02, 0.01]), tmp_path / "curve.png")
    costs = drawn[0].axes[0]
    assert labels_of(costs.yaxis) == ["3", "1", "2", "0"]
    assert costs.get_ylim()[0] > costs.get_ylim()[1]
    lines = [line for line in costs.get_lines() if line.get_marker() in ("o", ">")]
    assert [line.get_color() for line in lines] == [SKIPPED, SKIPPED, KEPT, KEPT]
    assert [line.get_marker() for line in lines] == ["o", "o", "o", ">"]
    middle = [100 * math.expm1(x) for x in (-0.01, 0.01, math.log(1.1))]
    assert [line.get_xdata()[0] for line in lines[:3]] == pytest.approx(middle)
    whiskers = [line for line in costs.get_lines() if line.get_marker() == "None" and len(set(line.get_ydata())) == 1]
    ends = [100 * math.expm1(math.log(1.1) - 0.1), 100 * math.expm1(math.log(1.1) + 0.1)]
    assert list(whiskers[2].get_xdata()) == pytest.approx(ends)
    assert ends[1] < costs.get_xlim()[1] < 30
    texts = [text.get_text() for text in costs.texts]
    assert texts == ["-1.0 ± 9.9 %", "+1.0 ± 10.1 %", "+10.0 ± 11.0 %", "×148 ± 15"]
    plot_skip_map(make_own([5.02, 0.03, math.log(1.1) + 0.02, 0.01]), tmp_path / "map.png")
    bars = drawn[1].axes[1]
    assert [text.get_text().strip() for text in bars.texts] == ["▶ ×148", "+1.0 %", "+10.0 %", "-1.00 %"]
    assert max(bar.get_width() for bar in bars.patches) == pytest.approx(10.0)


def test_where_a_loss_is_negative_costs_are_those_of_the_loss(tmp_path, drawn):
    record = make_own([0.5, 0.03, 0.1, 0.01])
    record["strategy"]["rounds"][0]["losses"][0] = -2.0
    plot_search_curve(record, tmp_path / "curve.png")
    costs, losses = drawn[0].axes[:2]
    assert costs.texts[0].get_text() == "-0.010 ± 0.100"
    assert "percent" not in costs.get_xlabel()
    assert losses.get_yscale() == "linear"


def test_what_all_costs_have_in_common_is_not_in_their_deviations():
    """All sets are of one size, which tells nothing of what skipping any costs, but how costs differ."""
    record = make_search(FAMILIES["few"], vital=6.0)
    search = read_search(record)
    chosen = [search.candidates.index(name) for name in search.skipped]
    assert sum(search.values[i] for i in chosen) == pytest.approx(0.0)
    strategy = ThompsonSampling.from_state_dict(record["strategy"])
    root = strategy._marginal @ strategy._posterior.root
    covariance = root @ root.T
    contrast = np.eye(4) - np.isin(np.arange(4), chosen) / len(chosen)
    assert search.deviations == pytest.approx(np.sqrt(np.diag(contrast @ covariance @ contrast.T)).tolist())
    # Layers 1 and 2 are told apart better than what either costs alone.
    assert search.deviations[chosen[0]] < 0.5 * record["strategy"]["deviations"][chosen[0]]


def test_the_losses_tried_are_the_darker_the_more_of_the_chosen_they_held(tmp_path, drawn):
    record = make_own()
    record["strategy"]["steps"] = ["1 0 2 30.0", "2 1 3 2.5"]
    record["schedule"] = {"warmup_end": 5, "search_end": 25, "freeze_step": None}
    plot_search_curve(record, tmp_path / "curve.png")
    losses = drawn[0].axes[1]
    dots = losses.collections[0]
    assert dots.get_offsets().tolist() == [[10, 2.0], [10, 8.0], [20, 1.5]]
    assert dots.get_array().tolist() == [1.0, 0.5, 1.0]
    points = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.get_lines()}
    assert points["a training step"] == ([1, 2], [30.0, 2.5])
    assert points["nothing skipped"] == ([10], [1.0])
    assert points["mean of a round"] == ([10, 20], [5.0, 1.5])
    assert (points["end of the warm-up"][0], points["end of the search"][0]) == ([5, 5], [25, 25])
    assert losses.get_yscale() == "log"


def test_a_strategy_of_ones_own_shows_its_scores(tmp_path, drawn):
    plot_search_curve(make_own(), tmp_path / "curve.png")
    scores = drawn[0].axes[0]
    assert labels_of(scores.yaxis) == ["3", "1", "2", "0"]
    assert [text.get_text() for text in scores.texts] == ["+0.500", "+0.250", "-1.000", "-2.000"]
    assert drawn[0].get_suptitle() == "Mine over 4 attentions, 2 rounds: 2 to skip, in colour"
    plot_skip_map(make_own(), tmp_path / "map.png")
    assert [text.get_text().strip() for text in drawn[1].axes[1].texts] == ["-2.000", "+0.250", "-1.000", "+0.500"]
    for make in (make_own, lambda: make_search(FAMILIES["few"])):
        with pytest.raises(ValueError, match=r"values='probabilities' is for the bandit.*Leave values out"):
            plot_search_curve(make(), tmp_path / "curve.png", values="probabilities")


def test_the_title_tells_how_far_the_search_is_from_settled(tmp_path, drawn):
    record = make_search(FAMILIES["few"], rounds=20)
    plot_search_curve(record, tmp_path / "curve.png")
    assert drawn[0].get_suptitle().splitlines()[1].endswith("is expected to be lower by less than 0.1 %")
    record = make_search(FAMILIES["many"], rounds=2, is_over=False)
    plot_search_curve(record, tmp_path / "curve.png")
    gain = ThompsonSampling.from_state_dict(record["strategy"]).expected_gain()
    assert gain > 0.02
    first, second = drawn[1].get_suptitle().splitlines()
    assert first == "ThompsonSampling over 40 attentions, 2 rounds: 20 the best so far, in colour; not over"
    assert second == f"The loss of a perfect choice is expected to be lower by {100 * (1 - math.exp(-gain)):.1f} %"


# --- the loss against the number skipped -----------------------------------------------------------------------------


def test_the_loss_curve_shows_what_is_expected_and_what_was_measured(tmp_path, drawn):
    plot_loss_curve(make_search(FAMILIES["few"], vital=3.0), tmp_path / "curve.png")
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["expected"].get_xdata()) == [0, 1, 2, 3, 4]
    increases = (0.0, 0.01, 0.03, 0.06, 3.06)
    assert list(lines["expected"].get_ydata()) == pytest.approx([100 * math.expm1(x) for x in increases])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[band[:, 0] == 2][:, 1].min() == pytest.approx(100 * math.expm1(0.01))
    assert band[band[:, 0] == 2][:, 1].max() == pytest.approx(100 * math.expm1(0.05))
    (choice,) = (line for label, line in lines.items() if label == "2 skipped: +3.0 ± 2.1 %")
    assert list(choice.get_xdata()) == [2, 2]
    point = axes.containers[0].lines
    assert (point[0].get_xdata()[0], point[0].get_ydata()[0]) == (2, pytest.approx(100 * math.expm1(0.04)))
    assert point[2][0].get_segments()[0][:, 1] == pytest.approx([100 * math.expm1(0.02), 100 * math.expm1(0.06)])
    # All four would raise the loss to 21 times itself; the axis is for the choice.
    assert 20 < axes.get_ylim()[1] < 30
    top = axes.child_axes[0]
    assert labels_of(top.xaxis) == ["1.00×", "1.14×", "1.33×", "1.60×", "2.00×"]
    assert top.get_xlabel() == "Speed-up"


@pytest.mark.parametrize(
    ("savings", "labels"),
    [
        ({"unit": "bytes", "total": 400.0, "per_candidate": [100.0, 50.0, 100.0, 50.0]},
         ["100 %", "88 %", "62 %", "50 %", "25 %"]),
        ({"unit": "attentions", "total": 4, "per_candidate": [1] * 4}, None),
        (None, None),
    ],
)  # fmt: skip
def test_the_axis_on_top_shows_the_kv_cache_or_nothing(tmp_path, drawn, savings, labels):
    record = {**make_search(FAMILIES["few"]), "savings": savings, "measured": None}
    record["strategy"]["scores"] = [-4.0, -1.0, -2.0, -3.0]  # cheapest first: layers 1, 2, 3, 0
    plot_loss_curve(record, tmp_path / "curve.png")
    top = drawn[0].axes[0].child_axes
    assert (labels_of(top[0].xaxis) if top else None) == labels


def test_without_a_curve_it_is_refused(tmp_path):
    for record in (make_record(FAMILIES["few"]), make_own(), {**make_search(FAMILIES["few"]), "curve": None}):
        with pytest.raises(ValueError, match=r"made by \w+, holds no curve.*strategy='thompson', the default"):
            plot_loss_curve(record, tmp_path / "curve.png")
    with pytest.raises(ValueError, match="no round of rewards yet"):
        plot_loss_curve(make_search(FAMILIES["few"], rounds=0), tmp_path / "curve.png")
    with pytest.raises(ValueError, match=r"holds no search"):
        plot_loss_curve({}, tmp_path / "curve.png")


# --- where a search is read from -------------------------------------------------------------------------------------


def test_every_source_that_a_run_leaves_behind_draws_the_same(tmp_path):
    callback = EASCallback(**SCHEDULE)
    make_trainer(tmp_path, callback, save_strategy="steps", save_steps=10).train()
    checkpoint = tmp_path / "checkpoint-20"
    sources = [callback.record, tmp_path, str(tmp_path), tmp_path / "eas_search.json", checkpoint]
    sources.append(checkpoint / "trainer_state.json")
    for plot in (plot_skip_map, plot_search_curve):
        pictures = {plot(source, tmp_path / f"{i}.png").read_bytes() for i, source in enumerate(sources)}
        assert len(pictures) == 1
    (tmp_path / "eas_search.json").unlink()
    assert plot_skip_map(tmp_path, tmp_path / "late.png").read_bytes()  # from the last checkpoint


def test_a_search_that_is_not_over_shows_the_best_so_far(tmp_path, drawn):
    record = make_record(FAMILIES["few"], is_over=False)
    plot_skip_map(record, tmp_path / "map.png")
    assert drawn[0].get_suptitle() == "Search not over: the best 2 of 4 attentions so far"
    plot_skip_map(make_record(FAMILIES["few"], rounds=0, is_over=False), tmp_path / "start.png")
    with pytest.raises(ValueError, match="no round of rewards yet"):
        plot_search_curve(make_record(FAMILIES["few"], rounds=0), tmp_path / "curve.png")


def test_a_map_without_a_search_shows_the_states_alone(tmp_path, drawn):
    draw_skip_map(NAMES, NAMES[1:2], None, tmp_path / "map.png")
    shown = [text.get_text() for text in texts(drawn[0])]
    assert sorted(shown) == sorted(
        ["1 of 4 attentions skipped", "layer", "0", "1", "2", "3", "kept", "skipped", "kept", "kept"]
    )
    assert len(drawn[0].axes) == 1


def test_what_holds_no_search_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no eas_search\.json, trainer_state\.json or checkpoint"):
        plot_skip_map(tmp_path, tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"holds no search\. Give the folder of a run"):
        plot_skip_map({}, tmp_path / "map.png")
    model = make_model(num_skip=None, skipped_modules=NAMES[:1])
    make_trainer(tmp_path / "run", EASCallback(), model, save_strategy="steps", save_steps=20).train()
    with pytest.raises(ValueError, match=r"checkpoint-20 holds no search.*not one with skipped_modules given"):
        plot_skip_map(tmp_path / "run/checkpoint-20", tmp_path / "map.png")
    (tmp_path / "other.json").write_text(json.dumps({"loss": 1.0}))
    with pytest.raises(ValueError, match=r"other\.json holds no search"):
        plot_skip_map(tmp_path / "other.json", tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"values='losses' is unknown\. Choose 'scores' or 'probabilities'"):
        plot_search_curve({}, tmp_path / "curve.png", values="losses")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install matplotlib"):
        plot_skip_map(make_record(FAMILIES["few"]), tmp_path / "map.png")
