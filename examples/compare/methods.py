"""The methods that examples.compare compares: what each puts into a base model, and what it chooses to skip.

A method is a function of the base model, which it changes, the task, the number of MHAs to skip, and the seed. It
returns the model to tune and the callbacks to tune it with. Data, steps and learning rate are the same for all.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, TrainerCallback

from examples.compare.das import LayerSkipping
from examples.shared.task import Task
from peft_eas import EASCallback, EASConfig, attention_similarities

CALIBRATION_BATCHES = 8


@dataclass
class Prepared:
    """A model to tune, and the callbacks to tune it with.

    `choice_seconds` is how long it took to choose what to skip, before the tuning; `merge_options` are for its
    `merge_and_unload`.
    """

    model: nn.Module
    callbacks: list[TrainerCallback] = field(default_factory=list)
    choice_seconds: float = 0.0
    merge_options: dict[str, Any] = field(default_factory=dict)


# The paper's adapters, of all methods but EAS as it comes: without output adapters, and the identity at first.
PAPER = {"fit_tokens": 0}
Method = Callable[[PreTrainedModel, Task, int, int], Prepared]


def nothing_skipped(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """Adapters at all MHAs, of which none is skipped."""
    return Prepared(get_peft_model(base, EASConfig(num_skip=0, **task.eas)), [EASCallback(**PAPER)])


def lora(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """PEFT's LoRA, on the projections that the task names."""
    config = LoraConfig(
        r=task.eas["attention_r"],
        lora_alpha=2 * task.eas["attention_r"],
        target_modules=task.lora_targets,
        modules_to_save=task.eas.get("modules_to_save"),
        task_type=task.eas.get("task_type"),
    )
    return Prepared(get_peft_model(base, config))


def das(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """Whole layers are skipped: as many as hold `num_skip` MHAs."""
    return Prepared(LayerSkipping(base, task.collate([task.train[0]]), num_skip, **task.eas), [bandit_search(task)])


def eas(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """EAS as the library comes: also with output adapters, and a start from a fit."""
    config = EASConfig(num_skip=num_skip, **adapters_of("eas", task))
    return Prepared(get_peft_model(base, config), [search_of("eas", task)])


def eas_pia(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """EAS with the library's search, and the paper's adapters for what is skipped."""
    model = get_peft_model(base, EASConfig(num_skip=num_skip, **task.eas))
    return Prepared(model, [search_of("eas_pia", task)])


def eas_bandit(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """EAS with the paper's search."""
    return Prepared(get_peft_model(base, EASConfig(num_skip=num_skip, **task.eas)), [bandit_search(task)])


def eas_prompt(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """EAS whose context is each prompt's own to the end, also in the merged model, which keeps its adapters."""
    model = get_peft_model(base, EASConfig(num_skip=num_skip, **task.eas))
    return Prepared(model, [bandit_search(task, freeze_context_at=None)], merge_options={"context": "prompt"})


def no_context(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """EAS with adapters that are told nothing of the prompt."""
    config = EASConfig(num_skip=num_skip, context="none", **task.eas)
    return Prepared(get_peft_model(base, config), [bandit_search(task)])


def random_choice(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """PIAs stand for MHAs drawn at random."""
    model = get_peft_model(base, EASConfig(num_skip=num_skip, **task.eas))
    model.base_model.fix_skipped_modules(random.Random(seed).sample(model.base_model.candidates, num_skip))
    return Prepared(model, [EASCallback(**PAPER)])


def cosine(base: PreTrainedModel, task: Task, num_skip: int, seed: int) -> Prepared:
    """PIAs stand for the MHAs that change least what passes them in the base, by cosine similarity (LLM-Drop)."""
    model = get_peft_model(base, EASConfig(num_skip=num_skip, **task.eas))
    start = time.perf_counter()
    count = min(CALIBRATION_BATCHES * task.batch_size, len(task.reward))
    samples = Subset(task.reward, random.Random(seed).sample(range(len(task.reward)), count))
    similarities = attention_similarities(
        model, DataLoader(samples, batch_size=task.batch_size, collate_fn=task.collate)
    )
    most_similar = sorted(similarities, key=similarities.get, reverse=True)[:num_skip]
    model.base_model.fix_skipped_modules(most_similar)
    return Prepared(model, [EASCallback(**PAPER)], time.perf_counter() - start)


def adapters_of(method: str, task: Task) -> dict[str, Any]:
    """What `EASConfig` is given of the adapters: the task's, which are the paper's, and for EAS as it comes more."""
    return {**task.eas, "output_r": None} if method == "eas" else task.eas


def search_of(method: str, task: Task) -> EASCallback:
    """The search of a method: the library's for `eas` and `eas_pia`, else the paper's."""
    if method == "eas":
        return EASCallback(reward_dataset=task.reward)
    return EASCallback(reward_dataset=task.reward, **PAPER) if method == "eas_pia" else bandit_search(task)


def bandit_search(task: Task, **settings: Any) -> EASCallback:
    """The paper's search, which all other methods that search have, but for `settings`."""
    return EASCallback(
        reward_dataset=task.reward,
        strategy="bandit",
        interval=max(1, min(10, task.steps // 150)),
        **PAPER,
        **settings,
    )


METHODS: dict[str, Method] = {
    function.__name__: function
    for function in (
        nothing_skipped,
        lora,
        das,
        cosine,
        random_choice,
        no_context,
        eas_prompt,
        eas_bandit,
        eas_pia,
        eas,
    )
}
LABELS = {  # what tables call them
    "nothing_skipped": "adapters, nothing skipped",
    "lora": "LoRA",
    "das": "DAS, whole layers",
    "cosine": "cosine similarity + PIA",
    "random_choice": "random + PIA",
    "no_context": "EAS, PIA without context",
    "eas_prompt": "EAS, each prompt's own context",
    "eas_bandit": "EAS, the paper's bandit",
    "eas_pia": "EAS, the paper's adapters",
    "eas": "EAS",
}
SKIPS_NOTHING = ("nothing_skipped", "lora")
