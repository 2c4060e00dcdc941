import argparse
from pathlib import Path

import torch
import transformers

from examples.search_quality.methods import METHODS
from examples.search_quality.runs import run
from examples.search_quality.smollm2 import NUM_SKIP, smollm2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    problem = smollm2(arguments.data, arguments.output_dir)
    print("score with nothing skipped", problem.score(()), flush=True)
    run("smollm2", problem, NUM_SKIP, arguments.methods, arguments.seeds, arguments.output_dir)


if __name__ == "__main__":
    main()
