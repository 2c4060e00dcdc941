"""The course of a run with `EASCallback`: phases, log, what evaluations and checkpoints see, settings refused."""

import json

import numpy as np
import pytest
import torch
from conftest import LAYERS, build_model
from safetensors.torch import load_file
from skippable import USELESS, Blocks, Points
from torch.nn.functional import mse_loss as mse
from training import ARGUMENTS, NAMES, SCHEDULE, Sentences, Watcher, make_model, make_trainer, refuse
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_eas import EASCallback, EASConfig
from peft_eas.runtime.adapter import RoutedAdapter
from peft_eas.search.check import NUM_BATCHES
from peft_eas.strategies import restored

# --- the course of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "sizes"), [("thompson", [0, 0, 1, 1, 1, 2, 2, 2] + 12 * [2]), ("bandit", 20 * [2])]
)
def test_a_run_samples_then_fixes_then_freezes(tmp_path, strategy, sizes):
    watcher = Watcher()
    trainer = make_trainer(tmp_path, EASCallback(strategy=strategy, **SCHEDULE), watcher=watcher)
    trainer.train()
    eas = trainer.model.base_model
    config = trainer.model.peft_config["default"]
    assert [len(names) for names in watcher.in_steps] == sizes
    assert len(set(watcher.in_steps[2:5])) > 1  # before any reward, the best set is always the same
    assert set(watcher.in_steps[12:]) == {tuple(eas.skipped_modules)}
    assert config.skipped_modules == eas.skipped_modules
    assert config.context == "running"
    log = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    phases = [log[step]["eas/phase"] for step in range(1, 21)]
    assert phases == ["warm-up"] * 3 + ["search"] * 8 + ["tune"] * 4 + ["frozen"] * 5


def test_rounds_compare_distinct_sets_at_their_steps(tmp_path):
    watcher = Watcher()
    make_trainer(tmp_path, EASCallback(**SCHEDULE, fit_tokens=0), watcher=watcher).train()  # its passes would be seen
    record = json.loads((tmp_path / "eas_search.json").read_text())
    assert [entry["step"] for entry in record["strategy"]["rounds"]] == [6, 8, 10, 12]
    assert all(1 < len(set(entry["sets"])) == len(entry["sets"]) for entry in record["strategy"]["rounds"])
    # No other evaluation ran: the model has seen exactly the sets of the rounds, and at the end what was chosen.
    drawn = [text for entry in record["strategy"]["rounds"] for text in entry["sets"]]
    seen = [tuple(NAMES[int(index)] for index in text.split()) for text in drawn]
    assert watcher.in_evaluation == seen + [(), tuple(record["skipped_modules"])] * NUM_BATCHES
    (measured,) = record["measured"]
    assert measured["num_skip"] == 2
    assert measured["deviation"] > 0.0
    assert record["curve"]["num_skip"] == [0, 1, 2, 3, 4]
    assert record["curve"]["increase"][0] == 0.0


def test_the_log_of_training_holds_the_search(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE))
    given = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            given.append(dict(logs))

    trainer.callback_handler.callbacks.insert(0, Report())  # where report_to puts its tools
    trainer.train()
    log = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert not {"eas/loss", "eas/expected_gain"} & set(log[1])
    assert log[12]["eas/expected_gain"] > 0.0
    assert log[12]["eas/reward"] == pytest.approx(torch.tensor(-log[12]["eas/loss"]).exp().item(), rel=0.2)
    assert log[12]["eas/best"] == ", ".join(trainer.model.base_model.skipped_modules)
    reported = [entry for entry in given if "loss" in entry]
    assert all("eas/expected_gain" in entry and "eas/best" not in entry for entry in reported[5:12])
    # Once the search is over, only the phase can change.
    assert all({name for name in log[step] if "eas/" in name} == {"eas/phase"} for step in range(13, 21))
    assert not any("eas/" in name for entry in reported[12:] for name in entry)


def test_the_search_is_logged_once_more_after_its_end(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), logging_steps=5)
    trainer.train()
    log = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert log[15]["eas/phase"] == "tune"
    assert log[15]["eas/best"] == ", ".join(trainer.model.base_model.skipped_modules)
    assert "eas/best" not in log[20]


