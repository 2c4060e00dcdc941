"""A vision-language model with Trainer: `python -m examples.short.vlm [MODEL]`, less than a minute on a CPU.

The default is the small Llava that lies in examples/easy_vqa/base; any other Llava-like checkpoint will do.
"""

import sys
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import examples.easy_vqa
from examples.easy_vqa.data import VQACollator, VQADataset, accuracy, load_images, load_questions, preprocess
from peft_eas import EASCallback, EASConfig, eas_summary

MODEL = sys.argv[1] if len(sys.argv) > 1 else Path(examples.easy_vqa.__path__[0], "base")
OUT = "outputs/short/vlm"


def questions(split: str, num_images: int) -> VQADataset:
    """The "what" questions about the first images."""
    pixel_values = preprocess(processor, load_images(split)[:num_images])
    return VQADataset([q for q in load_questions("what", split) if q.image < num_images], pixel_values, processor)


processor = AutoProcessor.from_pretrained(MODEL, use_fast=False)
base = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32")
train, test = questions("train", 1000), questions("test", 200)
collate = VQACollator(processor.tokenizer.pad_token_id)
# By default the text model's attentions may be skipped, and the vision tower stays as it is.
num_skip = base.config.text_config.num_hidden_layers // 2
model = get_peft_model(base, EASConfig(task_type="CAUSAL_LM", num_skip=num_skip))
trainer = Trainer(
    model,
    TrainingArguments(
        OUT,
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        logging_steps=10,
        remove_unused_columns=False,
        report_to="none",
    ),
    train_dataset=train,
    data_collator=collate,
    # So short a run needs a longer search with more frequent rounds: from step 6 to 30, one every 2 steps. With the
    # defaults, which are for some hundred steps, this one would have a single round.
    callbacks=[EASCallback(search_steps=0.5, interval=2)],
)
trainer.train()
print(eas_summary(model))
model.merge_and_unload().save_pretrained(f"{OUT}/merged", processing_class=processor)

merged = AutoModelForImageTextToText.from_pretrained(f"{OUT}/merged")
print(
    f"The merged model, reloaded, answers {accuracy(merged, test, collate.pad_token_id):.1%} of the questions right."
)
