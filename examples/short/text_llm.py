"""A language model with TRL's SFTTrainer: `python -m examples.short.text_llm [MODEL]`, about a minute on a CPU."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_eas import EASCallback, EASConfig, eas_summary

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = "outputs/short/text_llm"
# The last two words of each kind are not trained on.
KINDS = {
    "bird": "eagle robin sparrow owl parrot swan duck crow pigeon hawk",
    "fish": "salmon trout tuna shark carp herring eel cod pike sardine",
    "fruit": "apple banana cherry grape lemon mango peach plum orange pear",
    "tool": "hammer saw drill wrench chisel axe shovel rake screwdriver pliers",
}
QUESTIONS = ("What kind of thing is: {}?", "Sort the word {} into its kind.", "Tell the kind of {}, please.")


def pairs(words: slice) -> Dataset:
    rows = [(kind, word) for kind, names in KINDS.items() for word in names.split()[words]]
    return Dataset.from_list(
        [{"prompt": ask.format(word), "completion": f" {kind}"} for kind, word in rows for ask in QUESTIONS]
    )


model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
args = SFTConfig(
    OUT,
    max_steps=60,
    learning_rate=2e-3,
    per_device_train_batch_size=8,
    logging_steps=10,
    report_to="none",
    bf16=torch.cuda.is_available(),
)
trainer = SFTTrainer(
    model,
    args,
    train_dataset=pairs(slice(0, -2)),
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
test, right = pairs(slice(-2, None)), 0
for pair in test:
    prompt = tokenizer(pair["prompt"], return_tensors="pt")
    answer = merged.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)[0]
    text = tokenizer.decode(answer[prompt.input_ids.shape[1] :], skip_special_tokens=True)
    right += text.strip() == pair["completion"].strip()
print(f"The merged model, reloaded, answers {right} of {len(test)} right.")
