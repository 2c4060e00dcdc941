"""The folder in which the documentation's code blocks run: tiny models under the names of real ones, and their data.

`from_pretrained` takes a folder `HuggingFaceTB/SmolLM2-135M-Instruct` below the current directory for the model of
that name, so that the blocks run as they stand, without a network.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from training import Sentences, make_model
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from peft_eas import EASConfig

LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYERS = 16  # as many as the blocks skip at most, and one more
WORDS = [f"w{i}" for i in range(50)]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"

_SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
_TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def _llama(layers: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        **_SMALL, **_TOKENS, num_hidden_layers=layers, num_key_value_heads=1, max_position_embeddings=128
    )
    return transformers.LlamaForCausalLM(config)


def _bert() -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**_SMALL, pad_token_id=0, num_hidden_layers=12, max_position_embeddings=64)
    return transformers.BertModel(config)


def _vit() -> transformers.PreTrainedModel:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 12}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**size, image_size=16, patch_size=8))


def _t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, decoder_start_token_id=0, eos_token_id=1
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    LLM: lambda: _llama(LAYERS),
    "google-bert/bert-base-uncased": _bert,
    "google/vit-base-patch16-224": _vit,
    "google/flan-t5-small": _t5,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; it knows the words of the data, and takes others for padding."""
    words = ["<pad>", "<eos>", "user", "assistant", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "chat_template": TEMPLATE, "model_max_length": 64}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def fill(folder: Path) -> None:
    """Writes the models, an adapter of the language model and the merged model, and data files."""
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / LLM)
    base.name_or_path = LLM
    skipped = [f"model.layers.{i}.self_attn" for i in (3, 5, 8)]
    model = get_peft_model(base, EASConfig(task_type="CAUSAL_LM", skipped_modules=skipped, context="running"))
    model.save_pretrained(folder / "my-adapter")
    model.merge_and_unload().save_pretrained(folder / "my-model", processing_class=make_tokenizer())
    for name, size, seed in (("train", 240, 0), ("test", 32, 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(size, seed)))


def given() -> dict[str, Any]:
    """What blocks may ask for in the comment `given: NAMES`: what a reader has of his own."""
    peft_model = make_model().train()
    loader = DataLoader(Sentences(size=240), batch_size=4, shuffle=True)
    return {
        "Trainer": Trainer,
        "args": TrainingArguments(
            "out", max_steps=60, learning_rate=1e-3, per_device_train_batch_size=4, report_to=[]
        ),
        "train_data": Sentences(size=240),
        "model": _llama(LAYERS),
        "peft_model": peft_model,
        "optimizer": torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-2),
        "train_loader": loader,
        "num_steps": len(loader),
        "eval_loader": DataLoader(Sentences(size=20, seed=1), batch_size=4),
        "prompt_ids": [5, 6, 7],
        "answer_ids": [8, 9],
        "llm": _llama(20),
        "tokenizer": make_tokenizer(),
        "vision_tower": transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=4,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            )
        ),
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        "image": Image.new("RGB", (16, 16), "red"),
    }


def _rows(size: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 6))) for _ in range(size)]
    return [{"prompt": prompt, "completion": f" {prompt.split()[0]}"} for prompt in prompts]
