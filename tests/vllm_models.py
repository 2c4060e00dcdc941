"""Tiny models that vLLM's attention takes, merged and saved, and what vLLM is asked of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merged_smollm2
import torch
import transformers
from peft import get_peft_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from peft_eas import EASConfig

VOCAB, WINDOW = 131, 16
# The last token ids, in this order.
SPECIAL_TOKENS = (
    *("<image>", "<video>", "<start>", "<end>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
_NUM_WORDS = VOCAB - len(SPECIAL_TOKENS)
TOKEN_IDS = {token: _NUM_WORDS + i for i, token in enumerate(SPECIAL_TOKENS)}
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2}
DECODER = {**TOKENS, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.15}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# Not tied, which would have them say the last token again and again.
GEMMA = {"head_dim": 32, "tie_word_embeddings": False}
WINDOWED = {**GEMMA, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}


def without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    """The sizes but some."""
    return {name: value for name, value in sizes.items() if name not in names}


@dataclass(frozen=True, eq=False)
class Row:
    """A tiny model that vLLM's attention takes: its class, what its config is given, and vLLM's options for it."""

    model_class: str
    config: Callable[[], PreTrainedConfig]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> PreTrainedModel:
        """The model with norms that differ and nothing that is all zeros, in evaluation mode."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model_class)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()


LLAMA = Row("LlamaForCausalLM", lambda: transformers.LlamaConfig(**DECODER))
GEMMA3 = Row("Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(**DECODER, **WINDOWED, layer_types=MIXED))


def merge(row: Row, skip: list[int], task_type: str | None = "CAUSAL_LM") -> PreTrainedModel:
    """The model of a row without the attentions of the layers `skip`, with adapters folded that change every token."""
    names = get_peft_model(row.build(), EASConfig(num_skip=0, task_type=task_type)).base_model.candidates
    skipped = [names[i] for i in skip]
    adapters = {"r": 8, "attention_r": 4, "dropout": 0.0, "init_weights": False, "context": "running"}
    torch.manual_seed(1)
    model = get_peft_model(row.build(), EASConfig(task_type=task_type, skipped_modules=skipped, **adapters))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_context" in name:
                value.add_(0.3 * torch.randn(value.shape))
    return model.merge_and_unload().eval()


def prompts(*lengths: int) -> list[list[int]]:
    """Token ids, the same ones at every call."""
    torch.manual_seed(3)
    return [torch.randint(3, VOCAB - 1, (length,)).tolist() for length in lengths]


def save(model: PreTrainedModel, folder: str | Path) -> str:
    """Saves a model whose texts end with token 2, and returns where."""
    if model.can_generate():
        model.generation_config = GenerationConfig(**without(TOKENS, "vocab_size"))
    model.save_pretrained(folder)
    return str(folder)


def job(model: PreTrainedModel, folder: str | Path, **options: Any) -> dict[str, Any]:
    """What vLLM is asked of a model: the tokens behind some prompts, the longest of which is beyond all windows."""
    asked = prompts(1, 5, 17, 100)
    options = {"model_impl": "transformers", **options}
    return {"folder": save(model, folder), "prompts": asked, "num_tokens": 16, "options": options}


def tokens(model: PreTrainedModel) -> list[list[int]]:
    """What transformers says to the same."""
    expected = [merged_smollm2.greedy(model, prompt, 16) for prompt in prompts(1, 5, 17, 100)]
    assert len({token for row in expected for token in row}) > 6
    return expected


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A word for every token id; `special` names tokens that a processor asks for."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, _NUM_WORDS)), *SPECIAL_TOKENS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        **{"tokenizer_object": tokenizer, "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
        **{"unk_token": "<pad>", "extra_special_tokens": special},
    )
    wrapped.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return wrapped
