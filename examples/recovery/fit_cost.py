"""What the fit of one block costs at the shapes of a large model, and from that the fit of the whole.

    python -m examples.recovery.fit_cost                                          # a 7B Llama's block, on the CPU
    python -m examples.recovery.fit_cost --device cuda --dtype bfloat16

The block has random weights, which change nothing about the time: on a CPU, the processor's. Each MHA is fitted by
itself, so the whole takes as many times as long as there are blocks, and what the passes take through all of them.
"""

import argparse
import time

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from examples.benchmark.variants import SHAPES
from examples.shared.measure import synchronize
from examples.shared.peak_memory import peak_memory
from peft_eas import EASConfig, fit_adapters

LENGTH = 512  # tokens of a sequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--tokens", type=int, default=8192, help="to fit to")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = SHAPES[arguments.shape]
    config = LlamaConfig(vocab_size=1000, **{**sizes, "num_hidden_layers": 1})
    model = LlamaForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype))
    model = get_peft_model(model, EASConfig(task_type="CAUSAL_LM", num_skip=1))
    ids = torch.randint(1000, (-(-arguments.tokens // LENGTH), LENGTH), device=arguments.device)
    batches = [{"input_ids": row[None]} for row in ids]
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    with peak_memory(arguments.device) as peak:
        start = clock()
        fit_adapters(model, batches, num_tokens=arguments.tokens, progress_bar=False)
        synchronize(batches[0])
        seconds = clock() - start
    blocks = sizes["num_hidden_layers"]
    print(
        f"One block of the shape {arguments.shape}, {arguments.dtype}, {arguments.device}: {seconds:.0f} s for "
        f"{arguments.tokens:,} tokens, {peak.bytes / 2**30:.1f} GiB beside the weights. The {blocks} blocks of the "
        f"model: about {blocks * seconds / 60:.0f} minutes."
    )


if __name__ == "__main__":
    main()
