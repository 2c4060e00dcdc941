"""Parts of a long command: each runs its cases in a process of its own, under a time limit, and can do no other harm.

A part is a function that yields its cases, each a name and a function of no arguments that returns figures for JSON. A
case's figures are on disk as soon as they are known. Whatever fails, or takes too long, is noted with its reason, and
the next case or part goes on. Started again with the same folder, the cases that have figures are not run again.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.shared.json_lines import append_line, read_lines

# How long after its limit a part is stopped in the middle of a case, in seconds.
GRACE = 15.0
# What has been imported need not be imported again. A GPU must not be in use before.
FORKED = multiprocessing.get_context("fork")
UNFINISHED = "did not finish: its process was stopped, or crashed"

Case = tuple[str, Callable[[], Any]]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of its records. cases: yields the cases; what it prepares between them is in the part's process alone.
            It is given `Clock.left`. seconds: its time limit.
    """

    name: str
    cases: Callable[["Clock"], Iterator[Case]]
    seconds: float


class Clock:
    """How much time is left until `end`, a value of time.monotonic()."""

    def __init__(self, end: float) -> None:
        self.end = end

    @property
    def left(self) -> float:
        """Seconds, below 0 when the time is over."""
        return self.end - time.monotonic()


class Records:
    """What is known of the cases, a JSON line each in `folder`/records.jsonl, of which the last of a case counts.

    A record has `part`, `case`, and either `figures` and `seconds` or `error`; the case "" stands for the part itself.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "records.jsonl"
        self.run = time.time_ns()  # of the command, which tries what failed in an earlier one again

    def add(self, part: str, case: str, **values: Any) -> None:
        """Writes one record."""
        append_line(self.file, {"run": self.run, "part": part, "case": case, **values})

    def all(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The records by part and case."""
        return {(record["part"], record["case"]): record for record in read_lines(self.file)}

    def figures(self, part: str, case: str) -> Any:
        """The figures of a case, or None."""
        return self.all().get((part, case), {}).get("figures")

    def count(self) -> int:
        """How many records there are."""
        return len(read_lines(self.file))

    def is_due(self, part: str, case: str) -> bool:
        """Whether a case is still to be run by this command."""
        record = self.all().get((part, case))
        return record is None or ("error" in record and record["run"] != self.run)


def run_part(part: Part, records: Records, clock: Clock, apart: bool = True) -> None:
    """Runs the cases of `part` that are due, until its limit or the end of `clock`.

    Where a case crashes, or leaves the device unusable, the rest goes on in a new process; without `apart` there is
    none, and no case is stopped.
    """
    end = Clock(min(clock.end, time.monotonic() + part.seconds))
    if not apart:
        _work(part, records, end)
        return
    reason = "left out, as the time was over"
    while end.left > 0:
        tried = records.count()
        process = FORKED.Process(target=_work, args=(part, records, end))
        process.start()
        process.join(end.left + GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == 0:
            return
        reason = f"its process ended with {process.exitcode}, after {part.seconds - end.left:.0f} s"
        if records.count() == tried:  # it would end alike
            break
    records.add(part.name, "", error=reason)


def _work(part: Part, records: Records, end: Clock) -> None:
    try:
        for case, run in part.cases(end):
            if not records.is_due(part.name, case):
                continue
            if end.left <= 0:
                records.add(part.name, case, error="left out, as the time was over")
                continue
            _run_case(part, case, run, records)
    except Exception:  # of what the cases share
        traceback.print_exc()
        records.add(part.name, "", error=_reason())
    else:
        records.add(part.name, "", figures={})


def _run_case(part: Part, case: str, run: Callable[[], Any], records: Records) -> None:
    records.add(part.name, case, error=UNFINISHED)  # until it says otherwise
    start = time.monotonic()
    try:
        figures = run()
    except Exception:
        traceback.print_exc()
        records.add(part.name, case, error=_reason())
    else:
        records.add(part.name, case, figures=figures, seconds=time.monotonic() - start)
    print(f"{part.name}: {case}: {time.monotonic() - start:.1f} s", flush=True)
    if not _device_works():
        os._exit(1)


def _reason() -> str:
    """The exception being handled, in one line."""
    kind, error, _ = sys.exc_info()
    text = str(error).strip().splitlines() or [""]
    return f"{kind.__name__}: {text[0]}"


def _device_works() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises for ever after a kernel that failed
    except RuntimeError:
        return False
    return True