def test_the_progress_bar_names_the_phase(tmp_path, capsys):
    make_trainer(tmp_path, EASCallback(**SCHEDULE)).train()
    shown = capsys.readouterr().err
    assert all(f"EAS {phase}" in shown for phase in ("warm-up", "search", "tune", "frozen"))


def test_the_set_is_constant_over_the_micro_batches_of_a_step(tmp_path):
    watcher = Watcher()
    trainer = make_trainer(
        tmp_path, EASCallback(**SCHEDULE), watcher=watcher, gradient_accumulation_steps=3, train_dataset=Sentences(300)
    )
    trainer.train()
    steps = [watcher.in_steps[i : i + 3] for i in range(0, 60, 3)]
    assert len(watcher.in_steps) == 60
    assert all(len(set(micro_batches)) == 1 for micro_batches in steps)


def test_fractions_and_epochs(tmp_path):
    """64 samples in batches of 4 make 16 steps an epoch: 32 in all, search to 16, warm-up to 8, freeze at 24."""
    callback = EASCallback(search_steps=0.5, warmup_steps=0.25, interval=4, freeze_context_at=0.75)
    trainer = make_trainer(tmp_path, callback, max_steps=-1, num_train_epochs=2)
    trainer.train()
    log = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    phases = [log[step]["eas/phase"] for step in range(1, 33)]
    assert phases == ["warm-up"] * 7 + ["search"] * 8 + ["tune"] * 8 + ["frozen"] * 9
    record = json.loads((tmp_path / "eas_search.json").read_text())
    assert [entry["step"] for entry in record["strategy"]["rounds"]] == [12, 16]


def test_an_ordinary_run_works_with_the_defaults(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(), max_steps=100)
    trainer.train()
    assert len(trainer.model.peft_config["default"].skipped_modules) == 2
    assert trainer.model.peft_config["default"].context == "running"


def test_the_adapter_keeps_the_scores(tmp_path):
    callback = EASCallback(**SCHEDULE)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    trainer.save_model(str(tmp_path))
    scores = EASConfig.from_pretrained(str(tmp_path)).scores
    assert list(scores.values()) == callback.record["strategy"]["scores"]
    skipped = trainer.model.base_model.skipped_modules
    assert min(scores.pop(name) for name in skipped) >= max(scores.values())


def test_given_modules_leave_nothing_to_search(tmp_path):
    model = make_model(num_skip=None, skipped_modules=[NAMES[1]])
    watcher = Watcher()
    trainer = make_trainer(tmp_path, EASCallback(fit_tokens=0), model, watcher, eval_dataset=None)
    trainer.train()
    assert set(watcher.in_steps) == {(NAMES[1],)}
    assert watcher.in_evaluation == []
    assert model.peft_config["default"].context == "running"
    assert not (tmp_path / "eas_search.json").exists()


@pytest.mark.parametrize("num_skip", [0, LAYERS])
def test_nothing_to_choose_needs_no_search(tmp_path, num_skip):
    model = make_model(num_skip=num_skip)
    watcher = Watcher()
    make_trainer(tmp_path, EASCallback(fit_tokens=0), model, watcher).train()
    assert set(watcher.in_steps) == {tuple(NAMES[:num_skip])}
    assert watcher.in_evaluation == []


def test_training_again_keeps_what_the_first_run_found(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE))
    trainer.train()
    found = trainer.model.base_model.skipped_modules
    trainer.train()
    assert trainer.model.base_model.skipped_modules == found


@pytest.mark.parametrize("step", [8, 14])
def test_a_run_stopped_within_a_step_leaves_no_contexts_annealed(tmp_path, step):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), gradient_accumulation_steps=2)
    trainer.add_callback(Stop())
    shares = []
    begin_step = trainer.model.base_model.begin_step
    trainer.model.base_model.begin_step = lambda names, share: begin_step(names, share) or shares.append(share)
    trainer.train()
    assert trainer.state.global_step == step
    assert shares[-1] > 0.3
    adapters = [module for module in trainer.model.modules() if isinstance(module, RoutedAdapter)]
    contexts = torch.rand(2, len(adapters[0].running_context))
    assert all(torch.equal(adapter.annealed(contexts), contexts) for adapter in adapters)


