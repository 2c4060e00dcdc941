"""What a training step takes: tokens/s and memory of LoRA, of adapters with nothing skipped, and of EAS.

A model of random weights in bfloat16 trains on random tokens by a plain loop. EAS is timed while it searches, with its
rounds of rewards, and after, when the set is fixed; the difference is what the search costs.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from examples.benchmark.fold_cost import seconds_of
from examples.benchmark.variants import load_base
from examples.gpu.parts import Case, Clock
from examples.gpu.speed import free_memory, weights_bytes
from examples.shared.measure import num_parameters
from examples.shared.peak_memory import peak_memory
from peft_eas import EASConfig, EASSearch


@dataclass(frozen=True)
class Sizes:
    """What is measured: the shape of the model, sequences and tokens of a batch, and the steps of a timing."""

    shape: str = "1b"
    dtype: torch.dtype = torch.bfloat16
    batch: int = 8
    tokens: int = 512
    steps: int = 20  # two rounds of rewards, at their default interval


QUICK = Sizes(shape="tiny", dtype=torch.float32, batch=2, tokens=8)


def cases(sizes: Sizes, device: str) -> Callable[[Clock], Iterator[Case]]:
    """A case for each method, without and with gradient checkpointing."""

    def make_cases(_: Clock) -> Iterator[Case]:
        for checkpointing in (False, True):
            for name, measure in METHODS.items():
                label = f"{name}{', gradient checkpointing' if checkpointing else ''}"
                yield label, lambda m=measure, c=checkpointing: m(sizes, c, device) | {"checkpointing": c}
                free_memory()

    return make_cases


class Loop:
    """A training loop over one batch: a forward and a backward pass, and a step of AdamW."""

    def __init__(self, model: PeftModel, sizes: Sizes, checkpointing: bool, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 1000, (sizes.batch, sizes.tokens), generator=generator).to(device)
        labels = ids.masked_fill(torch.arange(sizes.tokens, device=device) < sizes.tokens // 2, -100)
        self.batch = {"input_ids": ids, "labels": labels, "use_cache": False}
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.sizes, self.device = sizes, device
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(self) -> None:
        """One optimizer step."""
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, step: Callable[[], None] | None = None) -> dict[str, Any]:
        """Seconds per step, (mean over all, and the median), tokens/s, and the most memory beside the weights."""
        step = step or self.step
        for _ in range(3):  # to warm up
            self.step()
        times = [seconds_of(step, self.device) for _ in range(self.sizes.steps)]
        with peak_memory(self.device) as peak:
            self.step()
        mean = statistics.mean(times)
        return {
            "seconds_per_step": mean,
            "median_seconds": statistics.median(times),
            "tokens_per_second": self.sizes.batch * self.sizes.tokens / mean,
            "extra_bytes": peak.bytes,
            "weights_bytes": weights_bytes(self.model),
            "trainable_parameters": num_parameters(self.model, trainable=True),
        }


def base_of(sizes: Sizes, device: str) -> nn.Module:
    """A fresh base."""
    return load_base(None, sizes.shape, sizes.dtype, device)


def lora(sizes: Sizes, checkpointing: bool, device: str) -> dict[str, Any]:
    """LoRA of rank 16 on all projections."""
    config = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    return Loop(get_peft_model(base_of(sizes, device), config), sizes, checkpointing, device).measure()


def nothing_skipped(sizes: Sizes, checkpointing: bool, device: str) -> dict[str, Any]:
    """Adapters at all attentions."""
    model = get_peft_model(base_of(sizes, device), EASConfig(task_type="CAUSAL_LM", num_skip=0))
    return Loop(model, sizes, checkpointing, device).measure()


def eas(sizes: Sizes, checkpointing: bool, device: str) -> dict[str, Any]:
    """EAS with half of the attentions skipped: while it searches (the figures), and after it (under "tuning")."""
    base = base_of(sizes, device)
    half = base.config.num_hidden_layers // 2
    model = get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=half))
    loop = Loop(model, sizes, checkpointing, device)
    held_out = dict(loop.batch)
    search = EASSearch(
        model,
        2 * sizes.steps,
        lambda batch: model(**batch).loss,
        [held_out],
        search_steps=sizes.steps,
        warmup_steps=0,
        optimizer=loop.optimizer,
    )

    def step() -> None:
        search.before_step()
        loop.step()
        search.after_step()

    searching = loop.measure(step)
    assert not search.is_searching
    tuning = loop.measure()
    share = 1 - tuning["seconds_per_step"] / searching["seconds_per_step"]
    return searching | {"tuning": tuning, "share_of_the_search": share}


METHODS: dict[str, Callable[[Sizes, bool, str], dict[str, Any]]] = {
    "LoRA": lora,
    "adapters, nothing skipped": nothing_skipped,
    "EAS": eas,
}
