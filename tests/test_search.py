"""The search in a loop without Trainer: as under Trainer, resumed to the bit, and what is refused."""

import copy
import inspect
import json

import pytest
import torch
from conftest import LAYERS, build_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from skippable import USELESS, Blocks, Points
from torch import nn
from training import NAMES, SCHEDULE, Sentences, Watcher, assert_equal, make_model, make_trainer, weights

from peft_eas import EASCallback, EASModel, EASSearch, Skippable
from peft_eas.layers import FFNLayer
from peft_eas.runtime.adapter import RoutedAdapter
from peft_eas.search.check import NUM_BATCHES
from peft_eas.search.schedule import SETTINGS
from peft_eas.skippable import eas_of

STEPS = 20


def make_batches(data: Sentences, order: list[int] | range) -> list[dict[str, torch.Tensor]]:
    """Batches of four."""
    groups = [order[i : i + 4] for i in range(0, len(order), 4)]
    return [{key: torch.stack([data[i][key] for i in group]) for key in data[0]} for group in groups]


TRAINING = make_batches(Sentences(size=4 * STEPS), range(4 * STEPS))
HELD_OUT = make_batches(Sentences(size=12, seed=1), range(12))


class Run:
    """Model, optimizer and search of a loop by hand."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        self.model = make_model(**options.pop("model", {})).train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        self.search = EASSearch(self.model, STEPS, self.loss, HELD_OUT, **{**SCHEDULE, **options})
        self.skipped: list[tuple[str, ...]] = []

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.model(**batch).loss

    def train(self, batches: list[dict[str, torch.Tensor]] = TRAINING) -> "Run":
        for batch in batches:
            self.search.before_step()
            self.skipped.append(tuple(self.model.base_model.skipped_modules))
            loss = self.loss(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.search.after_step(loss)
        return self

    def state(self) -> dict:
        return {
            "search": json.loads(json.dumps(self.search.state_dict())),
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict) -> "Run":
        self.search.load_state_dict(state["search"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        return self


def test_without_a_context_there_is_nothing_to_freeze() -> None:
    options = {"context": "none", "dropout": 0.0}
    run = Run(model=options).train(TRAINING[:18])  # beyond the freeze
    again = Run(model=options).load(copy.deepcopy(run.state()))
    for one in (run, again):
        one.train(TRAINING[18:])
        assert one.search.phase == "tune"
        assert one.model.peft_config["default"].context == "none"
    assert_equal(weights(again.model), weights(run.model))


class LikeTrainer(Run):
    """Trainer divides the sum of a step's losses by their number, which rounds unlike their mean."""

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        number = {"num_items_in_batch": (batch["labels"] != -100).sum()} if self.model.training else {}
        return self.model(**batch, **number).loss


def test_it_is_what_the_callback_does_under_trainer(tmp_path) -> None:
    """On the same batches the same sets are drawn, with the same losses, and the weights end equal to the bit."""
    training, evaluation, watcher = Sentences(), Sentences(size=12, seed=1), Watcher()
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch"}
    callback = EASCallback(**SCHEDULE, reward_dataset=evaluation, fit_tokens=0)
    trainer = make_trainer(
        tmp_path, callback, make_model(dropout=0.0), watcher, train_dataset=training, eval_dataset=None, **plain
    )
    trainer.train()
    run = LikeTrainer(model={"dropout": 0.0})
    # The first was only looked at for labels.
    run.search.held_out.batches = make_batches(evaluation, evaluation.seen[4:])
    run.train(make_batches(training, training.seen[: 4 * STEPS]))
    assert run.skipped == watcher.in_steps
    assert run.search.state_dict()["strategy"] == callback.record["strategy"]
    assert_equal(weights(run.model), weights(trainer.model))


