"""An interrupted search, resumed, ends with the same skip set and weights as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build_model
from peft import get_peft_model
from safetensors.torch import load_file
from training import NAMES, SCHEDULE, Sentences, Watcher, assert_equal, make_trainer, refuse, weights
from transformers import TrainerCallback

from peft_eas import EASCallback, EASConfig, EASSearch
from peft_eas.runtime.adapter import RoutedAdapter


@pytest.mark.parametrize("step", [3, 8, 9, 12, 14, 18])
def test_resumed_from_any_phase_it_ends_bit_equal(tmp_path, step):
    whole = make_trainer(tmp_path, EASCallback(**SCHEDULE), save_strategy="steps", save_steps=1)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    resumed = make_trainer(tmp_path / "resumed", EASCallback(**SCHEDULE))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.model.base_model.skipped_modules == whole.model.base_model.skipped_modules
    assert_equal(weights(resumed.model), weights(whole.model))
    assert resumed.model.peft_config["default"].scores == whole.model.peft_config["default"].scores is not None
    steps = range(step + 1, 21)
    logs = [{e["step"]: e for e in trainer.state.log_history if "loss" in e} for trainer in (whole, resumed)]
    for number in steps:
        assert logs[1][number]["loss"] == logs[0][number]["loss"]
        of_search = [{name: log[number][name] for name in log[number] if "eas/" in name} for log in logs]
        assert of_search[1] == of_search[0]
        assert ("eas/expected_gain" in of_search[0]) == (6 <= number <= 12)


def test_resumes_with_trainers_own_restoring_of_callbacks(tmp_path):
    whole = make_trainer(tmp_path, EASCallback(**SCHEDULE), save_strategy="steps", save_steps=8)
    whole.train()
    resumed = make_trainer(tmp_path / "b", EASCallback(**SCHEDULE), restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal(weights(resumed.model), weights(whole.model))


def test_same_seed_same_result_and_other_seed_other_sets(tmp_path):
    runs = []
    for number, seed in enumerate((5, 5, 6)):
        watcher = Watcher()
        trainer = make_trainer(tmp_path / str(number), EASCallback(**SCHEDULE, seed=seed), watcher=watcher)
        trainer.train()
        runs.append((watcher.in_steps, weights(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1])
    assert runs[2][0] != runs[0][0]


def run_script(*arguments: str | Path) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("training.py")), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_in_the_middle_of_the_search_and_resumed_it_ends_bit_equal(tmp_path):
    script = run_script(tmp_path / "killed", "slow")
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/checkpoint-8/trainer_state.json").exists():
        assert script.poll() is None, script.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(signal.SIGKILL)
    assert script.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/eas_search.json").exists()
    for folder in ("killed", "whole"):
        script = run_script(tmp_path / folder)
        output = script.communicate()[0]
        assert script.returncode == 0, output
        assert ("resumed" in output) == (folder == "killed")
    killed, whole = (tmp_path / folder for folder in ("killed", "whole"))
    assert_equal(load_file(killed / "adapter_model.safetensors"), load_file(whole / "adapter_model.safetensors"))
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (killed, whole)]
    assert configs[0] == configs[1]
    assert len(configs[0]["skipped_modules"]) == 2
    assert (killed / "eas_search.json").read_text() == (whole / "eas_search.json").read_text()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), save_strategy="steps", save_steps=8)
    trainer.train()
    checkpoint = str(tmp_path / "checkpoint-8")
    folder = tmp_path / "again"
    other_data = make_trainer(folder, EASCallback(**SCHEDULE, reward_dataset=Sentences(size=8)))
    refuse(
        other_data,
        "was rewarded on the eval set, but this run offers the reward_dataset",
        resume_from_checkpoint=checkpoint,
    )

    state = json.loads((tmp_path / "checkpoint-8/trainer_state.json").read_text())
    del state["stateful_callbacks"]["EASCallback"]
    (tmp_path / "checkpoint-8/trainer_state.json").write_text(json.dumps(state))
    without = make_trainer(folder, EASCallback(**SCHEDULE))
    refuse(without, "checkpoint of step 8 holds no search to resume", resume_from_checkpoint=checkpoint)


# --- another length of the run ---------------------------------------------------------------------------------------

# Fractions of the run: of 40 steps, warm-up to 4, rounds at 6, 8, 10, 12, the set fixed and the context frozen at 12.
FRACTIONS = {"search_steps": 0.3, "warmup_steps": 0.1, "interval": 2}


class Course(TrainerCallback):
    """Notes after each step whether the context is frozen, and during each what share of it is the running mean."""

    def __init__(self) -> None:
        self.frozen: dict[int, bool] = {}
        self.shares: dict[int, float] = {}
        self.skipped: dict[int, tuple[str, ...]] = {}

    def on_substep_end(self, args, state, control, model, **kwargs) -> None:
        adapters = (module for module in model.modules() if isinstance(module, RoutedAdapter))
        annealed = (adapter._annealed_to for adapter in adapters if adapter._annealed_to is not None)
        self.shares[state.global_step] = max((float(share) for _, share in annealed), default=0.0)
        self.skipped[state.global_step] = tuple(model.base_model.skipped_modules)

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.frozen[state.global_step] = model.peft_config["default"].context == "running"


def run_course(folder, steps, settings, resume=None, family="llama", save=False, **config):
    """A run of `steps`, maybe with a checkpoint every two, or resumed from `resume`; its trainer and its course."""
    torch.manual_seed(1)
    defaults = {"task_type": "CAUSAL_LM", "num_skip": 2, "r": 8, "attention_r": 4}
    model = get_peft_model(build_model(family), EASConfig(**{**defaults, **config}))
    course = Course()
    options = {"max_steps": steps, "gradient_accumulation_steps": 2, "train_dataset": Sentences(size=32)}
    if save:
        options |= {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(folder, EASCallback(**settings), model, **options)
    trainer.add_callback(course)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, course


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("steps", [24, 40, 60])  # a shorter run, the same, a longer one
def test_a_frozen_context_stays_frozen_whatever_the_runs_length(family, steps, tmp_path):
    first, course = run_course(tmp_path, 40, FRACTIONS, family=family, save=True)
    assert [step for step, frozen in course.frozen.items() if frozen] == list(range(12, 41))
    folder = tmp_path / "resumed"
    resumed, course = run_course(folder, steps, FRACTIONS, tmp_path / "checkpoint-14", family, save=True)
    assert course.frozen == dict.fromkeys(range(15, steps + 1), True)
    config = json.loads((folder / "checkpoint-20/adapter_config.json").read_text())
    assert (config["context"], config["context_recorded"]) == ("running", True)
    assert config["skipped_modules"] == first.model.peft_config["default"].skipped_modules
    of_checkpoint = load_file(tmp_path / "checkpoint-14/adapter_model.safetensors")
    ended = load_file(folder / "checkpoint-20/adapter_model.safetensors")
    contexts = [name for name in ended if name.endswith("running_context")]
    assert len(contexts) == 4
    assert all(torch.equal(ended[name], of_checkpoint[name]) for name in contexts)
    if steps == 40:
        assert_equal(weights(resumed.model), weights(first.model))
    # And once more, from a checkpoint that was itself written after a resumption.
    _, course = run_course(tmp_path / "again", 64, FRACTIONS, folder / "checkpoint-20", family)
    assert set(course.frozen.values()) == {True}


def test_so_it_does_where_there_is_nothing_to_search(tmp_path):
    options = {"skipped_modules": [NAMES[1]], "num_skip": None}
    run_course(tmp_path, 40, FRACTIONS, save=True, **options)
    _, course = run_course(tmp_path / "resumed", 60, FRACTIONS, tmp_path / "checkpoint-14", **options)
    assert course.frozen == dict.fromkeys(range(15, 61), True)


@pytest.mark.parametrize("options", [{}, {"skipped_modules": [NAMES[1]], "num_skip": None}, {"num_skip": 0}])
def test_the_share_of_the_running_mean_never_falls(options, tmp_path):
    """From 4 on it grows to 1 at 30 of 40 steps; resumed at 20 for 100 steps it grows on, to 1 at 75."""
    settings = {**FRACTIONS, "freeze_context_at": 0.75}
    _, first = run_course(tmp_path, 40, settings, save=True, **options)
    assert first.shares[19] == pytest.approx(15 / 26)
    folder = tmp_path / "resumed"
    resumed, course = run_course(folder, 100, settings, tmp_path / "checkpoint-20", save=True, **options)
    shares = [course.shares[step] for step in range(20, 75)]
    assert shares[0] == pytest.approx(16 / 26)
    assert shares == pytest.approx([16 / 26 + 10 / 26 * (step - 20) / 55 for step in range(20, 75)])
    assert [step for step, frozen in course.frozen.items() if frozen] == list(range(75, 101))
    # Resumed once more for the same 100 steps it goes on as if nothing had happened.
    again, once_more = run_course(tmp_path / "again", 100, settings, folder / "checkpoint-30", **options)
    assert once_more.shares == {step: share for step, share in course.shares.items() if step >= 30}
    assert_equal(weights(again.model), weights(resumed.model))


def test_a_search_that_goes_on_takes_the_new_length(tmp_path):
    """What is not over yet follows the settings: 30 % of 100 steps. The warm-up does not begin anew."""
    run_course(tmp_path, 40, FRACTIONS, save=True)
    resumed, course = run_course(tmp_path / "resumed", 100, FRACTIONS, tmp_path / "checkpoint-8")
    assert [step for step, frozen in course.frozen.items() if frozen] == list(range(30, 101))
    assert course.shares[8] == pytest.approx(0.5)
    rounds = resumed.callback_handler.callbacks[0].record["strategy"]["rounds"]
    assert [one["step"] for one in rounds] == list(range(6, 31, 2))


def test_frozen_by_hand_it_stays_so(tmp_path):
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs) -> None:
            if state.global_step == 6:
                model.freeze_context()

    settings = {**FRACTIONS, "freeze_context_at": None, "fit_tokens": 0}  # with which step 6 has seen all contexts
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 8}
    trainer = make_trainer(tmp_path, EASCallback(**settings), **options)
    trainer.add_callback(Freeze())
    trainer.train()
    _, course = run_course(tmp_path / "resumed", 60, settings, tmp_path / "checkpoint-8")
    assert set(course.frozen.values()) == {True}


def test_checkpoints_of_earlier_versions_are_resumed(tmp_path):
    """They have no `course`. The log tells whether the context was frozen, and else the schedule does."""
    whole, _ = run_course(tmp_path, 40, FRACTIONS, save=True)
    for step, steps in ((8, 40), (14, 40), (14, 60)):
        folder = tmp_path / f"checkpoint-{step}"
        state = json.loads((folder / "trainer_state.json").read_text())
        state["stateful_callbacks"]["EASCallback"].pop("course", None)
        (folder / "trainer_state.json").write_text(json.dumps(state))
        resumed, course = run_course(tmp_path / "resumed", steps, FRACTIONS, folder)
        assert [n for n, frozen in course.frozen.items() if frozen] == list(range(max(12, step + 1), steps + 1))
        if steps == 40:
            assert_equal(weights(resumed.model), weights(whole.model))


def test_a_loop_of_ones_own_is_resumed_with_another_length():
    def search_for(steps: int, **options) -> EASSearch:
        model = get_peft_model(build_model("llama"), EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4))
        return EASSearch(
            model.train(), steps, lambda batch: torch.tensor(1.0 + batch), **{**FRACTIONS, "interval": 4}, **options
        )

    first = search_for(40)
    ids = Sentences(size=1).ids
    for _ in range(14):
        first.before_step()
        first.model(input_ids=ids, labels=ids.masked_fill(torch.arange(10) < 6, -100))
        first.after_step()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["schedule"]["search_end"] == state["schedule"]["freeze_step"] == 12
    longer = search_for(200)
    longer.load_state_dict(state)
    assert longer.phase == "frozen"
    assert longer.state_dict() == state
    with pytest.raises(ValueError, match="does not fit into a run of 15 steps"):
        search_for(15)
    shorter = search_for(15, state=state)
    assert (shorter.phase, shorter.step) == ("frozen", 14)
    assert shorter.state_dict() == state
    assert shorter.eas.active_config.context_recorded
