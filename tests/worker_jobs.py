"""What the workers of engines share. It runs with their interpreters, so it needs the standard library alone."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(run: Callable[[dict[str, Any]], dict[str, Any]], clean_up: Callable[[], object] = lambda: None) -> None:
    """Writes what `run` makes of each job of the first file into the second; one that fails stops no other."""
    jobs, path = map(Path, sys.argv[1:])
    results = []
    for job in json.loads(jobs.read_text()):
        try:
            results.append(run(job))
        except Exception as error:
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
        clean_up()
        path.write_text(json.dumps(results))