@pytest.mark.parametrize("step", [3, 8, 12, 14, 18])
def test_resumed_from_any_phase_it_ends_bit_equal(tmp_path, step) -> None:
    whole = Run().train(TRAINING[:step])
    torch.save(whole.state(), tmp_path / "state.pt")
    whole.train(TRAINING[step:])
    resumed = Run(seed=7).load(torch.load(tmp_path / "state.pt")).train(TRAINING[step:])
    assert resumed.skipped == whole.skipped[step:]
    assert resumed.search.state_dict() == whole.search.state_dict()
    assert_equal(weights(resumed.model), weights(whole.model))
    configs = [run.model.peft_config["default"] for run in (resumed, whole)]
    assert configs[0].scores == configs[1].scores is not None
    assert configs[0].context == configs[1].context == "running"


def test_dropped_parameters_leave_the_optimizer_that_is_given(tmp_path) -> None:
    whole = Run()
    whole.search.optimizer = whole.optimizer
    whole.train(TRAINING[:14])
    torch.save(whole.state(), tmp_path / "state.pt")
    trained = [parameter for parameter in whole.model.parameters() if parameter.requires_grad]
    (group,) = whole.optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in trained}
    assert {id(parameter) for parameter in whole.optimizer.state} <= {id(parameter) for parameter in trained}
    whole.train(TRAINING[14:])
    found = whole.model.base_model.skipped_modules
    # A model that has only the adapters that the search has found a use for serves as well.
    for options in ({}, {"num_skip": None, "skipped_modules": found}):
        resumed = Run(model=options)
        resumed.search.optimizer = resumed.optimizer
        resumed.load(torch.load(tmp_path / "state.pt")).train(TRAINING[14:])
        assert_equal(weights(resumed.model), weights(whole.model))


def test_a_run_goes_through_its_phases_and_tells_of_them() -> None:
    run, phases, figures = Run(), [], []
    for batch in TRAINING:
        run.train([batch])
        phases.append(run.search.phase)
        figures.append(run.search.figures())
    assert phases == ["warm-up"] * 3 + ["search"] * 8 + ["tune"] * 4 + ["frozen"] * 5
    assert [entry["eas/phase"] for entry in figures] == phases
    assert not {"eas/loss", "eas/expected_gain"} & set(figures[4])
    assert figures[5]["eas/expected_gain"] > 0.0
    assert figures[5]["eas/loss"] == pytest.approx(-torch.tensor(figures[5]["eas/reward"]).log().item(), abs=0.1)
    assert figures[-1]["eas/best"] == ", ".join(run.model.base_model.skipped_modules)
    assert [record["step"] for record in run.search.strategy.rounds] == [6, 8, 10, 12]


def test_between_steps_the_best_set_is_skipped() -> None:
    run = Run()
    for batch in TRAINING[:12]:
        run.train([batch])
        assert run.model.base_model.skipped_modules == run.search.strategy.best()
    assert len(set(run.skipped)) > 1


def test_a_copy_made_within_a_step_ends_its_own() -> None:
    model = begin_step().model
    copied = copy.deepcopy(model)
    copied.base_model.end_step()
    assert by_prompts(copied)
    assert not by_prompts(model)


def test_micro_batches_of_a_step_share_its_set() -> None:
    run, sets = Run(), []
    for number, batch in enumerate(TRAINING):
        run.search.before_step()
        sets.append(tuple(run.model.base_model.skipped_modules))
        run.loss(batch).backward()
        if number % 2:
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.search.after_step()
    assert sets[::2] == sets[1::2]
    assert len(set(sets)) > 1
    assert run.search.step == STEPS // 2


def test_the_running_context_takes_ever_more_of_the_prompts_place() -> None:
    """In training from the warm-up's end (4) to the freeze (16), in rewards as far as that is; nowhere else."""
    run = Run()
    calls = shares_of(run.model.base_model)
    shares: dict[bool, list[float]] = {True: [], False: []}
    run.model.register_forward_pre_hook(lambda module, args: shares[module.training].append([0.0, *calls][-1]))
    for batch in TRAINING:
        run.train([batch])
        assert by_prompts(run.model)
        calls.clear()
    assert shares[True] == pytest.approx([0.0] * 5 + [step / 12 for step in range(1, 12)] + [0.0] * 4)
    rewards, check = shares[False][:-6], shares[False][-6:]
    sizes = [len(entry["sets"]) for entry in run.search.strategy.rounds]
    shares_of_rounds = zip((2 / 12, 4 / 12, 6 / 12, 8 / 12), sizes, strict=True)
    assert rewards == pytest.approx([share for share, size in shares_of_rounds for _ in range(size)])
    assert len(HELD_OUT) < NUM_BATCHES  # each is of use once
    assert check == pytest.approx([8 / 12] * 2 * len(HELD_OUT))


