"""What the fit is worth without any training: SmolLM2-135M with attentions dropped, on science text.

    python -m examples.recovery.untuned --data SCIENCEQA                       # 12 of 30 dropped, ranks 0 and 32

The attentions that change least what passes them are dropped. The adapters that stand for them are fitted to 8,192
tokens, and the loss is that on other pieces of text.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from examples.search_quality.smollm2 import TOKENS, read_text
from examples.shared.measure import markdown_table
from examples.shared.smollm2 import load_smollm2
from peft_eas import EASConfig, attention_similarities, fit_adapters

BATCH = 8  # pieces
NUM_SCORED = 64  # pieces


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", required=True, help="ScienceQA's folder")
    parser.add_argument("--num-skip", type=int, default=12)
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 32], help="of the output adapters")
    parser.add_argument("--tokens", type=int, default=8192, help="to fit to")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


@torch.no_grad()
def mean_loss(model: PeftModel, pieces: Tensor) -> float:
    """The loss on `pieces` of text, (pieces, tokens)."""
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in pieces.split(BATCH)]
    return sum(losses) / len(losses)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    base, tokenizer = load_smollm2()
    ids = torch.tensor(tokenizer(read_text(arguments.data)).input_ids)
    pieces = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    scored, others = pieces[:NUM_SCORED], pieces[NUM_SCORED:]
    batches = [{"input_ids": batch} for batch in others[: -(-arguments.tokens // TOKENS)].split(BATCH)]

    options = {"task_type": "CAUSAL_LM", "attention_r": 0}
    model = get_peft_model(base, EASConfig(num_skip=1, **options)).eval()
    similarities = attention_similarities(model, batches)
    whole, base = mean_loss(model, scored), model.unload()
    skipped = sorted(similarities, key=similarities.get, reverse=True)[: arguments.num_skip]
    rows = [["", "loss", "gap closed", "seconds"], ["nothing skipped", f"{whole:.3f}", "", ""]]
    for rank in arguments.ranks:
        torch.manual_seed(0)
        model = get_peft_model(base, EASConfig(skipped_modules=skipped, output_r=rank, **options)).eval()
        before = mean_loss(model, scored)
        if len(rows) == 2:
            rows.append([f"{len(skipped)} dropped", f"{before:.3f}", "0 %", ""])
        start = time.process_time()
        fit_adapters(model, batches, num_tokens=arguments.tokens)
        seconds, after = time.process_time() - start, mean_loss(model, scored)
        name = "fitted, PIA of rank 32" + (f", output adapter of rank {rank}" if rank else "")
        rows.append([name, f"{after:.3f}", f"{100 * (before - after) / (before - whole):.0f} %", f"{seconds:.0f}"])
        base = model.unload()
    print(f"Dropped: {', '.join(skipped)}\n\n{markdown_table(rows)}\n\nSeconds of CPU time, of the fit.")


if __name__ == "__main__":
    main()
