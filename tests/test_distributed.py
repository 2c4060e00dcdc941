"""What must be equal on all ranks of a distributed run (two processes on the CPU)."""

import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def test_ranks_agree_at_every_step(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*launch, str(WORKER), str(tmp_path)], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))

    assert first["skip_sets"] == second["skip_sets"]
    assert len({tuple(names) for names in first["skip_sets"]}) > 2, "the search drew no different sets"
    assert first["skipped"] == second["skipped"]
    for ours, theirs in zip(first["contexts"], second["contexts"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert first["weights"].keys() == second["weights"].keys()
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=0, atol=0)
