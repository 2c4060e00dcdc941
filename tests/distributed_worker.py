"""One rank of the runs that test_distributed.py starts, and what this rank saw of them.

Arguments: a folder, and the sequences per rank and micro-batch.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_eas import EASCallback, EASConfig, EASSearch

# With torch 2.6 FSDP2 needs a GPU.
CAN_SHARD = not torch.__version__.startswith("2.6.")
STEPS, ACCUMULATION = 20, 2
# Warm-up to 4, rounds at 6, 8, 10, 12, the set fixed at 12, the context frozen at 16.
SCHEDULE = {"search_steps": 12, "warmup_steps": 4, "interval": 2, "freeze_context_at": 16, "seed": 0}
WHOLE = StateDictOptions(full_state_dict=True)


def make_model() -> PeftModel:
    """A tiny Llama without dropout; the same on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, pad_token_id=0, initializer_range=0.3))
    return get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4, dropout=0.0))


def make_data(size: int, seed: int, equal_answers: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 50, (size, 12), generator=generator)
    first = torch.randint(3, 10, (size, 1), generator=generator)
    labels = tokens.where(torch.arange(12) >= (6 if equal_answers else first), -100)
    return [{"input_ids": ids, "labels": targets} for ids, targets in zip(tokens, labels)]


class Record:
    """The skip set of every micro-batch, the running contexts after every optimizer step, and how it all ended."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.skip_sets: list[list[str]] = []
        self.contexts: list[torch.Tensor] = []

    def note_micro_batch(self) -> None:
        self.skip_sets.append(self.model.base_model.skipped_modules)

    def note_step(self) -> None:
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())  # once frozen a parameter
        contexts = dict(sorted((name, value) for name, value in tensors if name.endswith("running_context")))
        self.contexts.append(torch.cat(list(contexts.values())).detach().clone())

    def result(self) -> dict:
        weights = get_model_state_dict(self.model, options=WHOLE).items()
        adapters = {name: value.clone() for name, value in weights if ".eas_" in name}
        return {
            "skip_sets": self.skip_sets,
            "contexts": self.contexts,
            "skipped": self.model.base_model.skipped_modules,
            "adapters": adapters,
        }


class Recorder(TrainerCallback):
    def __init__(self, record: Record) -> None:
        self.record = record

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self.record.note_micro_batch()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.record.note_step()


def run_trainer(folder: Path, batch_size: int, resume_from: Path | None = None) -> dict:
    """A run under Trainer, whose loss is normalised by the answers' tokens on all ranks."""
    record = Record(make_model())
    trainer = Trainer(
        record.model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=ACCUMULATION,
            optim="sgd",
            learning_rate=0.3,
            save_steps=8,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=make_data(200, seed=1, equal_answers=False),
        callbacks=[EASCallback(reward_dataset=make_data(40, seed=2, equal_answers=True), **SCHEDULE)],
    )
    trainer.add_callback(Recorder(record))
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return record.result()


def run_by_hand(folder: Path, batch_size: int, resume_from: int | None = None) -> dict:
    """A loop with accelerate, which saves itself at step 8 and at step 14, or goes on from there."""
    distributed = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, kwargs_handlers=[distributed])
    record = Record(make_model())
    optimizer = torch.optim.SGD([p for p in record.model.parameters() if p.requires_grad], lr=0.1)
    data = make_data(batch_size * accelerator.num_processes * STEPS * ACCUMULATION, seed=1, equal_answers=True)
    held_out = make_data(40, seed=2, equal_answers=True)
    model, optimizer, loader, eval_loader = accelerator.prepare(
        record.model.train(), optimizer, DataLoader(data, batch_size), DataLoader(held_out, batch_size)
    )
    search = EASSearch(model, STEPS, lambda batch: model(**batch).loss, list(eval_loader), **SCHEDULE)
    if resume_from is not None:
        search.load_state_dict(json.loads((folder / f"{resume_from}.json").read_text()))
        accelerator.load_state(str(folder / str(resume_from)))
        loader = accelerator.skip_first_batches(loader, resume_from * ACCUMULATION)
    for batch in loader:
        with accelerator.accumulate(model):
            search.before_step()
            record.note_micro_batch()
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            search.after_step(loss)
            record.note_step()
            if search.step in (8, 14) and resume_from is None:
                accelerator.save_state(str(folder / str(search.step)))
                (folder / f"{search.step}.json").write_text(json.dumps(search.state_dict()))
                accelerator.wait_for_everyone()
    return record.result()


