"""Redundancy that is known: the search finds the MHAs whose output projections are zero, and only those.

A small Llama learns to repeat a random sequence, which takes attention, with the output projections of some MHAs held
at zero. Skipping those changes nothing; skipping any other ruins the loss.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_eas import AttentionBandit, EASCallback, EASConfig

LAYERS, PLANTED = 8, (0, 2, 4, 7)
VOCAB, LENGTH = 16, 8
SEEDS = range(10)
INTERVAL = 10  # optimizer steps per round of rewards, EASCallback's default
MAX_ROUNDS = 60
NAMES = [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
PLANTED_NAMES = [NAMES[i] for i in PLANTED]


def make_batch(size: int, seed: int) -> dict[str, torch.Tensor]:
    """Random sequences and their repetition, which is the answer but for its first token."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(0, VOCAB, (size, LENGTH), generator=generator)
    ids = torch.cat([half, half], dim=1)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(2 * LENGTH) <= LENGTH, -100)}


def train_base(seed: int, steps: int = 150) -> LlamaForCausalLM:
    """A Llama that repeats sequences, and that fails to without any one of the MHAs that are not planted."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, pad_token_id=None, **sizes))
    outputs = [layer.self_attn.o_proj for layer in model.model.layers]
    for layer in PLANTED:
        torch.nn.init.zeros_(outputs[layer].weight)
        outputs[layer].requires_grad_(False)
    others = [layer for layer in range(LAYERS) if layer not in PLANTED]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        batch = make_batch(64, seed=1000 * seed + step)
        model(**batch).loss.backward()
        # Left to itself, training comes to need two or three attentions. That all matter is made part of the task.
        handle = outputs[others[step % len(others)]].register_forward_hook(lambda *inputs: 0.0 * inputs[-1])
        torch.relu(1.0 - model(**batch).loss).backward()
        handle.remove()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def loss_of(model: PeftModel, names: list[str], batch: dict[str, torch.Tensor]) -> float:
    model.base_model.set_skipped_modules(names)
    return model(**batch).loss.item()


@pytest.fixture(scope="module")
def base() -> PeftModel:
    """The trained model, with the adapters as they start: "attention dropped" where an MHA is skipped."""
    model = get_peft_model(train_base(seed=0), EASConfig(task_type="CAUSAL_LM", num_skip=len(PLANTED))).eval()
    batch = make_batch(256, seed=10**6)
    whole = loss_of(model, [], batch)
    assert whole < 0.05
    for name in NAMES:
        alone = loss_of(model, [name], batch)
        assert alone == whole if name in PLANTED_NAMES else alone > 0.5, name
    return model


@pytest.fixture(scope="module")
def loss(base: PeftModel) -> Callable[[list[str], int], float]:
    """Loss of a skip set on one of ten held-out batches, computed once."""

    @cache
    def of(names: tuple[str, ...], number: int) -> float:
        return loss_of(base, list(names), make_batch(32, seed=10**7 + number))

    return lambda names, number: of(tuple(names), number % 10)


def rounds_to_find(bandit: AttentionBandit, loss: Callable[[list[str], int], float], factor: float) -> int | None:
    """Rounds after which the best set is the planted one and stays it, or None; `factor` scales every loss."""
    found = None
    for number in range(MAX_ROUNDS):
        sets = bandit.sample_sets(3)
        bandit.update(sets, [factor * loss(names, number) for names in sets], step=INTERVAL * number)
        if bandit.best() != PLANTED_NAMES:
            found = None
        elif found is None:
            found = number + 1
    return found


@pytest.mark.parametrize("level", [None, 0.01, 8.0], ids=["as it is", "scaled to 0.01", "scaled to 8"])
def test_the_search_finds_exactly_the_planted_for_every_seed(loss, capsys, level):
    drawn = AttentionBandit(NAMES, len(PLANTED)).sample_sets(20)
    mean = sum(loss(names, number) for number, names in enumerate(drawn)) / len(drawn)
    factor = 1.0 if level is None else level / mean
    rounds = [rounds_to_find(AttentionBandit(NAMES, len(PLANTED), seed=seed), loss, factor) for seed in SEEDS]
    steps = ["not found" if number is None else str(number * INTERVAL) for number in rounds]
    with capsys.disabled():
        print(f"\nplanted redundancy, mean loss {factor * mean:.3g}: steps to find it, by seed: {', '.join(steps)}")
    assert None not in rounds


def test_the_callback_finds_exactly_the_planted_while_it_trains(base, tmp_path):
    samples = make_batch(2000, seed=5)
    data = [{name: value[i] for name, value in samples.items()} for i in range(2000)]
    trainer = Trainer(
        base,
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=400,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data[:1600],
        eval_dataset=data[1600:],
        callbacks=[EASCallback(search_steps=0.9, warmup_steps=0.05, freeze_context_at=0.95)],
    )
    trainer.train()
    assert base.base_model.skipped_modules == PLANTED_NAMES
