"""What the search is rewarded on, that rewards are the model's own losses, and that they leave training alone."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from training import NAMES, SCHEDULE, Sentences, Watcher, assert_equal, make_model, make_trainer, refuse, weights

from peft_eas import EASCallback
from peft_eas.search.check import NUM_BATCHES
from peft_eas.search.rewards import hold_back


def test_rewards_are_the_losses_of_the_sets_on_one_batch(tmp_path):
    """What a round has written down is what the model says when it is asked again, set by set."""
    captured = {}

    class Ask(EASCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 6:
                captured.update({name: value.clone() for name, value in model.state_dict().items()})
            super().on_step_end(args, state, control, model, **kwargs)

    trainer = make_trainer(tmp_path, Ask(**SCHEDULE))
    trainer.train()
    first = json.loads((tmp_path / "eas_search.json").read_text())["strategy"]["rounds"][0]
    model = make_model().eval()
    model.load_state_dict(captured)
    model.anneal_context(2 / 12)  # at step 6, of the way from the warm-up's end, 4, to the freeze, 16
    samples = trainer.eval_dataset
    losses = []
    for text in first["sets"]:
        model.base_model.set_skipped_modules([NAMES[int(index)] for index in text.split()])
        with torch.no_grad():
            losses.append([model(**{k: v[None] for k, v in samples[i].items()}).loss.item() for i in range(20)])
    # The batch's four samples are not known here, but they are the same for all three sets.
    differences = torch.tensor(losses)
    order = torch.combinations(torch.arange(20), 4)
    means = differences[:, order].mean(-1)
    assert (means.T - torch.tensor(first["losses"])).abs().max(dim=1).values.min() < 1e-5


@pytest.mark.parametrize("shuffle_seed", [0, 1])
def test_each_round_has_a_batch_of_its_own_until_all_were_used(tmp_path, shuffle_seed):
    rewards = Sentences(size=12, seed=1)
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE, reward_dataset=rewards, seed=shuffle_seed))
    trainer.train()
    rounds = [sorted(rewards.seen[i : i + 4]) for i in range(0, len(rewards.seen), 4)]
    assert len(rounds) == 5 + 3  # one to look for labels, four rounds, and those that check the choice
    assert sorted([*rounds[1], *rounds[2], *rounds[3]]) == list(range(12))
    assert rounds[4] == rounds[1]


class Eavesdropper(EASCallback):
    """Compares what rewards must not touch before and after each step's end."""

    def on_step_end(self, args, state, control, model, **kwargs):
        before = self.look(model)
        rounds = len(self.record["strategy"]["rounds"])
        fixed = self.record["skipped_modules"]
        super().on_step_end(args, state, control, model, **kwargs)
        if len(self.record["strategy"]["rounds"]) > rounds and self.record["skipped_modules"] == fixed:
            after = self.look(model)
            assert_equal(after["weights"], before["weights"])
            assert after["random"] == before["random"]
            assert after["training"] == before["training"] is True
            assert after["grads"] == before["grads"]
            type(self).compared += 1

    compared = 0

    @staticmethod
    def look(model):
        return {
            "weights": weights(model),  # the running contexts among them
            "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
            "training": model.training,
            "grads": [None if p.grad is None else p.grad.sum().item() for p in model.parameters()],
        }


def test_rewards_do_not_disturb_training(tmp_path):
    Eavesdropper.compared = 0
    make_trainer(tmp_path, Eavesdropper(**SCHEDULE)).train()
    assert Eavesdropper.compared == 3


def test_training_is_the_same_whatever_is_random_in_the_reward_set(tmp_path):
    """A round's samples may draw random numbers of any kind; training goes on as without."""

    class Noisy(Sentences):
        def __getitem__(self, index):
            torch.rand(1), random.random(), np.random.rand()
            return super().__getitem__(index)

    final = []
    for number, rewards in enumerate((Sentences(size=8, seed=1), Noisy(size=8, seed=1))):
        trainer = make_trainer(tmp_path / str(number), EASCallback(**SCHEDULE, reward_dataset=rewards))
        trainer.train()
        final.append(weights(trainer.model))
    assert_equal(*final)


def test_rewards_are_computed_under_the_runs_mixed_precision(tmp_path):
    dtypes = {True: set(), False: set()}
    model = make_model()
    model.base_model.model.model.layers[3].mlp.base_layer.register_forward_hook(
        lambda module, args, output: dtypes[module.training].add(output.dtype)
    )
    make_trainer(tmp_path, EASCallback(**SCHEDULE), model, bf16=True).train()
    assert dtypes == {True: {torch.bfloat16}, False: {torch.bfloat16}}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    final = []
    for checkpointing in (False, True):
        model = make_model(dropout=0.0)
        model.enable_input_require_grads()
        trainer = make_trainer(
            tmp_path / str(checkpointing), EASCallback(**SCHEDULE), model, gradient_checkpointing=checkpointing
        )
        trainer.train()
        final.append((model.base_model.skipped_modules, weights(model)))
    assert final[0][0] == final[1][0]
    assert final[0][1].keys() == final[1][1].keys()
    for name, value in final[0][1].items():
        torch.testing.assert_close(final[1][1][name], value)