def test_a_run_stopped_early_ends_the_search(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE))
    trainer.add_callback(Stop())
    trainer.train()
    assert "stopped at step 8, before the search was over at step 12" in caplog.text
    assert len(trainer.model.peft_config["default"].skipped_modules) == 2


# --- evaluation and checkpoints ------------------------------------------------------------------------------------


def test_evaluation_and_checkpoints_see_the_best_set(tmp_path):
    watcher = Watcher()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 12}
    callback = EASCallback(**{**SCHEDULE, "freeze_context_at": None, "fit_tokens": 0})
    make_trainer(tmp_path, callback, watcher=watcher, per_device_eval_batch_size=20, **options).train()
    for step in range(1, 13):
        folder = tmp_path / f"checkpoint-{step}"
        state = json.loads((folder / "trainer_state.json").read_text())
        strategy = restored(state["stateful_callbacks"]["EASCallback"]["record"]["strategy"])
        assert watcher.at_save[step - 1] == tuple(strategy.best())
    # One batch holds the whole eval set: before the first round, each evaluation is one forward pass.
    assert watcher.in_evaluation[:5] == watcher.at_save[:5]
    assert watcher.in_evaluation[-1] == watcher.at_save[-1]


def test_checkpoints_after_the_search_hold_only_what_is_used(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), save_strategy="steps", save_steps=10)
    trainer.train()
    during, after = (load_file(tmp_path / f"checkpoint-{step}/adapter_model.safetensors") for step in (10, 20))
    kinds = {name: {key.split(".eas_")[1].split(".")[0] for key in after if name[:-9] in key} for name in NAMES}
    skipped = trainer.model.base_model.skipped_modules
    assert kinds == {name: {"pia", "output"} if name in skipped else {"input"} for name in NAMES}
    assert all({f"{name}.eas_input" in key for key in during} == {True, False} for name in NAMES)
    assert after.keys() < during.keys()


