"""The pictures of a search: drawn from everything a run leaves behind, legible for few and for many attentions."""

import json
import sys

import pytest
from training import NAMES, SCHEDULE, make_model, make_trainer

from peft_eas import EASCallback
from peft_eas.strategies.bandit import AttentionBandit

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from peft_eas.reporting.plots import KEPT, SKIPPED, draw_skip_map, plot_search_curve, plot_skip_map  # noqa: E402

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
@pytest.mark.parametrize("plot", [plot_skip_map, plot_search_curve])
def test_nothing_is_cut_off_or_drawn_over(tmp_path, drawn, plot, names):
    path = plot(make_record(names), tmp_path / "new" / "picture.png")
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
