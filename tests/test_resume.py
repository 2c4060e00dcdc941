"""An interrupted search, resumed, ends with the same skip set and weights as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training import SCHEDULE, Sentences, Watcher, assert_equal, make_trainer, refuse, weights

from peft_eas import EASCallback


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
        assert ("eas/entropy" in of_search[0]) == (number <= 12)


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
