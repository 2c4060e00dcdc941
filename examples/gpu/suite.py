"""The test suite's own tests of what runs on a device, file by file."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.gpu.parts import Case, Clock

ROOT = Path(__file__).parents[2]
FILES = ("test_skipped.py", "test_merge.py", "test_generation.py", "test_prompted.py", "test_model.py")
OUTCOME = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def cases(device: str, files: Sequence[str] = FILES) -> Callable[[Clock], Iterator[Case]]:
    """A case for each file of tests."""

    def make_cases(clock: Clock) -> Iterator[Case]:
        for file in files:
            yield file, lambda file=file: run_tests(file, device, clock)

    return make_cases


def run_tests(file: str, device: str, clock: Clock) -> dict[str, Any]:
    """How many tests of `file` passed, failed and were skipped on the device, and which failed.

    Raises:
        RuntimeError: where pytest ran none. subprocess.TimeoutExpired: where the time was over before it was done.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    has_xdist = importlib.util.find_spec("xdist") is not None
    command += ["-o", f"addopts={'-n 8' if has_xdist and device != 'cpu' else ''}", str(ROOT / "tests" / file)]
    environment = {**os.environ, "PEFT_EAS_TEST_DEVICE": device, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1.0, clock.left)
    )
    lines = result.stdout.strip().splitlines()
    counts = {kind: int(number) for number, kind in OUTCOME.findall(lines[-1] if lines else "")}
    if not counts:
        raise RuntimeError(f"pytest ran no test of {file}: {(result.stdout + result.stderr).strip()[-300:]}")
    return {"counts": counts, "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))]}
