"""The methods that are compared, and the grid of runs, on tiny models."""

import json
import re
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import LAYERS, VOCAB, build_model, difference, logits, make_inputs
from transformers import PreTrainedModel
from transformers.utils import logging

from examples.compare.das import LayerSkipping, SkippedLayer
from examples.compare.methods import LABELS, METHODS, SKIPS_NOTHING
from examples.compare.report import write_report
from examples.shared.json_lines import read_lines
from examples.shared.task import Task, search_share, tune
from peft_eas import EASSearch
from peft_eas.runtime.adapter import RoutedAdapter

NAMES = [f"model.layers.{i}" for i in range(LAYERS)]


def tiny_task(family: str = "llama") -> Task:
    """The last token of a sequence is its first one again."""

    def samples(seed: int, count: int) -> list[torch.Tensor]:
        tokens = torch.randint(1, VOCAB - 1, (count, 6), generator=torch.Generator().manual_seed(seed))
        return list(torch.cat([tokens, tokens[:, :1]], 1))

    def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids = torch.stack(rows)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 6, -100),
        }

    @torch.no_grad()
    def score(model: torch.nn.Module) -> dict[str, float]:
        batch = collate(test)
        right = model(**batch).logits[:, -2].argmax(-1) == batch["labels"][:, -1]
        return {"accuracy": right.float().mean().item()}

    test = samples(2, 8)
    return Task(
        name="copy",
        load_base=lambda: build_model(family),
        train=samples(0, 64),
        reward=samples(1, 16),
        test=test,
        collate=collate,
        score=score,
        eas={"task_type": "CAUSAL_LM", "r": 8, "attention_r": 4},
        lora_targets=r".*\.[qkvo]_proj",
        steps=12,
        batch_size=4,
        learning_rate=1e-2,
        deployed_batch=lambda: {key: value[:, :-1] for key, value in collate(test).items() if key != "labels"},
    )


# --- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_tunes_and_is_deployed_as_it_was_tuned(method: str, tmp_path: Path) -> None:
    task = tiny_task()
    torch.manual_seed(0)
    prepared = METHODS[method](task.load_base(), task, 2, 0)
    before = task.load_base().state_dict()
    trainer = tune(prepared.model, task, tmp_path, callbacks=prepared.callbacks, progress=False)
    assert trainer.state.global_step == task.steps
    model, inputs = prepared.model.eval(), make_inputs("llama", "cpu")
    expected = logits(model, inputs)
    names = getattr(getattr(model, "base_model", model), "skipped_modules", [])
    assert len(names) == (0 if method in SKIPS_NOTHING else 2)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not any(name.endswith(tuple(before)) for name in trained)
    deployed = model.merge_and_unload(**prepared.merge_options)
    assert isinstance(deployed, PreTrainedModel)
    assert difference(logits(deployed, inputs), expected) < 1e-4


def test_the_tables_name_every_method() -> None:
    assert list(LABELS) == list(METHODS)


def test_methods_choose_as_they_say() -> None:
    task = tiny_task()
    skipped = {
        seed: METHODS["random_choice"](task.load_base(), task, 2, seed).model.base_model.skipped_modules
        for seed in range(8)
    }
    assert len({tuple(names) for names in skipped.values()}) > 1
    base = task.load_base()
    base.model.layers[2].self_attn.o_proj.weight.data.zero_()  # what adds nothing is dropped first
    model = METHODS["cosine"](base, task, 1, 0).model
    assert model.base_model.skipped_modules == ["model.layers.2.self_attn"]
    model = METHODS["no_context"](task.load_base(), task, 2, 0).model
    assert not any("context_down" in name or "router" in name for name, _ in model.named_parameters())
    assert METHODS["nothing_skipped"](task.load_base(), task, 2, 0).model.base_model.skipped_modules == []


# --- DAS -----------------------------------------------------------------------------------------------------------


def layer_skipping(num_skip: int = 2, **arguments: object) -> LayerSkipping:
    torch.manual_seed(0)
    batch = make_inputs("llama", "cpu")
    return LayerSkipping(build_model("llama"), batch, num_skip, r=8, attention_r=4, **arguments)


def fix(model: LayerSkipping, names: list[str]) -> LayerSkipping:
    """Skips `names` for good, by adapters that are not the identity."""
    model.fix_skipped_modules(names)
    for stand_in in model.stand_ins.values():
        stand_in.adapter.reset_parameters(init_weights=False)
    return model.eval()