def test_with_a_fixed_set_the_context_is_annealed_too() -> None:
    """From the start where it is frozen before rewards would have begun; a freeze beyond the run is refused."""
    search = EASSearch(make_model(num_skip=None, skipped_modules=[NAMES[1]]), 10, warmup_steps=0.5)
    shares = shares_of(search.eas)
    for _ in range(4):
        search.before_step()
        search.model.train()(**TRAINING[0])
        search.after_step()
        assert by_prompts(search.model)
    assert shares == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert search.phase == "frozen"
    with pytest.raises(ValueError, match=r"'search_end' is step 100 \(search_steps=100\), beyond a run of 10 steps"):
        EASSearch(make_model(num_skip=None, skipped_modules=[NAMES[1]]), 10, search_steps=100)


def test_without_a_freeze_the_context_stays_the_prompt() -> None:
    run = Run(freeze_context_at=None)
    shares = shares_of(run.model.base_model)
    assert run.train().search.phase == "tune"
    assert set(shares) == {0.0}
    assert run.model.peft_config["default"].context == "prompt"


def test_the_context_is_frozen_when_the_search_ends() -> None:
    settings = {**SCHEDULE, "freeze_context_at": "search_end"}
    run = Run(**settings).train(TRAINING[:11])
    assert run.search.phase == "search"
    run.train(TRAINING[11:12])
    assert run.search.phase == "frozen"


def test_rewards_leave_everything_as_it_was() -> None:
    seen = []

    def loss(number: int) -> float:
        seen.append((number, run.model.training, torch.is_grad_enabled(), frozen.training))
        torch.rand(1)
        return run.loss(HELD_OUT[number]).item()

    run = Run()
    run.search.held_out.batch_loss, run.search.held_out.batches = loss, None
    frozen = run.model.base_model.model.model.layers[0].input_layernorm.eval()
    run.train(TRAINING[:5])
    before = run.state()
    contexts = {name: value.clone() for name, value in run.model.named_buffers()}
    run.search.before_step()
    run.search.after_step()
    assert seen == [(0, False, False, False)] * 3
    assert run.model.training
    assert not frozen.training
    assert all(
        module.training for module in run.model.modules() if module is not frozen and module not in [*frozen.modules()]
    )
    assert torch.equal(torch.get_rng_state(), before["random"])
    assert_equal(dict(run.model.named_buffers()), contexts)


def test_modes_come_back_after_an_error() -> None:
    def fail(batch):
        raise RuntimeError("out of memory")

    run = Run()
    run.train(TRAINING[:5])
    run.search.held_out.batch_loss = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train(TRAINING[5:6])
    assert run.model.training
    assert run.model.base_model.skipped_modules == run.search.strategy.best()
    assert by_prompts(run.model)


def shares_of(eas: EASModel) -> list[float]:
    """The shares by which contexts are annealed from now on."""
    shares: list[float] = []
    begin_step, anneal_context = eas.begin_step, eas.anneal_context
    eas.begin_step = lambda names, share: shares.append(share) or begin_step(names, share)
    eas.anneal_context = lambda share: shares.append(share) or anneal_context(share)
    return shares


def by_prompts(model: PeftModel) -> bool:
    """Whether the contexts are each prompt's own again."""
    adapters = [module for module in model.modules() if isinstance(module, RoutedAdapter)]
    contexts = torch.rand(2, adapters[0].running_context.shape[0])
    return all(torch.equal(adapter.annealed(contexts), contexts) for adapter in adapters)


