"""A language model with TRL's SFTTrainer: `python -m examples.short.text_llm [MODEL]`, a minute on a CPU."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_eas import EASCallback, EASConfig, eas_summary

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = "outputs/short/text_llm"

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
pairs = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(30) for b in range(30)]
data = Dataset.from_list(pairs).train_test_split(test_size=32, seed=0)

trainer = SFTTrainer(
    model,
    SFTConfig(
        OUT,
        max_steps=60,
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        logging_steps=10,
        report_to="none",
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=data["train"],
    processing_class=tokenizer,
    peft_config=EASConfig(task_type="CAUSAL_LM", num_skip=model.config.num_hidden_layers // 3),
    # So short a run needs a longer search with more frequent rounds: from step 6 to 30, one every 2 steps. With the
    # defaults, which are for some hundred steps, this one would have a single round.
    callbacks=[EASCallback(search_steps=0.5, interval=2)],
)
trainer.train()
print(eas_summary(trainer.model))
trainer.model.merge_and_unload().save_pretrained(f"{OUT}/merged", processing_class=tokenizer)

merged = AutoModelForCausalLM.from_pretrained(f"{OUT}/merged")
right = 0
for pair in data["test"]:
    prompt = tokenizer(pair["prompt"], return_tensors="pt")
    answer = merged.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    text = tokenizer.decode(answer[prompt.input_ids.shape[1] :], skip_special_tokens=True)
    right += text.split()[:1] == pair["completion"].split()
print(f"The merged model, reloaded, answers {right} of {len(data['test'])} right.")
