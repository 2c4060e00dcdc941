"""The config class of a checkpoint in DeciLM's layout.

`peft_eas.export.to_decilm` writes a copy of this file beside the weights, and vLLM reads it from there; it needs
nothing but transformers. MLX-LM reads config.json alone.
"""

from typing import Any

import transformers
from transformers import LlamaConfig

# Stock configs want a number in its place: they show it, and fill no deleted attention with random weights.
LOCK = (
    "EAS model in DeciLM's layout. It needs trust_remote_code=True, for its tokenizer as well. No class of "
    "transformers can run it: load the merged checkpoint it was exported from."
)
_INSTEAD = (
    "Serve the merged checkpoint that this folder was exported from, with vLLM and --trust-remote-code --model-impl "
    "transformers."
)
NO_BIASES = (
    "This engine's DeciLM class has no biases in FFNs, and would leave out those that hold a part of what was "
    f"trained. {_INSTEAD}"
)
NO_FIRST_ATTENTION = (
    f"The first layer's attention is deleted, and vLLM's DeciLM class cannot run a model without it. {_INSTEAD}"
)


class Record(dict):
    """A dict whose entries are attributes too: vLLM reads `block.attention.no_op`, and saves configs as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class FirstAttention(Record):
    """Of a deleted first attention: an error for who asks whether it is there, as vLLM does when it builds a layer."""

    @property
    def no_op(self) -> bool:
        raise ValueError(NO_FIRST_ATTENTION)


class FFN(Record):
    """Of an FFN: it has its size as a number, and no `ffn_mult` but as an entry.

    vLLM, whose FFNs can have biases, takes either attribute. SGLang and TensorRT-LLM, whose FFNs cannot, know
    `ffn_mult` alone, and would pass over the biases in silence.
    """

    def __init__(self, entries: dict[str, Any], intermediate_size: int) -> None:
        super().__init__(entries)
        self.intermediate_size = entries.get("intermediate_size", intermediate_size)

    def __getattr__(self, name: str) -> Any:
        if name == "ffn_mult":
            raise AttributeError(NO_BIASES)
        return super().__getattr__(name)


class DeciLMConfig(LlamaConfig):
    """A Llama's config with `block_configs`, which tell for each layer whether it has an attention and an FFN."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, id2label: Any = None, **kwargs: Any) -> None:
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                f"transformers {transformers.__version__} would not read this config's rope_parameters. "
                "Use vLLM with transformers 5 or newer."
            )
        for name in ("rope_theta", "rope_scaling"):  # rope_parameters in MLX-LM's words
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.block_configs = [
            Record(attention=Record(block["attention"]), ffn=FFN(block["ffn"], self.intermediate_size))
            for block in block_configs or []
        ]
        if block_configs and block_configs[0]["attention"]["no_op"]:
            self.block_configs[0]["attention"] = FirstAttention(block_configs[0]["attention"])
