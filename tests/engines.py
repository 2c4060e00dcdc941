"""Other engines, each run by an interpreter of its own, which an environment variable names."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest


def interpreter(variable: str) -> str:
    """The interpreter that an environment variable names; skips the test without it."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no interpreter that has this engine")
    return os.environ[variable]


def run_worker(python: str, worker: str, *arguments: str | Path) -> Any:
    """Runs a script beside this one, without this environment's packages, and returns what it has written."""
    result = Path(arguments[0]).with_name("result.json")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, str(Path(__file__).with_name(worker)), *map(str, arguments), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def vllm_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What vllm_worker.py makes of the jobs, each of which must go well; its files go into `folder`."""
    python = interpreter("PEFT_EAS_VLLM_PYTHON")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    results = run_worker(python, "vllm_worker.py", folder / "jobs.json")
    errors = [(job["folder"], result["error"]) for job, result in zip(jobs, results) if "error" in result]
    assert not errors, errors
    return results
