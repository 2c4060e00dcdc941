"""Which tokens are the prompt.

The mean m of the prompt (arXiv 2403.15226, section 3.3) is the one statistic of an adapter that depends on the
sample. A pre-hook on the base model marks the prompt once per forward pass; the mark travels as a keyword argument to
every MHA.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

PROMPT_KEY = "eas_prompt"
PROMPT_MASK_KEY = "eas_prompt_mask"
_TOKENS = ("input_ids", "inputs_embeds")
# Methods of a model that pack requests into one row (continuous batching).
_PACKED = ("generate_batch", "init_continuous_batching")
# Method of an encoder-decoder in which generate(), however it was reached, decides what the decoder starts with.
_DECODER_START = "_prepare_decoder_input_ids_for_generation"


class Prompt:
    """The prompt of one forward pass.

    Args:
        mask: boolean, (B, T), True for prompt tokens; None for every token; or a function that returns either, called
            when it is first needed, for a pass that goes on behind a KV cache needs none.
        is_given: whether it is the user's, and not only what the model's inputs tell.

    `recorded` names the adapters whose statistic has seen this pass, which gradient checkpointing computes twice.
    """

    def __init__(self, mask: torch.Tensor | Callable[[], torch.Tensor | None] | None, is_given: bool = False) -> None:
        self._mask = mask
        self.is_given = is_given
        self.recorded: set[int] = set()

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask."""
        if callable(self._mask) and not isinstance(self._mask, torch.Tensor):
            self._mask = self._mask()
        return self._mask

    def mean(self, z: torch.Tensor) -> torch.Tensor:
        """Mean over the prompt's tokens of z, shape (B, T, d), in float32, shape (B, d).

        Raises:
            ValueError: if the mask is for another number of tokens or sequences than z has.
        """
        mask = self.mask
        if mask is not None and mask.shape != z.shape[:2]:
            raise ValueError(
                f"The prompt mask has shape {tuple(mask.shape)}, but the layer computes {tuple(z.shape[:2])} "
                f"(sequences, tokens). Pass {PROMPT_MASK_KEY}, a boolean tensor of that shape, or use "
                "context='running', which needs no prompt."
            )
        return masked_mean(z, mask)


def masked_mean(z: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of z, (B, T, d), over the tokens where `mask`, (B, T), is True, or over all; in float32, (B, d)."""
    if mask is None:
        return z.float().mean(1)
    mask = mask.to(z.device)
    return z.float().masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def mask_from_labels(labels: torch.Tensor, attended: torch.Tensor | None, shift: int = 0) -> torch.Tensor:
    """Prompt mask of a causal model in training: what is attended to before the first answer token.

    Args:
        labels: (B, T), −100 where no token is learnt. attended: (B, T) boolean, or None for no padding.
        shift: how many tokens later than the label a decoder reads it: 0 for one that is given its labels among its
            tokens, 1 behind an encoder.

    A sequence without a prompt has its first attended token in the prompt's place: it is never predicted, so nothing
    of the answer leaks.
    """
    attended = torch.ones_like(labels, dtype=torch.bool) if attended is None else attended
    answered = nn.functional.pad((labels != -100).cumsum(1), (shift, 0))[:, : labels.shape[1]]
    before_answer = attended & (answered == 0)
    first = attended & (attended.cumsum(1) == 1)
    return before_answer | first


def attended_tokens(attention_mask: Any, num_tokens: int) -> torch.Tensor | None:
    """(B, T) boolean mask of the attended among the current `num_tokens`, from any form that models are given.

    Takes None (all), (B, ≥T), the 4-dimensional masks of `generate()` (boolean or additive) and dictionaries of these.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -num_tokens:].bool()
    # Every token that is not padding sees itself, in a causal mask as in one of a sliding window.
    itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :num_tokens]
    return itself if itself.dtype == torch.bool else itself == 0