@pytest.mark.parametrize(("freeze_at", "final_from"), [(16, 16), (None, 12)])
def test_the_best_checkpoint_is_one_of_the_final_model(tmp_path, freeze_at, final_from):
    """Checkpoints of the search, and of the unfrozen context, are of another model, however good their loss."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".up." in name and name.endswith("bias"):
                        parameter.add_(0.02 * state.global_step)

    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    callback = EASCallback(**{**SCHEDULE, "freeze_context_at": freeze_at, "fit_tokens": 0})
    trainer = make_trainer(tmp_path, callback, load_best_model_at_end=True, **options)
    trainer.add_callback(Spoil())
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min((step for step in losses if step >= final_from), key=losses.get)
    assert min(losses, key=losses.get) < final_from
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best])


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "loss"}, "reward='loss' is unknown. Choose one of 'relative', 'exp'"),
        ({"search_steps": 0}, r"EASCallback\(search_steps=0\): .*integer of at least 1 .*fraction of the run"),
        ({"search_steps": 1.5}, "search_steps must be"),
        ({"search_steps": True}, "search_steps must be"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 0"),
        ({"freeze_context_at": 0.0}, r"EASCallback\(freeze_context_at=0\.0\)"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"num_candidates": 1}, "num_candidates must be an integer of at least 2"),
        ({"score_lr": 0.0}, r"score lr is 0\.0; it must be a finite number above 0"),
        ({"score_temperature": float("inf")}, "score temperature is inf"),
        ({"reward": None}, "reward=None is unknown"),
        ({"reward": ["exp"]}, r"reward=\['exp'\] is unknown. Choose one of"),
        ({"search_steps": None}, r"search_steps=None\): search_steps must be an integer of at least 1 .*or a float"),
        ({"search_steps": "0.3"}, r"search_steps='0\.3'\): search_steps must be"),
        ({"search_steps": float("nan")}, r"search_steps=nan\): search_steps must be"),
        ({"search_steps": -0.1}, "float above 0.0 to 1.0"),
        ({"warmup_steps": False}, r"warmup_steps=False\): warmup_steps must be an integer of at least 0"),
        ({"warmup_steps": 1.5}, "float from 0.0 to 1.0"),
        ({"freeze_context_at": "end"}, r"freeze_context_at='end'\): freeze_context_at must be"),
        ({"freeze_context_at": True}, r"freeze_context_at=True\): freeze_context_at must be"),
        ({"interval": True}, r"interval=True\): interval must be an integer of at least 1"),
        ({"interval": 2.0}, r"interval=2\.0\): interval must be"),
        ({"num_candidates": "3"}, r"num_candidates='3'\): num_candidates must be an integer of at least 2"),
        ({"num_candidates": None}, r"num_candidates=None\): num_candidates must be"),
        ({"score_lr": True}, "score lr is True; it must be a finite number above 0"),
        ({"score_lr": "1"}, "score lr is '1'"),
        ({"score_temperature": None}, "score temperature is None"),
        ({"seed": "x"}, r"seed='x'\): seed must be an integer, or None"),
        ({"seed": 1.5}, r"seed=1\.5\): seed must be an integer"),
        ({"seed": True}, r"seed=True\): seed must be an integer"),
        ({"reward_dataset": 3}, r"reward_dataset=3\): reward_dataset must be one dataset, such as Trainer takes"),
        ({"reward_dataset": "eval"}, r"reward_dataset='eval'\): reward_dataset must be one dataset"),
        ({"reward_dataset": {"a": []}}, r"reward_dataset=\{'a': \[\]\}\): reward_dataset must be one dataset"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EASCallback(**change)


def test_numbers_of_numpy_are_taken_as_pythons_own():
    changes = {
        "search_steps": np.int64(8),
        "warmup_steps": np.float32(0.25),
        "seed": np.uint8(3),
        "score_lr": np.int8(1),
    }
    saved = EASCallback(**changes).state()["args"]
    assert json.dumps({name: saved[name] for name in changes}) == json.dumps(
        {"search_steps": 8, "warmup_steps": 0.25, "seed": 3, "score_lr": 1}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search_steps": 30}, r"ends at step 30 \(search_steps=30\).*does not fit into a run of 20 steps"),
        ({"interval": 10}, r"has no rewards\. Set interval=4\.$"),
        ({"freeze_context_at": 0.3}, r"freeze_context_at=0\.3 is step 6, before the search is over at step 12"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_training(tmp_path, change, message):
    refuse(make_trainer(tmp_path, EASCallback(**{**SCHEDULE, **change})), message)


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_labels_kept_from_the_model_are_refused_with_the_prompt_as_context(tmp_path, option):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    value = 0.1 if option == "label_smoothing_factor" else loss_of
    message = f"With {option}.*cannot tell the prompt from the answer.*context='running'"
    refuse(make_trainer(tmp_path, EASCallback(**SCHEDULE), **{option: value}), message)
    for context in ("running", "none"):
        trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), make_model(context=context), **{option: value})
        trainer.train()
        assert len(trainer.model.base_model.skipped_modules) == 2


def test_a_model_of_another_method_under_trainer(tmp_path):
    """The search drives whatever is `Skippable`, and asks it nothing of prompts, whatever the losses are made of."""
    model = Blocks(context="prompt")
    callback = EASCallback(search_steps=16, warmup_steps=0, interval=1, freeze_context_at=18)
    arguments = {"learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 10}
    args = TrainingArguments(str(tmp_path), **{**ARGUMENTS, **arguments})
    data = {"train_dataset": Points(), "eval_dataset": Points(16, seed=1)}
    trainer = Trainer(
        model, args, callbacks=[callback], compute_loss_func=lambda o, y, **k: mse(o["logits"], y), **data
    )
    trainer.train()
    assert model.skipped_modules == USELESS
    assert list(model.blocks) == ["0", "2", "4"]
    assert json.loads((tmp_path / "eas_search.json").read_text())["skipped_modules"] == USELESS
    assert model.calls.count("sync") == 20
    assert model.calls.count("freeze") == 1
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [log[0]["eas/phase"], log[15]["eas/phase"]] == ["search", "tune"]
    assert log[15]["eas/loss"] >= 0


def test_a_model_without_eas_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"LlamaForCausalLM without EAS adapters\. Pass Trainer the model"):
        make_trainer(tmp_path, EASCallback(**SCHEDULE), build_model("llama"))