def test_the_eval_set_is_used_when_no_other_is_given(tmp_path):
    evaluation, other = Sentences(size=20, seed=1), Sentences(size=20, seed=2)
    batches = 4 * (5 + NUM_BATCHES)
    make_trainer(tmp_path / "a", EASCallback(**SCHEDULE), eval_dataset=evaluation).train()
    assert len(evaluation.seen) == batches
    make_trainer(tmp_path / "b", EASCallback(**SCHEDULE), eval_dataset={"first": evaluation, "second": other}).train()
    assert len(evaluation.seen) == 2 * batches
    make_trainer(tmp_path / "c", EASCallback(**SCHEDULE, reward_dataset=other), eval_dataset=evaluation).train()
    assert len(evaluation.seen) == 2 * batches
    assert len(other.seen) == batches


def test_without_an_eval_set_a_slice_of_the_training_set_is_held_back(tmp_path, caplog):
    training = Sentences(size=100)
    callback = EASCallback(**SCHEDULE)
    trainer = make_trainer(tmp_path, callback, train_dataset=training, eval_dataset=None)
    assert "5 of the 100 training samples are held back" in caplog.text
    assert len(trainer.train_dataset) == 95
    trainer.train()
    record = json.loads((tmp_path / "eas_search.json").read_text())
    assert record["reward_source"] == "held-back part of the training set"
    rest, held = hold_back(list(range(100)), seed=0)
    assert sorted([*rest, *held]) == list(range(100))
    trained_on = [trainer.train_dataset[i]["input_ids"] for i in range(95)]
    rewarded_on = training.ids[[held[i] for i in range(5)]]
    assert not any((ids == rewarded_on).all(1).any() for ids in trained_on)


def test_a_dataset_with_select_keeps_its_kind():
    class Columns(list):
        def select(self, indices):
            return Columns(self[i] for i in indices)

    rest, held = hold_back(Columns(range(40)), seed=3)
    assert (type(rest), type(held)) == (Columns, Columns)
    assert (len(rest), len(held)) == (38, 2)


def test_added_later_the_callback_says_that_rewards_are_on_training_data(tmp_path, caplog):
    trainer = make_trainer(tmp_path, Watcher(), eval_dataset=None)
    trainer.add_callback(EASCallback(**SCHEDULE))
    trainer.train()
    assert "training samples that are trained on as well" in caplog.text
    assert len(trainer.model.base_model.skipped_modules) == 2


def test_a_stream_may_be_the_reward_set(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return (Sentences(size=8, seed=1)[i] for i in range(8))

    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE, reward_dataset=Stream()))
    trainer.train()
    assert len(trainer.model.base_model.skipped_modules) == 2


def test_nan_rewards_are_warned_about_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE, reward_dataset=Sentences(size=8, nan=True)))
    with pytest.warns(UserWarning, match="left out 3 of 3 skip sets"):
        trainer.train()
    record = json.loads((tmp_path / "eas_search.json").read_text())
    assert record["strategy"]["num_nonfinite"] == sum(len(entry["sets"]) for entry in record["strategy"]["rounds"]) > 8
    assert all(map(math.isfinite, record["strategy"]["scores"]))  # learnt from training losses
    assert record["measured"] == []


def test_an_empty_reward_set_is_refused_before_training(tmp_path):
    empty = Sentences(size=0)
    message = r"nothing to compute rewards on: the {} is empty. Pass EASCallback\(reward_dataset"
    refuse(make_trainer(tmp_path, EASCallback(**SCHEDULE, reward_dataset=empty)), message.format("reward_dataset"))
    refuse(make_trainer(tmp_path, EASCallback(**SCHEDULE), eval_dataset=empty), message.format("eval set"))


def test_a_training_stream_without_a_reward_set_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return (Sentences(size=8)[i % 8] for i in range(1000))

    trainer = make_trainer(tmp_path, EASCallback(**SCHEDULE), train_dataset=Stream(), eval_dataset=None)
    refuse(trainer, "no slice can be held back from a training set that is a stream")


def test_a_reward_set_without_labels_is_refused_before_training(tmp_path):
    class Unlabelled(Sentences):
        def __getitem__(self, index):
            return {"input_ids": self.ids[index]}

    callback = EASCallback(**SCHEDULE, reward_dataset=Unlabelled())
    refuse(
        make_trainer(tmp_path, callback),
        r"reward_dataset gives no loss.*\['input_ids'\].*label_names are \['labels'\]",
    )
