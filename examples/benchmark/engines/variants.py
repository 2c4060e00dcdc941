"""The models that an engine is given: the base, and the same with attentions skipped, as the engine can read it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples.shared.measure import cache_bytes_per_token
from peft_eas import EASConfig
from peft_eas.architectures import default_targets
from peft_eas.export import to_decilm, to_gguf

Loader = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Variant:
    """A model in a form that an engine reads.

    Attributes:
        name: for the table. path: a folder or a file. cache_width: how many numbers a token leaves in the KV cache.
        options: of the engine, for this form.
    """

    name: str
    path: Path
    cache_width: int
    options: dict[str, Any] = field(default_factory=dict)


def write_variants(engine: str, load: Loader, num_skip: int, dtype: str, folder: Path) -> Iterator[Variant]:
    """Writes the variants into `folder`, the base first.

    The adapters are untrained, and it is the last attentions but one that are skipped: neither matters for speed. For
    llama.cpp the base has the biases that adapters at kept attentions leave, which cost next to nothing.
    """
    for name, number in (("base", 0), ("merged", num_skip)):
        model, tokenizer = load()
        if number or engine == "llama.cpp":  # the export to it takes merged models alone
            skipped = list(default_targets(model))[-1 - number : -1]
            config = EASConfig(task_type="CAUSAL_LM", skipped_modules=skipped, context="running")
            model = get_peft_model(model, config).merge_and_unload()
        width = round(cache_bytes_per_token(model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}) / 4)
        path = folder / name
        if engine == "llama.cpp":
            to_gguf(model, tokenizer, path, dtype=dtype)
            yield Variant(name, path, width)
            continue
        model.save_pretrained(path)
        if not number:
            yield Variant("base, vLLM's own class", path, width)
        yield Variant(f"{name}, transformers backend", path, width, {"model_impl": "transformers"})
        if number:
            to_decilm(model, folder / "decilm")
            yield Variant("merged, DeciLM layout", folder / "decilm", width)
