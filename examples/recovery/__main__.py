"""What wins back the accuracy that skipping costs: an ablation of the adapters' start, and of the output adapter.

    python -m examples.recovery --data BANKING77                     # MiniLM, three seeds; stop and start it at will
    python -m examples.recovery --data BANKING77 --models smollm2 --seeds 0
    python -m examples.recovery --scienceqa SCIENCEQA --models smollm2-scienceqa --seeds 0
    python -m examples.recovery --report                             # only table and picture, from the finished runs

A model is tuned with the same attentions skipped from the start, those that change least what passes them, for each of
the variants in variants.py: same steps, same data, same seeds. They are held against the same adapters with nothing
skipped, and against LoRA. The models are `minilm`, all-MiniLM-L6-v2 (6 attentions) as a classifier of a bank's
queries; `smollm2`, SmolLM2-135M (30), which writes the query's intent; and `smollm2-scienceqa`, the same, which names
the letter of the right choice.

Each run is a line of runs.jsonl in --output-dir, and not made again. table.md and accuracy.png are written anew at the
end.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from examples.recovery.report import write_report
from examples.recovery.runs import run
from examples.recovery.scienceqa import scienceqa_task
from examples.recovery.variants import REFERENCES, VARIANTS
from examples.shared.banking77 import banking77
from examples.shared.minilm import load_queries, minilm_task
from examples.shared.smollm2 import load_smollm2
from examples.shared.task import Task


@dataclass(frozen=True)
class Model:
    """A model of the ablation.

    Attributes:
        load: makes the task, given the data's folder and the output folder. sizes: numbers of attentions to skip.
        data: the argument that names the data's folder.
    """

    load: Callable[[Path, Path], Task]
    sizes: Sequence[int]
    data: str = "data"


def _minilm(data: Path, folder: Path) -> Task:
    return minilm_task(load_queries(data), folder / "minilm", steps=300)


def _smollm2(data: Path, folder: Path) -> Task:
    return banking77(data, *load_smollm2(), num_test=300, validate=True, steps=200, batch_size=16)


def _scienceqa(data: Path, folder: Path) -> Task:
    return scienceqa_task(data)


MODELS = {
    "minilm": Model(_minilm, (3, 4)),
    "smollm2": Model(_smollm2, (15, 22)),
    "smollm2-scienceqa": Model(_scienceqa, (15, 22), "scienceqa"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="BANKING77's folder, with train.csv")
    parser.add_argument("--scienceqa", type=Path, metavar="DIR", help="ScienceQA's folder, with problems.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *REFERENCES], default=[*VARIANTS, *REFERENCES])
    parser.add_argument("--num-skip", nargs="+", type=int, help="(default: half, and more)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/recovery"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for name in () if arguments.report else arguments.models:
        if getattr(arguments, MODELS[name].data) is None:
            parser.error(f"--{MODELS[name].data} DIR is needed for {name}; or --report")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in () if arguments.report else arguments.models:
        model = MODELS[name]
        sizes = arguments.num_skip or model.sizes
        run(model.load(getattr(arguments, model.data), folder), sizes, arguments.variants, arguments.seeds, folder)
    write_report(folder)
    print((folder / "table.md").read_text())


if __name__ == "__main__":
    main()
