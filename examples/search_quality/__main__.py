"""Compares how well searches choose what to skip, at equal budgets of evaluations.

    python -m examples.search_quality --data SCIENCEQA --banking77 BANKING77   # all parts; stop and start it at will
    python -m examples.search_quality --parts minilm --banking77 BANKING77 --methods thompson bandit
    python -m examples.search_quality --report                   # only table and picture, from the finished runs

The parts are `smollm2`, a language model without any training, of whose 30 attentions 8, 12 or 15 are dropped;
`smollm2-fitted`, the same with fitted adapters in the place of 12, 15 or 20; `minilm` and `meter`, models so small
that every set of their 6 and 8 candidates is tried, so that one knows the best; and `tuned`, in which MiniLM is tuned
with what a search finds on the way, and with every set. A score is the mean loss on batches that no search has seen.

All losses, runs and scores are kept in --output-dir, as lines of JSON. What is there is not computed again, and
methods share the losses. table.md and loss_against_evaluations.png are written anew after every part.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from examples.search_quality import meter, minilm, smollm2, tuned
from examples.search_quality.methods import METHODS
from examples.search_quality.problem import Problem
from examples.search_quality.report import write_report
from examples.search_quality.runs import run, score_sets


@dataclass(frozen=True)
class Part:
    """A problem of the benchmark.

    Attributes:
        load: makes the problem, given the command's arguments.
        sizes: numbers of candidates to skip. seeds: of the methods. is_small: whether every set is tried.
    """

    load: Callable[[argparse.Namespace], Problem]
    sizes: Sequence[int]
    seeds: Sequence[int]
    is_small: bool


PROBLEMS = {
    "smollm2": Part(lambda args: smollm2.problem(args.data, args.output_dir), smollm2.NUM_SKIP, range(3), False),
    "smollm2-fitted": Part(
        lambda args: smollm2.problem(args.data, args.output_dir, is_fitted=True),
        smollm2.NUM_SKIP_FITTED,
        range(3),
        False,
    ),
    "minilm": Part(lambda args: minilm.problem(args.banking77, args.output_dir), minilm.NUM_SKIP, range(10), True),
    "meter": Part(lambda args: meter.problem(args.output_dir), meter.NUM_SKIP, range(10), True),
}
PARTS = (*PROBLEMS, "tuned")
# The argument that a part needs.
DATA = {"smollm2": "data", "smollm2-fitted": "data", "minilm": "banking77", "tuned": "banking77"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", type=Path, metavar="DIR", help="ScienceQA's folder, with problems.json")
    parser.add_argument("--banking77", type=Path, metavar="DIR", help="BANKING77's folder, with train.csv")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="of the methods (default: 3 for SmolLM2, 10 elsewhere)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/search_quality"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for part in () if arguments.report else arguments.parts:
        if part in DATA and getattr(arguments, DATA[part]) is None:
            parser.error(f"the part {part} needs --{DATA[part]} DIR; or choose --parts that do not")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name in () if arguments.report else arguments.parts:
        if name == "tuned":
            tuned.run(arguments.banking77, folder)
        else:
            part = PROBLEMS[name]
            problem = part.load(arguments)
            score_sets(name, problem, [0, *part.sizes] if part.is_small else [0], folder)
            run(name, problem, part.sizes, arguments.methods, arguments.seeds or part.seeds, folder)
        write_report(folder)
    write_report(folder)
    print((folder / "table.md").read_text())


if __name__ == "__main__":
    main()
