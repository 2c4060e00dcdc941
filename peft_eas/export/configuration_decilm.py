"""The config class of a checkpoint in the layout of vLLM's DeciLM models.

`peft_eas.export.to_vllm` writes a copy of this file beside the weights, and vLLM reads it from there; it needs nothing
but transformers.
"""

from typing import Any

import transformers
from transformers import LlamaConfig

# Stock configs want a number in its place: they show it, and fill no deleted attention with random weights.
LOCK = (
    "EAS model in vLLM's layout. It needs trust_remote_code=True, for its tokenizer as well. No class of transformers "
    "can run it: load the merged checkpoint it was exported from."
)


class Record(dict):
    """A dict whose entries are attributes too: vLLM reads `block.attention.no_op`, and saves configs as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama's config with `block_configs`, which tell for each layer whether it has an attention and an FFN."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, id2label: Any = None, **kwargs: Any) -> None:
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                f"transformers {transformers.__version__} would not read this config's rope_parameters. "
                "Use vLLM with transformers 5 or newer."
            )
        super().__init__(**kwargs)
        blocks = block_configs or []
        self.block_configs = [Record({name: Record(part) for name, part in block.items()}) for block in blocks]