def run_sharded(folder: Path, batch_size: int, resume_from: int | None = None) -> dict:
    """A loop with FSDP2 where there are several ranks, which saves itself at steps 8 and 14, or goes on from there."""
    is_distributed = torch.distributed.is_initialized()
    rank, num_ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed else (0, 1)
    model = make_model().train()
    if is_distributed:  # as accelerate does, which has FSDP on accelerators only
        shard(model)
    record = Record(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)
    data = make_data(batch_size * num_ranks * STEPS, seed=1, equal_answers=True)
    batches, held_out = (
        list(DataLoader(samples, batch_size))[rank::num_ranks]
        for samples in (data, make_data(40, seed=2, equal_answers=True))
    )
    search = EASSearch(model, STEPS, lambda b: model(**b).loss, held_out, optimizer=optimizer, **SCHEDULE)
    if resume_from is not None:
        saved = torch.load(folder / f"{resume_from}.pt")
        search.load_state_dict(saved["search"])
        set_model_state_dict(model, saved["model"], options=WHOLE)
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=WHOLE)
    for batch in batches[search.step :]:
        search.before_step()
        record.note_micro_batch()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        search.after_step(loss)
        record.note_step()
        if search.step in (8, 14, 18) and resume_from is None and is_distributed:
            state = {
                "search": search.state_dict(),
                "model": get_model_state_dict(model, options=WHOLE),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
            }
            if rank == 0:
                folder.mkdir(exist_ok=True)
                torch.save(state, folder / f"{search.step}.pt")
            torch.distributed.barrier()
    result = record.result()
    if is_distributed:
        model.save_pretrained(
            folder / "adapter", state_dict=get_model_state_dict(model, options=WHOLE), is_main_process=rank == 0
        )
        try:
            model.merge_and_unload()
        except ValueError as error:
            result["merge refused"] = str(error)
    inputs = torch.arange(3, 21).reshape(2, 9)
    result["logits"] = model.eval()(input_ids=inputs).logits.detach()
    if is_distributed:
        torch.distributed.barrier()
        loaded = PeftModel.from_pretrained(make_model().unload(), folder / "adapter").eval()
        shard(loaded)  # the frozen contexts too
        result["logits of the shards"] = loaded(input_ids=inputs).logits.detach()
        result["state of the shards"] = get_model_state_dict(loaded, options=WHOLE)
    return result


def shard(model: PeftModel) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*model.base_model.model.model.layers, model):
        fully_shard(module, mesh=mesh)


def refused_without_unused_parameters() -> str:
    model = Accelerator(cpu=True).prepare(make_model())
    try:
        EASSearch(model, STEPS, lambda batch: model(**batch).loss, **SCHEDULE)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path, batch_size: int) -> None:
    torch.set_num_threads(1)
    seen = {
        "trainer": run_trainer(folder / "trainer", batch_size),
        "by hand": run_by_hand(folder / "by_hand", batch_size),
    }
    if CAN_SHARD:
        seen["sharded"] = run_sharded(folder / "sharded", batch_size)
    is_distributed = torch.distributed.is_initialized()
    if is_distributed:
        for step in (8, 16):
            checkpoint = folder / f"trainer/checkpoint-{step}"
            seen[f"trainer, resumed from {step}"] = run_trainer(folder / "resumed", batch_size, checkpoint)
        for step in (8, 14):
            seen[f"by hand, resumed from {step}"] = run_by_hand(folder / "by_hand", batch_size, step)
        for step in (8, 14, 18) if CAN_SHARD else ():
            seen[f"sharded, resumed from {step}"] = run_sharded(folder / "sharded", batch_size, step)
        seen["refused"] = refused_without_unused_parameters()
    rank = torch.distributed.get_rank() if is_distributed else 0
    torch.save(seen, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
