"""A text classifier with Trainer: `python -m examples.short.encoder [MODEL]`, less than a minute on a CPU."""

import random
import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from peft_eas import EASCallback, EASConfig, eas_summary

MODEL = sys.argv[1] if len(sys.argv) > 1 else "sentence-transformers/all-MiniLM-L6-v2"
OUT = "outputs/short/encoder"
# Tested on words that are not trained on: what is asked of the model is what it knows of their meaning.
WORDS = {  # bad ones, good ones
    "train": ("awful bad boring dull poor terrible ugly weak", "fine funny good great lovely nice strong superb"),
    "test": ("disappointing dreadful horrible tedious", "brilliant charming excellent wonderful"),
}


def samples(split: str, size: int) -> list[dict]:
    """Reviews in a sentence, each as the model takes it, with its label: 0 for a bad one, 1 for a good one."""
    draw, rows = random.Random(split), []
    for label in (index % 2 for index in range(size)):
        what = draw.choice(["film", "book", "song", "play", "story", "meal", "hotel"])
        start = draw.choice(["I think the", "we found the", "this", "my friend's", "the whole"])
        text = f"{start} {what} was {draw.choice(['', 'very ', 'rather '])}{draw.choice(WORDS[split][label].split())}"
        rows.append({**tokenizer(text), "labels": label})
    return rows


tokenizer = AutoTokenizer.from_pretrained(MODEL)
base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2, dtype="float32")
# A task type lets PEFT train the new head, too, and save it with the adapter.
model = get_peft_model(base, EASConfig(task_type="SEQ_CLS", num_skip=base.config.num_hidden_layers // 2))
trainer = Trainer(
    model,
    TrainingArguments(
        OUT, max_steps=60, learning_rate=2e-3, per_device_train_batch_size=16, logging_steps=10, report_to="none"
    ),
    train_dataset=samples("train", 600),
    processing_class=tokenizer,
    # So short a run needs a longer search with more frequent rounds: from step 6 to 30, one every 2 steps. With the
    # defaults, which are for some hundred steps, this one would have a single round.
    callbacks=[EASCallback(search_steps=0.5, interval=2)],
)
trainer.train()
print(eas_summary(model))
model.merge_and_unload().save_pretrained(f"{OUT}/merged", processing_class=tokenizer)

merged = AutoModelForSequenceClassification.from_pretrained(f"{OUT}/merged").eval()
test = samples("test", 100)
labels = torch.tensor([row.pop("labels") for row in test])
with torch.no_grad():
    right = (merged(**tokenizer.pad(test, return_tensors="pt")).logits.argmax(-1) == labels).sum().item()
print(f"The merged model, reloaded, classifies {right} of {len(test)} right.")
