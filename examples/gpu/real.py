"""A real model on a real task: LoRA, adapters with nothing skipped, and EAS, as many steps as there is time for."""

import csv
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.compare.methods import METHODS
from examples.compare.runs import count_mhas, run
from examples.gpu.parts import Case, Clock, Records
from examples.shared.banking77 import banking77
from examples.shared.smollm2 import load_folder
from examples.shared.task import Task, tune

RUNS = ("nothing_skipped", "eas", "lora")
SHARE = 0.5
PROBE_STEPS = 12
FEWEST, MOST = 20, 600  # steps of a run
MARGIN = 1.2  # by which a run takes longer than its steps and its answers


def cases(
    part: str, model: Path, data: Path, records: Records, device: str, num_test: int | None, most: int, rounds: int
) -> Callable[[Clock], Iterator[Case]]:
    """A short run that tells how long a step takes, and then the runs, all of as many steps, `most` of them at most.

    Of the test queries `num_test` are answered; speed is timed in `rounds` paired rounds.
    """

    def make_cases(clock: Clock) -> Iterator[Case]:
        transformers.utils.logging.set_verbosity_error()
        has_gpu = torch.device(device).type == "cuda"
        base, tokenizer = load_folder(model, torch.bfloat16 if has_gpu else torch.float32)
        task = banking77(data, base, tokenizer, num_test)
        yield "steps", lambda: choose_steps(task, clock, most)
        chosen = records.figures(part, "steps")
        if chosen is None:
            raise RuntimeError("without the short run it is not known how many steps there is time for")
        task = dataclasses.replace(task, steps=chosen["steps"])
        num_mhas = count_mhas(task)
        for name in RUNS:
            share = 0.0 if name != "eas" else SHARE
            yield name, lambda name=name, share=share: run(task, num_mhas, name, share, 0, rounds)

    return make_cases


def choose_steps(task: Task, clock: Clock, most: int) -> dict[str, Any]:
    """How many steps each run has time for, by a short one with its test."""
    peft_model = METHODS["nothing_skipped"](task.load_base(), task, 0, 0).model
    with TemporaryDirectory() as folder:
        start = time.monotonic()
        trainer = tune(peft_model, task, Path(folder), progress=False, max_steps=PROBE_STEPS)
        step = (time.monotonic() - start) / PROBE_STEPS
    start = time.monotonic()
    task.score(trainer.model.eval())
    answers = time.monotonic() - start
    per_run = clock.left / (MARGIN * len(RUNS)) - answers
    steps = int(min(most, max(FEWEST, per_run / step)))
    return {"steps": steps, "seconds_per_step": step, "seconds_of_answers": answers}


# --- a rehearsal -----------------------------------------------------------------------------------------------------


def write_stand_in(folder: Path) -> None:
    """Writes a tiny model of random weights and a few made-up queries, in the form of the real ones, into `folder`."""
    intents = {"card_arrival": "when does my card come", "top_up_failed": "why did my payment fail"}
    rows = [
        {"text": f"{start} {query} {end}", "category": intent}
        for (intent, query), start, end in itertools.product(intents.items(), ("hi", "please"), range(20))
    ]
    for name, part in (("train.csv", rows), ("test.csv", rows[::9])):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("text", "category"))
            writer.writeheader()
            writer.writerows(part)
    words = sorted({word for row in rows for word in f"{row['text']} {row['category'].replace('_', ' ')}".split()})
    words = ["<pad>", "<eos>", "<unk>", "Query", "Intent", ":", *words]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
