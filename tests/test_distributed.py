"""What must be equal on all ranks of a distributed run (two processes on the CPU), and equal to a run of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import difference, logits
from distributed_worker import CAN_SHARD, make_model
from peft import PeftModel

WORKER = Path(__file__).with_name("distributed_worker.py")
needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="with torch 2.6 FSDP2 needs a GPU")
SHARDED = pytest.param("sharded", marks=needs_sharding)
LOOPS = ["trainer", "by hand", SHARDED]


def launch(num_ranks: int, *arguments: object) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), str(WORKER), *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks has seen, with four sequences per rank."""
    folder = tmp_path_factory.mktemp("two")
    launch(2, folder, 4)
    return [{**torch.load(folder / f"rank{rank}.pt"), "folder": folder} for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process has seen, with the eight sequences of both ranks."""
    folder = tmp_path_factory.mktemp("one")
    launch(1, folder, 8)
    return torch.load(folder / "rank0.pt")


def assert_close(actual: dict, expected: dict, **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("loop", LOOPS)
def test_ranks_agree_at_every_step(ranks: list[dict], loop: str) -> None:
    first, second = (seen[loop] for seen in ranks)
    assert first["skip_sets"] == second["skip_sets"]
    assert len({tuple(names) for names in first["skip_sets"]}) > 2, "the search drew no different sets"
    assert first["skipped"] == second["skipped"]
    assert len(first["contexts"]) == 20
    for ours, theirs in zip(first["contexts"], second["contexts"], strict=True):
        assert torch.equal(ours, theirs)
    assert_close(second["adapters"], first["adapters"], rtol=0, atol=0)


@pytest.mark.parametrize("loop", LOOPS)
def test_two_ranks_end_as_one_with_the_same_batches(ranks: list[dict], alone: dict, loop: str) -> None:
    """Also where the answers of the ranks' batches differ in length, which only Trainer's loss makes up for."""
    together = ranks[0][loop]
    assert together["skip_sets"] == alone[loop]["skip_sets"]
    for ours, theirs in zip(together["contexts"], alone[loop]["contexts"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_close(together["adapters"], alone[loop]["adapters"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loop", "step"),
    [
        ("trainer", 8),
        ("trainer", 16),
        ("by hand", 8),
        ("by hand", 14),
        *(pytest.param("sharded", step, marks=needs_sharding) for step in (8, 14, 18)),
    ],
)
def test_resumed_it_ends_bit_equal(ranks: list[dict], loop: str, step: int) -> None:
    for seen in ranks:
        whole, resumed = seen[loop], seen[f"{loop}, resumed from {step}"]
        assert resumed["skip_sets"] == whole["skip_sets"][-len(resumed["skip_sets"]) :]
        assert_close(resumed["adapters"], whole["adapters"], rtol=0, atol=0)


def test_gradients_that_could_not_be_reduced_are_refused(ranks: list[dict]) -> None:
    assert all("find_unused_parameters=False and static_graph=False" in seen["refused"] for seen in ranks)


@needs_sharding
def test_a_frozen_context_is_sharded_and_saved_with_the_parameters(ranks: list[dict]) -> None:
    for seen in (rank["sharded"] for rank in ranks):
        assert difference(seen["logits of the shards"], seen["logits"]) < 1e-6
    state, adapters = ranks[0]["sharded"]["state of the shards"], ranks[0]["sharded"]["adapters"]
    contexts = [name for name in adapters if name.endswith("running_context")]
    assert len(contexts) == 4
    assert all(torch.equal(state[name], adapters[name]) for name in contexts)


@needs_sharding
def test_a_sharded_model_is_saved_whole_and_merged_elsewhere(ranks: list[dict]) -> None:
    seen = ranks[0]["sharded"]
    assert all("adapters are merged into whole weights only" in rank["sharded"]["merge refused"] for rank in ranks)
    model = PeftModel.from_pretrained(make_model().unload(), ranks[0]["folder"] / "sharded/adapter").eval()
    inputs = {"input_ids": torch.arange(3, 21).reshape(2, 9)}
    assert model.base_model.skipped_modules == seen["skipped"]
    assert difference(logits(model, inputs), seen["logits"]) < 1e-5
    merged = model.merge_and_unload()
    assert len(merged.config.eas["skipped"]) == 2
    assert difference(logits(merged, inputs), seen["logits"]) < 1e-5
