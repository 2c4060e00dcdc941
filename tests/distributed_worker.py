"""One rank of the run that test_distributed.py starts: a short search under Trainer, and what this rank saw of it."""

import os
import sys

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_eas import EASCallback, EASConfig


class Recorder(TrainerCallback):
    """Keeps the skip set of every optimizer step and the running contexts after it."""

    def __init__(self) -> None:
        self.skip_sets: list[list[str]] = []
        self.contexts: list[torch.Tensor] = []

    def on_substep_end(self, args, state, control, model, **kwargs) -> None:
        self.skip_sets.append(model.base_model.skipped_modules)

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("running_context")]
        self.contexts.append(torch.cat(buffers).clone())


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, pad_token_id=0))
    model = get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=2, r=8, attention_r=4))
    tokens = torch.randint(3, 50, (200, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :6] = -100
    data = [{"input_ids": ids, "labels": targets} for ids, targets in zip(tokens, labels)]
    recorder = Recorder()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=40,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        callbacks=[EASCallback(reward_dataset=data[:40], interval=4), recorder],
    )
    trainer.train()
    seen = {
        "skip_sets": recorder.skip_sets,
        "contexts": recorder.contexts,
        "skipped": model.base_model.skipped_modules,
        "weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
    }
    torch.save(seen, os.path.join(folder, f"rank{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
