"""Converts a checkpoint of the released METER: `python -m examples.meter.convert meter.ckpt my-meter`.

The folder can then be loaded with the classes of examples/meter/modeling_meter.py, under an Auto class or their own.
A checkpoint of the pretraining gives the start for every task: `MeterForVisualQuestionAnswering.from_pretrained`, for
instance, takes its body and starts a new head. For `MeterForImagesAndTextClassification`, convert it with --pairs.
"""

import argparse
from pathlib import Path

from examples.meter.conversion import convert, read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="the released file (.ckpt)")
    parser.add_argument("output", type=Path, help="folder for the converted model")
    parser.add_argument("--image-size", type=int, help="in pixels, if other than the checkpoint's")
    parser.add_argument("--pairs", action="store_true", help="give the second image of a pair a token type (NLVR2)")
    arguments = parser.parse_args()
    model = convert(read_checkpoint(arguments.checkpoint), arguments.image_size, arguments.pairs)
    model.save_pretrained(arguments.output)
    number = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {number:,} parameters, saved in {arguments.output}")


if __name__ == "__main__":
    main()
