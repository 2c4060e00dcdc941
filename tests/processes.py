"""Python in a process of its own: for what must hold without the package, or in another interpreter than the tests'.

It is forked from one that has imported torch and transformers, and nothing else, which would take most of its time.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a GPU that was asked for before a fork is of no use behind it
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])


def run_alone(code: str, *arguments: str | Path, folder: Path) -> str:
    """What `code` prints, run in `folder` as `python -c` runs it; fails with its error output if it fails."""
    with tempfile.TemporaryDirectory() as temporary:
        out, err = streams = [Path(temporary, name) for name in ("out", "err")]
        process = _SERVER.Process(target=_run, args=(code, list(map(str, arguments)), folder, streams))
        process.start()
        process.join(600)
        process.kill()
        assert process.exitcode == 0, err.read_text()[-4000:]
        return out.read_text()


def _run(code: str, arguments: list[str], folder: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    os.chdir(folder)
    sys.argv, sys.path = ["-c", *arguments], ["", *sys.path]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