def begin_step() -> Run:
    """A run that was interrupted within a step, while contexts were annealed."""
    run = Run().train(TRAINING[:8])
    run.search.before_step()
    assert not by_prompts(run.model)
    return run


def test_a_step_that_is_not_ended_leaves_no_contexts_annealed() -> None:
    run = begin_step()
    run.search.finish()
    assert by_prompts(run.model)
    tuning = Run(freeze_context_at=20).train(TRAINING[:14])
    tuning.search.before_step()
    tuning.search.finish()
    assert by_prompts(tuning.model)
    state = Run().train(TRAINING[:6]).search.state_dict()
    run = begin_step()
    run.search.load_state_dict(state)
    assert by_prompts(run.model)
    run = begin_step()
    EASSearch(run.model, STEPS, run.loss, HELD_OUT, **{**SCHEDULE, "freeze_context_at": None})
    assert by_prompts(run.model)


def test_micro_batches_of_a_step_are_annealed_to_the_same_context() -> None:
    run = Run().train(TRAINING[:8])
    run.search.before_step()
    name = run.model.base_model.skipped_modules[0]
    layers = (module for module in run.model.modules() if isinstance(module, FFNLayer))
    one = next(layer for layer in layers if layer.candidate.name == name).adapters["default"]
    context, seen = torch.ones(1, len(one.running_context)), []
    for _ in range(2):
        run.search.before_step()
        seen.append(one.annealed(context))
        one.record(torch.rand(1, len(one.running_context)))
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], context)


def test_stopped_early_it_skips_the_best_set(caplog) -> None:
    run = Run().train(TRAINING[:8])
    run.search.finish()
    assert "stopped at step 8, before the search was over at step 12" in caplog.text
    config = run.model.peft_config["default"]
    assert config.skipped_modules == run.search.strategy.best()
    assert list(config.scores.values()) == run.search.strategy.scores
    caplog.clear()
    run.search.finish()
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "skipped"),
    [({"num_skip": None, "skipped_modules": [NAMES[1]]}, [NAMES[1]]), ({"num_skip": LAYERS}, NAMES)],
)
def test_without_a_choice_only_the_context_is_frozen(options, skipped) -> None:
    model = make_model(**options)
    search = EASSearch(model, 4)
    for batch in TRAINING[:4]:
        assert search.phase == ("tune" if search.step < 1 else "frozen")
        search.before_step()
        model.train()(**batch)
        search.after_step()
    assert model.base_model.skipped_modules == skipped
    assert model.peft_config["default"].context == "running"
    assert search.figures() == {"eas/phase": "frozen"}
    again = EASSearch(make_model(**options), 4)
    again.load_state_dict(search.state_dict())
    assert (again.step, again.phase) == (4, "frozen")


