"""What the search costs: wall time of optimizer steps during it over plain steps with as many MHAs skipped.

    python -m examples.benchmark.search_cost

A Llama of random weights trains under Trainer with `EASCallback`. Blocks of search and blocks of plain steps, in which
the skip set stays the same, take turns in one run, so that whatever else the machine does meets both alike. A block is
as long as the interval between two rounds of rewards and holds one round, if it is of the search; by default, the
interval is that of a long run. Sets are of full size from the start, as the plain steps' are.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from examples.shared.measure import quartiles
from peft_eas import EASCallback, EASConfig, ThompsonSampling
from peft_eas.search.schedule import LONGEST_INTERVAL

NUM_SETS = 3  # EASCallback's default


class FullSize(ThompsonSampling):
    """The default strategy, but for training that begins with nothing skipped."""

    grows = False


class TakingTurns(EASCallback):
    """A callback that searches in every other block of `interval` steps, and times the blocks.

    Attributes:
        seconds: wall time of the blocks, plain and of the search in turns.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        block, step = divmod(state.global_step, self.interval)
        if step == 0:
            _wait_for_device()
            self._start = time.perf_counter()
        if block % 2:
            super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        block, step = divmod(state.global_step - 1, self.interval)
        if block % 2:
            super().on_step_end(args, state, control, **kwargs)
        if step == self.interval - 1:
            _wait_for_device()
            self.seconds.append(time.perf_counter() - self._start)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Runs `options.pairs` pairs of blocks, after two to warm up; returns seconds of plain and of search blocks."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.width,
            intermediate_size=3 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=options.width // 32,
        )
    )
    model = get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=options.skip))
    tokens = torch.randint(0, options.vocabulary, (256, options.tokens))
    labels = tokens.masked_fill(torch.arange(options.tokens) < options.tokens // 2, -100)
    data = [{"input_ids": ids, "labels": targets} for ids, targets in zip(tokens, labels)]
    steps = 2 * (options.pairs + 2) * options.interval
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            bf16=options.bf16,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        callback = TakingTurns(
            search_steps=steps, warmup_steps=0, interval=options.interval, strategy=FullSize, num_candidates=NUM_SETS
        )
        Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback]).train()
    plain, search = callback.seconds[4::2], callback.seconds[5::2]
    return [time / options.interval for time in plain], [time / options.interval for time in search]


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="pairs of a plain and a search block that are timed")
    parser.add_argument("--interval", type=int, default=LONGEST_INTERVAL, help="steps between rounds of rewards")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="length of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences per batch, in training and for rewards")
    parser.add_argument("--skip", type=int, default=6, help="MHAs that are skipped")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--threads", type=int, help="threads on the CPU; default: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    plain, search = measure(options)
    ratios = [b / a for a, b in zip(plain, search)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{options.layers} layers, width {options.width}, {options.skip} MHAs skipped, {options.batch} × "
        f"{options.tokens} tokens, rewards for {NUM_SETS} sets every {options.interval} steps; "
        f"{device}"
    )
    print(f"{'step':<24}{'median ms':>12}{'lowest ms':>12}")
    print(f"{'plain':<24}{1000 * statistics.median(plain):>12.1f}{1000 * min(plain):>12.1f}")
    print(f"{'search':<24}{1000 * statistics.median(search):>12.1f}{1000 * min(search):>12.1f}")
    low, median, high = quartiles(ratios)
    print(
        f"search / plain: {median:.3f} (median of {len(ratios)} pairs, quartiles {low:.3f} to "
        f"{high:.3f}); of the lowest times {min(search) / min(plain):.3f}"
    )


if __name__ == "__main__":
    main()