def keys_attended_to(mask: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """(B, S) boolean mask of the keys that any query attends to, from the mask that an attention is given.

    Takes None (all), (B, S), and (B or 1, heads or 1, queries, S), boolean or additive. `shape` is (B, S).

    Raises:
        ValueError: for a mask of another form, such as flex attention's.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            f"context='prompt' cannot read an attention mask of type {type(mask).__name__}. Load the model with "
            "attn_implementation='sdpa' or 'eager', or use context='running'."
        )
    if mask.dim() == 4:
        mask = mask[:, 0]
        mask = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).any(1)
    return mask[:, : shape[1]].bool().expand(shape)


T = TypeVar("T")


class ByThread(Generic[T]):
    """A value for each thread, as servers run several; compiled code, which cannot tell them apart, has one apart.

    What compiled code has put is found by what runs as it was written, behind it.
    """

    def __init__(self) -> None:
        self._values: dict[int, T] = {}

    def put(self, value: T) -> None:
        """Puts the value of this thread."""
        self._values[0 if torch.compiler.is_compiling() else threading.get_ident()] = value

    def get(self) -> T | None:
        """The value of this thread, or None."""
        value = None if torch.compiler.is_compiling() else self._values.get(threading.get_ident())
        return self._values.get(0) if value is None else value

    def take(self) -> T | None:
        """The value of this thread, or None, which is not held any longer."""
        value = None if torch.compiler.is_compiling() else self._values.pop(threading.get_ident(), None)
        return self._values.pop(0, None) if value is None else value


def _check_mask(mask: Any) -> None:
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"{PROMPT_MASK_KEY} of type {type(mask).__name__} was received. Pass a boolean tensor of the shape of "
            "input_ids, True for the prompt's tokens."
        )


class PromptHook:
    """Pre-hook on the base model that marks the prompt for the layers beneath.

    Whichever way the base model's `generate` is called, PEFT's or transformers' own, the prompt is what it was given.

    Args:
        model: the base model.
        is_needed: tells whether any layer takes its context from the prompt at present.
        answer_in_input: whether labels mark an answer among the input's own tokens (causal language models), so that
            they tell prompt from answer; otherwise all that is attended to is the prompt.
    """

    def __init__(self, model: nn.Module, is_needed: Callable[[], bool], answer_in_input: Callable[[], bool]) -> None:
        self.model = model
        self.is_needed = is_needed
        self.answer_in_input = answer_in_input
        self.was_used = False
        # By thread, as servers run several: what generate() was given, and the prompt of the pass under way.
        self._generations: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._current: ByThread[Prompt] = ByThread()
        self._warned = False
        self._handles = [
            model.register_forward_pre_hook(self, with_kwargs=True),
            model.register_forward_hook(self._forget_prompt),
        ]
        self._decodes_encoded = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        if hasattr(model, "generate"):
            model.generate = self._generate
            if self._decodes_encoded:
                setattr(model, _DECODER_START, self._note_decoder_start)
        for name in _PACKED:
            if hasattr(model, name):
                setattr(model, name, functools.partial(self._refuse_packed, name))

    def remove(self) -> None:
        """Takes the hook off the model again."""
        for handle in self._handles:
            handle.remove()
        for name in ("generate", _DECODER_START, *_PACKED):
            self.model.__dict__.pop(name, None)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        # transformers would refuse it there; the tokens that are generated are none of the prompt's.
        mask = None if self._decodes_encoded else kwargs.pop(PROMPT_MASK_KEY, None)
        with self.generation(mask, *args, **kwargs):
            return type(self.model).generate(self.model, *args, **kwargs)

    def _note_decoder_start(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        tokens, rest = getattr(type(self.model), _DECODER_START)(self.model, *args, **kwargs)
        self._generations[threading.get_ident()] = tokens, None
        return tokens, rest

    def current(self) -> Prompt | None:
        """The prompt of the model's forward pass that is under way in this thread, or None outside of any."""
        return self._current.get()

    def _forget_prompt(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._current.take()

    def _refuse_packed(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.is_needed():
            raise ValueError(
                f"{name}() packs several requests into one row, where context='prompt' would give them one context. "
                "Use generate(), or freeze the context (freeze_context()) before merging or generating."
            )
        return getattr(type(self.model), name)(self.model, *args, **kwargs)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.was_used = True
        mask = kwargs.pop(PROMPT_MASK_KEY, None)
        _check_mask(mask)
        if PROMPT_KEY in kwargs:  # marked already by a model around this one
            self._current.put(kwargs[PROMPT_KEY])
            return args, kwargs
        if not self.is_needed():
            return args, kwargs
        # Of an encoder-decoder, it is the decoder's.
        is_given = mask is not None and not self._decodes_encoded
        if mask is None:
            names = inspect.signature(module.forward).parameters if args else ()
            mask = functools.partial(self._mask, module, {**dict(zip(names, args)), **kwargs})
        else:
            mask = mask.bool()
        prompt = Prompt(mask, is_given)
        self._current.put(prompt)
        return args, {**kwargs, PROMPT_KEY: prompt}

    @contextmanager
    def generation(self, prompt_mask: torch.Tensor | None, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While `generate(*args, **kwargs)` runs: the prompt is what it is given at its start.

        Or those of its tokens that `prompt_mask`, (B, T), marks. In assisted decoding the first forward pass already
        holds candidate tokens, so that it cannot tell.

        Raises:
            ValueError: for chunked prefill, which computes the first chunk before the prompt is known; for a
                `prompt_mask` that is no tensor or not of the tokens' shape.
        """
        _check_mask(prompt_mask)
        tokens = next(
            (kwargs[key] for key in ("inputs", "input_ids", "inputs_embeds") if kwargs.get(key) is not None),
            args[0] if args else None,
        )
        if prompt_mask is not None and not self._decodes_encoded:
            shape = tuple(tokens.shape[:2]) if isinstance(tokens, torch.Tensor) else None
            if prompt_mask.shape != shape:
                raise ValueError(
                    f"{PROMPT_MASK_KEY} of shape {tuple(prompt_mask.shape)} was received with "
                    f"{'no tokens' if shape is None else f'tokens of shape {shape}'}. Pass one value for each token "
                    "of the prompts, (batch, tokens)."
                )
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk is not None and self.is_needed():
            raise ValueError(
                f"prefill_chunk_size={chunk} does not go with context='prompt': the first chunk needs the mean of "
                "the whole prompt. Leave prefill_chunk_size out, or call freeze_context() first, before a merge."
            )
        thread = threading.get_ident()
        outer = self._generations.pop(thread, None)
        if isinstance(tokens, torch.Tensor) and not self._decodes_encoded:
            mask = kwargs.get("attention_mask") if prompt_mask is None else prompt_mask
            self._generations[thread] = (tokens, mask)
        try:
            yield
        finally:
            self._generations.pop(thread, None)
            if outer is not None:
                self._generations[thread] = outer

    def _mask(self, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        labels, prefix, shift = inputs.get("labels"), "", 0
        if self._decodes_encoded:
            if any(isinstance(inputs.get(f"decoder_{key}"), torch.Tensor) for key in _TOKENS):
                prefix, shift = "decoder_", 1
            elif self.answer_in_input() and isinstance(labels, torch.Tensor):  # the model will shift them itself
                return mask_from_labels(labels, None, shift=1)
        tokens = next((inputs[prefix + k] for k in _TOKENS if isinstance(inputs.get(prefix + k), torch.Tensor)), None)
        if tokens is None:
            return None
        num_sequences, num_tokens = tokens.shape[:2]
        attended = attended_tokens(inputs.get(f"{prefix}attention_mask"), num_tokens)
        if self.answer_in_input():
            if isinstance(labels, torch.Tensor) and labels.shape == tokens.shape[:2]:
                return mask_from_labels(labels, attended, shift)
            if module.training and threading.get_ident() not in self._generations:
                self._warn_without_labels()
        generation = self._generations.get(threading.get_ident())
        if generation is None:
            return attended
        prompt, given_mask = generation
        length = prompt.shape[1]
        if num_tokens < length:
            raise ValueError(
                f"The model was given {num_tokens} of the prompt's {length} tokens first. context='prompt' needs the "
                "whole prompt in one pass; call freeze_context() on the model to go without."
            )
        if given_mask is not None and given_mask.dim() == 2:
            # Beam search and several sequences per prompt repeat the prompts.
            attended = given_mask.bool().repeat_interleave(num_sequences // given_mask.shape[0], dim=0)
            attended = nn.functional.pad(attended, (0, num_tokens - length))
        elif attended is None:
            attended = torch.ones(num_sequences, num_tokens, dtype=torch.bool, device=tokens.device)
        return attended & (torch.arange(num_tokens, device=attended.device) < length)

    def _warn_without_labels(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "EAS with context='prompt' trains without labels in the model's inputs, so that the prompt cannot be "
                "told from the answer: all attended tokens count as the prompt, and the adapters see the answer. "
                f"Pass {PROMPT_MASK_KEY} (boolean, the shape of input_ids) beside the inputs, or train with "
                "context='running'.",
                stacklevel=2,
            )