def test_the_adapter_is_saved_as_after_trainer(tmp_path) -> None:
    run = Run().train()
    run.model.save_pretrained(tmp_path)
    skipped = run.model.base_model.skipped_modules
    kinds = {key.split(".eas_")[1].split(".")[0] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"pia", "output", "input"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["skipped_modules"] == skipped


def test_its_state_can_be_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from peft_eas.reporting.plots import plot_skip_map

    plot_skip_map(Run().train().search.state_dict(), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0


def test_a_compiled_model_is_looked_into() -> None:
    model = make_model()
    search = EASSearch(torch.compile(model), STEPS, lambda n: 0.0, **SCHEDULE)
    assert search.eas is model.base_model


def test_its_settings_are_the_callbacks() -> None:
    by_hand, callback = (inspect.signature(kind).parameters for kind in (EASSearch, EASCallback))
    for name in SETTINGS:
        assert by_hand[name].default == callback[name].default


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "loss"}, "reward='loss' is unknown"),
        ({"search_steps": "soon"}, r"EASSearch\(search_steps='soon'\): .*, or \"auto\""),
        ({"search_steps": 0}, r"EASSearch\(search_steps=0\): .*integer of at least 1"),
        ({"interval": 0}, r"EASSearch\(interval=0\)"),
        ({"search_steps": 30}, "ends at step 30 .*does not fit into a run of 20 steps"),
        ({"freeze_context_at": 0.3}, "is step 6, before the search is over at step 12"),
        ({"freeze_context_at": 21}, r"freeze_context_at=21 is step 21 .*beyond a run of 20 steps"),
        ({"batch_loss": None}, "nothing to compute rewards from: batch_loss is missing. Pass batch_loss"),
        ({"batches": []}, "nothing to compute rewards from: batches is empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message) -> None:
    model = make_model()
    given = {"num_steps": STEPS, "batch_loss": lambda batch: 0.0, **SCHEDULE, **options}
    with pytest.raises(ValueError, match=message):
        EASSearch(model, **given)
    assert model.base_model.skipped_modules == []


def test_a_search_may_go_on_where_nothing_is_to_be_frozen() -> None:
    settings = {"search_steps": 0.9, "warmup_steps": 0.1, "interval": 1}
    assert EASSearch(make_model(context="none"), STEPS, lambda batch: 0.0, **settings).phase == "warm-up"
    with pytest.raises(ValueError, match="Freeze later"):
        EASSearch(make_model(), STEPS, lambda batch: 0.0, freeze_context_at=0.5, **settings)


def test_more_than_all_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="num_skip=9 of 5 candidates"):
        EASSearch(Blocks(num_skip=9), STEPS, lambda batch: 0.0)


def test_a_model_without_eas_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"EASSearch was given a Linear without EAS adapters\. Pass EASSearch the model"
    ):
        EASSearch(nn.Linear(2, 2), STEPS)
    with pytest.raises(TypeError, match="LlamaForCausalLM without EAS adapters"):
        EASSearch(build_model("llama"), STEPS)


@pytest.mark.parametrize(
    ("value", "what"), [(None, "type NoneType"), (torch.zeros(3), r"shape \(3,\)"), ("0.1", "type str")]
)
def test_what_is_no_loss_is_refused(value, what) -> None:
    run = Run().train(TRAINING[:5])
    run.search.held_out.batch_loss = lambda batch: value
    with pytest.raises(ValueError, match=f"returned a value of {what}; it must return the loss.*have labels"):
        run.train(TRAINING[5:6])


def test_a_state_that_does_not_fit_is_refused() -> None:
    searching = Run().train(TRAINING[:8])
    found = Run().train()
    with pytest.raises(ValueError, match="from the middle of a search, but this model's skip set is fixed already"):
        found.search.load_state_dict(searching.search.state_dict())
    given = EASSearch(make_model(num_skip=None, skipped_modules=NAMES[:2]), STEPS)
    with pytest.raises(ValueError, match="checkpoint of step 0 holds no search to resume"):
        Run().search.load_state_dict(given.state_dict())
    with pytest.raises(ValueError, match=r"is for 2 of 4 candidates .* asks for 1 of 4"):
        Run(model={"num_skip": 1}).search.load_state_dict(searching.search.state_dict())


# --- models of other methods -----------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As for distributed training: it has the model, and not its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.module(**inputs)