def test_das_starts_as_the_base_and_drops_layers() -> None:
    model, base, inputs = layer_skipping().eval(), build_model("llama").eval(), make_inputs("llama", "cpu")
    assert model.candidates == NAMES
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    model.set_skipped_modules([NAMES[0], NAMES[2]])
    base.model.layers = torch.nn.ModuleList(base.model.layers[i] for i in (1, 3))
    assert torch.equal(logits(model, inputs), logits(base, {**inputs, "use_cache": False}))


def test_das_anneals_and_freezes_the_contexts_of_the_layers_it_keeps() -> None:
    model, inputs = layer_skipping().train(), make_inputs("llama", "cpu")
    model(**inputs)
    for adapter in (module for module in model.modules() if isinstance(module, RoutedAdapter)):
        adapter.reset_parameters(init_weights=False)
    by_prompt = logits(model.eval(), inputs)
    model.anneal_context(1.0)
    annealed = logits(model, inputs)
    model.freeze_context()
    assert difference(logits(model, inputs), annealed) < 1e-5 < difference(annealed, by_prompt)


def test_das_computes_nothing_of_a_skipped_layer() -> None:
    model = fix(layer_skipping(), NAMES[:2])
    called = []
    for name, layer in model.layers.items():
        for path, module in layer.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *_, call=(name, path): called.append(call))
    logits(model, make_inputs("llama", "cpu"))
    assert {name for name, _ in called} == set(NAMES)
    assert {path.split(".")[0] for name, path in called if name in NAMES[:2]} == {"input_layernorm"}
    assert set(model.stand_ins) == {name.replace(".", "/") for name in NAMES[:2]}
    assert all(stand_in.adapter.token_down.weight.shape[0] == 8 for stand_in in model.stand_ins.values())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("layers.0." in name or "layers.1." in name for name in trained if "stand_ins" not in name)


