"""Convert the original files of Llama and CLIP, and a released LaVIN or LaVIN-EAS adapter, to this project's.

    python -m examples.lavin.convert --llama weights/7B --clip clip.pth --adapter sqa-llama-7b.pth --output lavin-7b

writes lavin-7b/base, a LaVIN to load with `AutoModelForImageTextToText` once `examples.lavin.modeling_lavin` is
imported, and lavin-7b/adapter, to load on it with `PeftModel.from_pretrained`. See conversion.py for what is exact.
"""

import argparse
from pathlib import Path

import torch

from examples.lavin.conversion import convert


def layers(text: str) -> list[int]:
    """Numbers of layers, such as "3,7"."""
    return [int(index) for index in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="folder with params.json and consolidated.*.pth")
    parser.add_argument("--clip", type=Path, required=True, help="weights of CLIP ViT-L/14 by their original names")
    parser.add_argument("--adapter", type=Path, help="a released checkpoint; without it, only the base is converted")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: as for --llama, or above)")
    parser.add_argument(
        "--skip", type=layers, help="layers that a LaVIN-EAS adapter skips, such as 3,7 (default: as it says)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float16", help="of the base")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    convert(
        arguments.llama,
        arguments.clip,
        arguments.adapter,
        arguments.output,
        arguments.tokenizer,
        arguments.skip,
        getattr(torch, arguments.dtype),
    )


if __name__ == "__main__":
    main()
