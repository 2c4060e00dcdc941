"""An engine in a process of its own."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from examples.benchmark.engines.variants import Variant

WORKER = Path(__file__).with_name("worker.py")


class EngineProcess:
    """An engine that holds a variant, and idles while it is not asked; a context manager.

    Args:
        python: the interpreter that has the engine. options: of the engine, besides the variant's own.
        log: the file that what the engine prints is added to.

    Raises:
        SystemExit: if the engine ends, with the place of its log.
    """

    def __init__(
        self, engine: str, variant: Variant, python: str, options: dict[str, Any], threads: int, log: Path
    ) -> None:
        self.variant = variant
        self._log = log
        # Packages of this environment are none of the engine's.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [python, str(WORKER), engine, str(variant.path), json.dumps({**options, **variant.options})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**environment, "OMP_NUM_THREADS": str(threads)},
            )
        self.num_pages, self.page_size = self._answer()

    def fitting(self, num_tokens: int) -> int:
        """How many requests of `num_tokens` each fit into the KV cache at once."""
        return self.num_pages // -(-num_tokens // self.page_size)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[float]]:
        """Seconds from the requests' arrival until each token of each."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The engine ended with {self.variant.name}; {self._log} says why.")
        return json.loads(line)

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