def search_blocks(model: nn.Module, steps: int = 30, **options) -> tuple[EASSearch, torch.optim.Optimizer]:
    """A search among the blocks of `model`, and the optimizer that trains it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    settings = {"search_steps": 0.8, "warmup_steps": 0, "interval": 1, "freeze_context_at": 0.9}

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch)["loss"]

    held_out = [Points(size=16, seed=1)[:]]
    search = EASSearch(model, steps, loss, held_out, optimizer=optimizer, **settings, **options)
    return search, optimizer


def train_blocks(search: EASSearch, optimizer: torch.optim.Optimizer, steps: int) -> None:
    points = Points()
    for step in range(steps):
        search.before_step()
        start = 8 * (step % 8)
        search.model(**points[start : start + 8])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        search.after_step()


WRAPPERS = {
    "none": lambda blocks: blocks,
    "module": Wrapper,
    "LoRA": lambda blocks: get_peft_model(blocks, LoraConfig(target_modules=["0", "2", "4"], r=2)),
}


def test_another_model_is_found_in_a_compiled_one() -> None:
    blocks = Blocks()
    assert isinstance(blocks, Skippable)
    assert eas_of(torch.compile(Wrapper(blocks)), "", "") is eas_of(Wrapper(torch.compile(blocks)), "", "") is blocks


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_it_finds_the_blocks_that_another_model_can_do_without(wrapper) -> None:
    blocks = Blocks(context="prompt")
    model = WRAPPERS[wrapper](blocks)
    search, optimizer = search_blocks(model)
    assert search.eas is blocks
    dropped = [block.weight for name, block in blocks.blocks.items() if name in USELESS]
    train_blocks(search, optimizer, 23)
    assert search.phase == "search"
    train_blocks(search, optimizer, 7)
    assert search.phase == "frozen"
    assert blocks.skipped_modules == blocks.active_config.skipped_modules == USELESS
    assert blocks.active_config.scores.keys() == set(blocks.candidates)
    assert list(blocks.blocks) == ["0", "2", "4"]
    assert blocks.calls.count("sync") == 30
    assert blocks.calls.index("freeze") == 27
    assert max(blocks.shares) == pytest.approx(26 / 27)
    assert blocks.shares[-1] == 0.0
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert not any(parameter in optimizer.state for parameter in dropped)


@pytest.mark.parametrize("step", [10, 26])
def test_another_models_search_is_resumed(step) -> None:
    first, again = search_blocks(Blocks()), search_blocks(Blocks())
    train_blocks(*first, step)
    again[0].load_state_dict(json.loads(json.dumps(first[0].state_dict())))
    again[0].model.load_state_dict(first[0].model.state_dict())
    assert again[0].eas.skipped_modules == first[0].eas.skipped_modules
    assert again[0].phase == first[0].phase
    assert again[0].state_dict() == first[0].state_dict()


def test_a_model_that_lacks_a_part_of_what_is_asked_is_refused() -> None:
    blocks = Blocks()
    del blocks.candidates
    with pytest.raises(TypeError, match=r"a Blocks without EAS adapters.*all that peft_eas\.Skippable names"):
        search_blocks(blocks)


# --- search_steps="auto" ---------------------------------------------------------------------------------------------


def start_auto(spread: float, context: str = "none") -> EASSearch:
    """A search over 1,000 steps that may end early; `spread` is noise."""
    blocks = Blocks(context=context)
    random = torch.Generator().manual_seed(0)

    def loss(batch: int) -> float:
        costly = len(set(blocks.skipped_modules) - set(USELESS))
        return float(torch.exp(0.5 * costly + spread * torch.randn((), generator=random)))

    return EASSearch(blocks, 1000, loss, search_steps="auto", warmup_steps=0.1, interval=5)


def run_until(search: EASSearch, end: int) -> EASSearch:
    while search.step < end and search.is_searching:
        search.before_step()
        search.after_step()
    return search


def test_a_search_that_has_settled_ends_early() -> None:
    search = run_until(start_auto(spread=0.001), 1000)
    assert search.eas.skipped_modules == USELESS
    assert search.step == 220  # sets are of full size from step 200 on, and five rounds have been since
    assert search.phase == "tune"


def test_a_search_that_does_not_settle_goes_on_to_its_end() -> None:
    assert run_until(start_auto(spread=3.0), 1000).step == 300


def test_a_context_is_frozen_when_it_would_have_been() -> None:
    search = run_until(start_auto(spread=0.001, context="prompt"), 1000)
    while search.phase != "frozen":
        search.before_step()
        search.after_step()
    assert search.step == 300
    assert search.eas.shares[-2] == pytest.approx(0.995)  # annealed to the end


def test_rounds_that_were_settled_count_after_a_resume() -> None:
    before = run_until(start_auto(spread=0.001), 212)
    resumed = start_auto(spread=0.001)
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert run_until(resumed, 1000).step == run_until(before, 1000).step