@pytest.mark.parametrize("skip", [[0], [1, 3], [0, 1, 2, 3]])
def test_das_generates_with_a_cache_as_without(skip: list[int]) -> None:
    deployed = fix(layer_skipping(), [NAMES[i] for i in skip]).merge_and_unload()
    assert [isinstance(layer, SkippedLayer) for layer in deployed.model.layers] == [i in skip for i in range(LAYERS)]
    inputs = make_inputs("llama", "cpu")
    texts = [
        deployed.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("stop", [4, 8])
def test_das_resumes_in_and_behind_the_search(stop: int) -> None:
    task = tiny_task()
    batches = [task.collate(task.train[4 * step : 4 * step + 4]) for step in range(12)]

    def begin() -> tuple[LayerSkipping, EASSearch, torch.optim.Optimizer]:
        model = layer_skipping(dropout=0.0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        settings = {"search_steps": 6, "warmup_steps": 2, "interval": 2}
        return model, EASSearch(model, 12, lambda batch: model(**batch).loss, batches[:2], **settings), optimizer

    def train(
        model: LayerSkipping, search: EASSearch, optimizer: torch.optim.Optimizer, steps: range
    ) -> LayerSkipping:
        for step in steps:
            search.before_step()
            model.train()(**batches[step]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            search.after_step()
        return model.eval()

    inputs = make_inputs("llama", "cpu")
    whole = begin()
    train(*whole, range(stop))
    again = begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again[1].load_state_dict(json.loads(json.dumps(whole[1].state_dict())))
    again[0].load_state_dict(whole[0].state_dict())
    assert again[1].phase == whole[1].phase
    expected = logits(train(*whole, range(stop, 12)), inputs)
    model = train(*again, range(stop, 12))
    assert torch.equal(logits(model, inputs), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert difference(logits(model.merge_and_unload(), inputs), expected) < 1e-5


def test_a_model_that_das_has_made_refuses_to_be_saved(tmp_path: Path) -> None:
    deployed = fix(layer_skipping(), NAMES[:2]).merge_and_unload()
    with pytest.raises(ValueError, match="layers that DAS skips cannot be saved"):
        deployed.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_das_is_searched_by_the_bandit(tmp_path: Path) -> None:
    task = tiny_task()
    prepared = METHODS["das"](task.load_base(), task, 2, 0)
    seen: set[tuple[str, ...]] = set()
    original = prepared.model.set_skipped_modules
    prepared.model.set_skipped_modules = lambda names: (seen.add(tuple(sorted(names))), original(names))
    tune(prepared.model, task, tmp_path, callbacks=prepared.callbacks, progress=False)
    assert len(seen) > 1
    record = json.loads((tmp_path / "eas_search.json").read_text())
    assert record["skipped_modules"] == prepared.model.skipped_modules
    assert record["strategy"]["candidates"] == NAMES


@pytest.mark.parametrize("text", ["0.1", "1", "-1", "nan"])
def test_a_share_of_the_steps_that_no_search_fits_into_is_refused(text: str) -> None:
    assert search_share("0.4") == 0.4
    with pytest.raises(ArgumentTypeError, match=f"{text} must be above 0.1.*below 1"):
        search_share(text)


# --- the grid ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from examples.compare import __main__ as compare

    monkeypatch.setattr(compare, "TASKS", {"copy": tiny_task})
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()  # its `main` sets them for its process
    yield compare
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def run_grid(compare: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> list[dict]:
    """The lines of runs.jsonl behind a run of examples.compare, on the tiny task."""
    fixed = ("--tasks", "copy", "--rounds", "1", "--threads", "1", "--output-dir", str(folder))
    monkeypatch.setattr(sys, "argv", ["examples.compare", *fixed, *options])
    compare.main()
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_the_grid_is_run_once_and_reported(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--methods", "nothing_skipped", "das", "eas", "--shares", "0.5", "--seeds", "0", "1")
    records = run_grid(compare, monkeypatch, tmp_path, *options)
    points = [(r["method"], r["share"], r["seed"]) for r in records]
    assert len(points) == len(set(points)) == 2 * 3
    for record in records:
        assert record["task"] == "copy"
        assert len(record["skipped_modules"]) == 4 * record["share"]
        assert 0 <= record["scores"]["accuracy"] <= 1
        assert record["cache_bytes_per_token"]["deployed"] == record["cache_bytes_per_token"]["base"] * (
            1 - record["share"]
        )
        assert (record["choice_seconds"] > 0) == (record["method"] in ("das", "eas"))
        assert set(record["speed_up"]) == {"prefill", "decode"}
    printed, table = capsys.readouterr().out, (tmp_path / "table.md").read_text()
    assert table in printed
    assert "## copy: 4 MHAs, 12 steps" in table
    assert table.count("| EAS ") == 2
    assert (tmp_path / "accuracy_against_speed.png").stat().st_size > 0

    monkeypatch.setattr(compare, "run", None)  # nothing is left to run
    assert run_grid(compare, monkeypatch, tmp_path, *options) == records
    assert run_grid(compare, monkeypatch, tmp_path, "--report") == records


def test_an_interruption_loses_nothing(compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--methods", "lora", "random_choice", "--shares", "0.5", "--seeds", "0", "--steps", "2")
    run, finished = compare.run, []

    def interrupted(*arguments: object) -> dict:
        if finished:
            raise KeyboardInterrupt
        finished.append(run(*arguments))
        return finished[0]

    monkeypatch.setattr(compare, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_grid(compare, monkeypatch, tmp_path, *options)
    path = tmp_path / "runs.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == finished
    with path.open("a") as file:
        file.write('{"task": "copy", "method": "random_ch')  # cut off while it was written
    monkeypatch.setattr(compare, "run", run)
    options = ("--tasks", "copy", "--threads", "1", "--rounds", "1", "--output-dir", str(tmp_path), *options)
    monkeypatch.setattr(sys, "argv", ["examples.compare", *options])
    compare.main()
    assert [record["method"] for record in read_lines(path)] == ["lora", "random_choice"]
    assert read_lines(path)[0] == finished[0]


def test_one_run_that_fails_does_not_keep_the_others_from_running(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    options = ("--methods", "cosine", "lora", "--shares", "0.5", "--seeds", "0", "--steps", "2")
    cosine = METHODS["cosine"]
    monkeypatch.setitem(METHODS, "cosine", fails)
    with pytest.raises(SystemExit, match="1 runs failed, as told above: copy, cosine, 50%, seed 0"):
        run_grid(compare, monkeypatch, tmp_path, *options)
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    assert [record["method"] for record in read_lines(tmp_path / "runs.jsonl")] == ["lora"]
    assert "| LoRA" in (tmp_path / "table.md").read_text()
    monkeypatch.setitem(METHODS, "cosine", cosine)
    assert [record["method"] for record in run_grid(compare, monkeypatch, tmp_path, *options)] == ["lora", "cosine"]


def test_a_run_counts_once_and_what_is_no_run_is_named(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--methods", "lora", "--seeds", "0", "--steps", "1")
    path = tmp_path / "runs.jsonl"
    run_grid(compare, monkeypatch, tmp_path, *options)
    table = (tmp_path / "table.md").read_text()
    path.write_text(2 * path.read_text())
    run_grid(compare, monkeypatch, tmp_path, *options)
    assert (tmp_path / "table.md").read_text() == table
    with path.open("a") as file:
        file.write('{"task": "copy"}\n')
    with pytest.raises(SystemExit, match=r"holds a line that is no run: \{'task': 'copy'\}"):
        run_grid(compare, monkeypatch, tmp_path, *options)


def test_the_table_says_how_far_from_nothing_skipped(tmp_path: Path) -> None:
    def record(method: str, share: float, seed: int, accuracy: float, speed_up: float) -> dict:
        return {
            **{"task": "t", "method": method, "share": share, "seed": seed, "steps": 5, "num_mhas": 8},
            **{"scores": {"accuracy": accuracy}, "trainable_parameters": 1000, "choice_seconds": 1.0},
            **{"tuning_seconds": 4.0, "speed_up": {"prefill": speed_up}, "date": "2026-01-01", "machine": "m"},
            **{"threads": 1, "versions": {"torch": "2"}},
        }

    records = [record("nothing_skipped", 0.0, seed, 0.90 + 0.02 * seed, 1.0) for seed in (0, 1)]
    records += [record("eas", 0.5, seed, 0.88 + 0.04 * seed, 1.2 + 0.2 * seed) for seed in (0, 1)]
    records += [record("lora", 0.0, seed, 0.95, 1.0) for seed in (1, 2)]  # compared on the seed that both have
    write_report(records, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| LoRA | — | 95.00 ± 0.00 | 95.00 | +3.00 |" in re.sub(" +", " ", table)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| EAS")
    ]
    assert cells[0] == ["EAS", "50%", "90.00 ± 2.83", "90.00", "-1.00"]
    assert cells[1][:5] == ["EAS", "50%", "90.00 ± 2.83", "2", "1,000"]
    assert cells[1][7:9] == ["1.30×", "—"]


def test_a_run_of_few_steps_is_rewarded_in_time(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "TASKS", {"copy": lambda: replace(tiny_task(), steps=1000)})
    options = ("--methods", "das", "--shares", "0.5", "--seeds", "0", "--steps", "12")
    assert [record["steps"] for record in run_grid(compare, monkeypatch, tmp_path, *options)] == [12]


def test_runs_with_other_settings_are_not_mixed(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--methods", "lora", "--seeds", "0", "--steps", "1")
    run_grid(compare, monkeypatch, tmp_path, *options)
    monkeypatch.setattr(compare, "TASKS", {"copy": lambda: replace(tiny_task(), learning_rate=0.5)})
    with pytest.raises(SystemExit, match=r"'learning_rate': 0\.01.*'learning_rate': 0\.5.*give another --output-dir"):
        run_grid(compare, monkeypatch, tmp_path, *options)


def test_the_time_that_is_left_is_known_before_each_task_has_run(compare: ModuleType) -> None:
    points = [("a", "eas", 0.5, 1, 10), ("b", "eas", 0.5, 1, 10)]
    assert compare.remaining_time(points, [{"task": "a", "run_seconds": 30.0}]) == "0:01:00"
    assert compare.remaining_time(points[1:], [{"task": "a", "run_seconds": 30.0}]) == "0:00:30"


@pytest.mark.parametrize(
    ("share", "reason"),
    [
        *((share, "a share of the MHAs lies between 0 and 1") for share in ("0", "1", "1.5")),
        ("0.1", r"of the 4 MHAs of copy that is 0\. Give a share from 0\.25 to 0\.75"),
        ("0.9", "of the 4 MHAs of copy that is 4"),
    ],
)
def test_a_share_out_of_range_is_refused(
    share: str,
    reason: str,
    compare: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_grid(compare, monkeypatch, tmp_path, "--shares", share)
    assert re.search(reason, capsys.readouterr().err + str(caught.value))
