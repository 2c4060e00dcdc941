"""Checks and measures what only a GPU can show: one command that needs little time and no network.

    python examples/gpu/run.py --model DIR --data DIR      # 8 minutes at most; DIRs: a language model, and BANKING77
    python examples/gpu/run.py --device cpu --quick        # a rehearsal of every part at tiny sizes

The parts, in the order of their importance: whether all that must hold also holds there (`correctness`); seconds and
memory of a merge at 7B shapes, and the largest batch (`capacity`); prefill and decoding (`speed`); training steps at
1B shapes (`training`); a real model on a real task (`real`); decoding under torch.compile (`compile`); the test suite
(`suite`). Each has a process and a time limit of its own, so that none can stop the next. Where time runs short, the
last are left out. --output-dir gets records.jsonl while it runs, and report.md, figures.json and speed_up.png; a
command that is given again goes on where it was, and tries again what had failed.

Nothing needs to be installed but torch, transformers, peft, accelerate, matplotlib, tqdm and pytest.
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # a plain checkout will do
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whoever asks for a GPU while being imported leaves it alone

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import peft_eas  # noqa: E402
from examples.gpu import correctness, real, report, speed, suite, training  # noqa: E402
from examples.gpu.parts import FORKED, GRACE, Clock, Part, Records, run_part  # noqa: E402

# What each part may take of the time at the most; what one leaves goes to those behind it.
SHARES = {
    "correctness": 0.3,
    "capacity": 0.15,
    "speed": 0.35,
    "training": 0.15,
    "real": 0.35,
    "compile": 0.2,
    "suite": 1.0,
}
# Seconds of the time for the report, behind a part that had to be stopped.
RESERVE = GRACE + 5.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--model", type=Path, help="folder of a causal language model: a checkpoint, or a GGUF file")
    parser.add_argument("--data", type=Path, help="folder of BANKING77: train.csv and test.csv")
    parser.add_argument("--test-queries", type=int, default=1000, help="of BANKING77's 3,080 (default 1000)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; without --model and --data, stand-ins")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes}: must be above 0")
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together: the model is tuned on the data")
    return arguments


def make_parts(arguments: argparse.Namespace, records: Records, folder: Path) -> list[Part]:
    """The parts that are asked for; `folder` is for stand-ins."""
    device, quick = arguments.device, arguments.quick
    sizes = speed.QUICK if quick else speed.Sizes()
    model, data, num_test = arguments.model, arguments.data, arguments.test_queries
    if quick and model is None:
        real.write_stand_in(folder)
        model = data = folder
    cases = {
        "correctness": correctness.cases(device, ("llama", "mixtral") if quick else correctness.FAMILIES),
        "capacity": speed.capacity_cases(sizes, device),
        "speed": speed.speed_cases(sizes, device),
        "training": training.cases(training.QUICK if quick else training.Sizes(), device),
        "compile": speed.compile_cases(sizes, device),
        "suite": suite.cases(device, ("test_skipped.py",) if quick else suite.FILES),
    }
    if model is None:
        records.add("real", "", error="left out, as --model and --data were not given")
    else:
        most = 30 if quick else real.MOST
        cases["real"] = real.cases("real", model, data, records, device, num_test, most, rounds=2 if quick else 20)
    return [
        Part(name, cases[name], SHARES[name] * 60 * arguments.minutes)
        for name in SHARES
        if name in arguments.parts and name in cases
    ]


def device_name() -> str | None:
    """The GPU's name, or None; it is in use then."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def about(device: str) -> dict[str, Any]:
    """What the figures are of."""
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft, peft_eas)]
    return {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "command": shlex.join(["python", "examples/gpu/run.py", *sys.argv[1:]]),
    }


def main() -> None:
    arguments = parse_arguments()
    clock = Clock(time.monotonic() + 60 * arguments.minutes - RESERVE)
    apart, device = True, f"CPU ({platform.machine()})"
    if torch.device(arguments.device).type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Trainer would take a GPU
    else:
        try:
            with FORKED.Pool(1) as pool:
                device = pool.apply(device_name)
        except RuntimeError as error:  # it is in use here already
            print(f"No process of its own for a part: {error}", flush=True)
            apart, device = False, device_name()
        if device is None:
            raise SystemExit("There is no CUDA GPU here. For a rehearsal on the CPU: --device cpu --quick")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    records = Records(arguments.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        for part in make_parts(arguments, records, Path(folder)):
            run_part(part, records, clock, apart)
            report.write_report(records, arguments.output_dir, about(device))
    print((arguments.output_dir / "report.md").read_text())


if __name__ == "__main__":
    main()
