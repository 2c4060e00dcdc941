"""What a model is measured at: a forward pass over a batch, and decoding steps behind it, at given shapes."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ..runtime.prompt import PROMPT_MASK_KEY
from ..values import is_int

_TOKENS = "input_ids"
# Tells of the answer or the prompt, which a model that is used is not given.
_TRAINING_ONLY = ("labels", PROMPT_MASK_KEY)


class Workload:
    """What a model is given in use, made from a batch.

    Args:
        model: the base model.
        batch: its keyword arguments; labels are left out, and what a decoder is given follows from them.
        batch_size: sequences; by default as many as the batch has, else they are taken in turn.
        prompt_tokens: tokens of each sequence (of an encoder-decoder, of the encoder's); by default those of the batch
            with its mask. Otherwise sequences are cut, or go on with their last token, and nothing is padding.
        new_tokens: tokens that are decoded behind it, one by one.
        entry: what to call, if that is not the model itself, but a model around it.

    Attributes:
        inputs: what the prefill is given.

    Raises:
        TypeError: for a batch that is no dictionary. ValueError: for shapes out of range, or that the batch cannot be
            brought to; for new tokens of a model that generates none.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        batch_size: int | None = None,
        prompt_tokens: int | None = None,
        new_tokens: int = 0,
        entry: nn.Module | None = None,
    ) -> None:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"The batch to measure with is of type {type(batch).__name__}. Pass a dictionary of the model's "
                "arguments."
            )
        check_shapes(batch_size, prompt_tokens, new_tokens)
        self.model = model
        self.entry = model if entry is None else entry
        self.generates = bool(getattr(model, "can_generate", lambda: False)())
        self.is_encoder_decoder = self.generates and bool(getattr(model.config, "is_encoder_decoder", False))
        self.new_tokens = new_tokens
        if new_tokens and not self.generates:
            raise ValueError(
                f"new_tokens={new_tokens} was received, but {type(model).__name__} generates none. Leave it out."
            )
        device = next(model.parameters()).device
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) and device.type != "meta" else value
            for name, value in batch.items()
            if name not in _TRAINING_ONLY
        }
        if self.is_encoder_decoder:
            self._give_decoder_tokens(inputs, batch.get("labels"), device)
        inputs = _with_rows(inputs, batch_size)
        if prompt_tokens is not None:
            inputs = _with_tokens(inputs, _TOKENS, prompt_tokens)
            if "attention_mask" in inputs:
                inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        self._tokens = "decoder_input_ids" if self.is_encoder_decoder else _TOKENS
        if self.is_encoder_decoder and new_tokens:
            inputs = _with_tokens(inputs, self._tokens, 1)
            inputs.pop("decoder_attention_mask", None)
        if new_tokens and self._tokens not in inputs:
            raise ValueError(
                f"new_tokens={new_tokens} was received, but the batch has no {self._tokens} to go on from, only "
                f"{sorted(inputs)}. Give it the prompt's."
            )
        self.inputs = inputs
        self._takes = inspect.signature(model.forward).parameters
        # Of the argument, and of what is returned; transformers 5.24 has renamed both.
        self._cache_key = "cache" if "cache" in self._takes else "past_key_values"
        options = {"use_cache": True, "logits_to_keep": 1} if self.generates else {}
        self._options = {name: value for name, value in options.items() if name in self._takes}

    @property
    def tokens(self) -> torch.Tensor | None:
        """What the decoder, or the only part of the model, is given: (B, T), or None if that is no tokens."""
        return self.inputs.get(self._tokens)

    def prefill(self) -> Any:
        """The forward pass over the batch; returns its output."""
        return self.entry(**self.inputs, **self._options)

    def cache_of(self, output: Any) -> Any:
        """The KV cache in an output of the model, or None."""
        return getattr(output, self._cache_key, None)

    def decoding(self) -> Callable[[], Any]:
        """A function that decodes a token for each sequence, behind the prompt and half of the new tokens."""
        length = self.tokens.shape[1]
        inputs = _with_tokens(self.inputs, self._tokens, length + self.new_tokens // 2)
        output = self.entry(**inputs, **self._options)
        given: dict[str, Any] = {self._tokens: inputs[self._tokens][:, -1:], "use_cache": True}
        mask = inputs.get("attention_mask")
        if self.is_encoder_decoder:
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
        if mask is not None:
            given["attention_mask"] = mask
        given[self._cache_key] = self.cache_of(output)
        needs_position = "position_ids" in self._takes and not self.is_encoder_decoder

        def step() -> None:
            if mask is not None and not self.is_encoder_decoder:
                given["attention_mask"] = F.pad(given["attention_mask"], (0, 1), value=1)
            if needs_position:  # a few models do not find them by themselves
                given["position_ids"] = torch.full_like(given[self._tokens], given[self._cache_key].get_seq_length())
            given[self._cache_key] = self.cache_of(self.entry(**given))

        return step

    def _give_decoder_tokens(self, inputs: dict[str, Any], labels: torch.Tensor | None, device: torch.device) -> None:
        """Puts in what the decoder starts with, if the batch has labels or nothing in its place."""
        if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
            return
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if labels is not None and shift is not None:
            inputs["decoder_input_ids"] = shift(labels=labels.to(device))
        elif (start := getattr(self.model.config, "decoder_start_token_id", None)) is not None:
            rows = next(value for value in inputs.values() if isinstance(value, torch.Tensor)).shape[0]
            inputs["decoder_input_ids"] = torch.full((rows, 1), start, device=device)


def check_shapes(batch_size: int | None, prompt_tokens: int | None, new_tokens: int) -> None:
    """Raises a ValueError for shapes out of range."""
    least = {"batch_size": 1, "prompt_tokens": 1, "new_tokens": 0}
    for (name, number), value in zip(least.items(), (batch_size, prompt_tokens, new_tokens)):
        if not is_int(value, number) and (value is not None or name == "new_tokens"):
            raise ValueError(f"{name}={value!r} was received. Give an integer of at least {number}.")


def _with_rows(inputs: dict[str, Any], rows: int | None) -> dict[str, Any]:
    """The inputs for `rows` sequences."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim()}
    sizes = {len(value) for value in tensors.values()}
    if rows is None or sizes == {rows}:
        return inputs
    if len(sizes) != 1:
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        raise ValueError(
            f"batch_size={rows} was received, but the batch has no first dimension in common to bring to that: "
            f"{shapes}. Leave batch_size out, and give a batch of that size."
        )
    (size,) = sizes
    return inputs | {name: value[torch.arange(rows, device=value.device) % size] for name, value in tensors.items()}


def _with_tokens(inputs: dict[str, Any], name: str, length: int) -> dict[str, Any]:
    """The inputs with `length` tokens under `name`, and with as much of what goes along with each token."""
    tokens = inputs.get(name)
    if tokens is None:
        raise ValueError(
            f"{length} tokens are asked for, but the batch has no {name}, only {sorted(inputs)}. Leave prompt_tokens "
            "out, and give a batch of the shapes that you want."
        )
    shape, index = tokens.shape, torch.arange(length, device=tokens.device).clamp(max=tokens.shape[1] - 1)
    along = {
        key: value
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor)
        and value.shape[:2] == shape
        and key.startswith("decoder_") == name.startswith("decoder_")
    }
    return inputs | {key: value[:, index] for key, value in along.items()}
