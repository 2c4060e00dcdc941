"""Files of JSON values, a line each, to which an interruption does no harm: a line that was cut off does not count."""

import json
import os
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[Any]:
    """The values of all whole lines of `path`; none if there is no such file."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def append_line(path: Path, value: Any) -> None:
    """Adds a line in one write, so that processes which share the file do not mix theirs."""
    text = json.dumps(value) + "\n"
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        is_cut_off = file.read() not in (b"", b"\n")
        file.write(("\n" + text if is_cut_off else text).encode())
