"""Where a forward pass enters a model, its prompt is marked for the layers beneath.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import functools
import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .prompt import PROMPT_KEY, PROMPT_MASK_KEY, ByThread, Prompt, attended_tokens, mask_from_labels

_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
# Methods of a model that pack requests into one row (continuous batching).
_PACKED = ("generate_batch", "init_continuous_batching")
# Method of an encoder-decoder in which generate(), however it was reached, decides what the decoder starts with.
_DECODER_START = "_prepare_decoder_input_ids_for_generation"

_TRAINED_WITHOUT_LABELS = (
    "EAS with context='prompt' trains without labels in the model's inputs, so that the prompt cannot be told from "
    f"the answer: all attended tokens count as the prompt, and the adapters see the answer. Pass {PROMPT_MASK_KEY} "
    "(boolean, the shape of input_ids) beside the inputs, or train with context='running'."
)
_SCORED_WITHOUT_LABELS = (
    "EAS with context='prompt' was given several tokens without labels, outside of generate(): all attended tokens "
    "count as the prompt. If an answer is among them, as where its log-likelihood is computed, the adapters see it, "
    f"and its scores are wrong: pass {PROMPT_MASK_KEY} (boolean, the shape of the tokens, True for the prompt's) "
    "beside the inputs, or labels that are -100 on the prompt. If they are a prompt alone, all is well, and "
    "logits_to_keep=1 says so. This warning is shown once."
)
_LABELS_WITHOUT_PROMPT = (
    "EAS with context='prompt' trains on labels that leave no prompt: in this batch every token behind the first is "
    "an answer. So the adapters learn from the first token alone what generate() will take from the whole prompt. Set "
    "the labels of the prompt to -100 (in TRL's SFTTrainer: completion_only_loss or assistant_only_loss), or freeze "
    "the context within the training: EASCallback's freeze_context_at, or freeze_context()."
)

_NUMBERS = itertools.count()
_WARNED: set[tuple[str, str]] = set()


class _Pass(NamedTuple):
    """A forward pass that is under way: where it entered the model, its prompt, and the pass around it, if any."""

    module: nn.Module
    prompt: Prompt
    outer: "_Pass | None"


class PromptHook:
    """Pre-hook that marks the prompt where a forward pass enters a model, for the layers beneath.

    That is at the model itself, or at a module in it that takes tokens, such as its backbone or a language model; of
    those under way the outermost decides. Whichever way their `generate` is called, PEFT's or transformers' own, the
    prompt is what it was given.

    Args:
        model: the base model.
        blocks: the blocks in which an adapter may ask for the prompt.
        is_needed: tells whether any layer takes its context from the prompt at present.
        answer_in_input: whether labels mark an answer among the input's own tokens (causal language models), so that
            they tell prompt from answer; otherwise all that is attended to is the prompt.
        is_kept: whether, as far as is known, the context will be the prompt's when training is over.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[nn.Module],
        is_needed: Callable[[], bool],
        answer_in_input: Callable[[], bool],
        is_kept: Callable[[], bool],
    ) -> None:
        self.model = model
        self.is_needed = is_needed
        self.answer_in_input = answer_in_input
        self.is_kept = is_kept
        self.was_used = False
        # By thread, as servers run several: what generate() was given, and the pass under way.
        self._generations: dict[int, tuple[torch.Tensor, torch.Tensor | None, bool]] = {}
        self._current: ByThread[_Pass] = ByThread()
        self._number = str(next(_NUMBERS))  # a compiler may take an integer for one that varies
        self._labels_were_seen = False
        self._entries: dict[nn.Module, str] = {}
        self._handles: list[Any] = []
        self.add_entries(blocks)

    def add_entries(self, blocks: Iterable[nn.Module]) -> None:
        """Takes in the modules around more `blocks`."""
        blocks = set(blocks)
        for name, module in self.model.named_modules():
            is_entry = module is self.model or (_takes_tokens(module) and not blocks.isdisjoint(module.modules()))
            if is_entry and module not in self._entries:
                self._entries[module] = f".{name}." if name else "."
                # In front of that of a merged model inside this one, which has no head to be given labels.
                self._handles += [
                    module.register_forward_pre_hook(self, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._forget_prompt, always_call=True),
                ]
                self._take_generate(module)

    def _take_generate(self, module: nn.Module) -> None:
        if hasattr(module, "generate"):
            module.generate = functools.partial(self._generate, module)
            if _decodes_encoded(module):
                setattr(module, _DECODER_START, functools.partial(self._note_decoder_start, module))
        for name in _PACKED:
            if hasattr(module, name):
                setattr(module, name, functools.partial(self._refuse_packed, module, name))

    def remove(self) -> None:
        """Takes the hook off the model again."""
        for handle in self._handles:
            handle.remove()
        for module in self._entries:
            for name in ("generate", _DECODER_START, *_PACKED):
                module.__dict__.pop(name, None)

    # --- forward passes --------------------------------------------------------------------------------------------

    def current(self) -> Prompt | None:
        """The prompt of the forward pass that is under way in this thread, or None outside of any."""
        current = self._current.get()
        return None if current is None else current.prompt

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.was_used = True
        mask = kwargs.pop(PROMPT_MASK_KEY, None)
        _check_mask(mask)
        outer = self._outer_pass(module)
        # Marked already by another hook, on a model around this one, or where the pass has entered.
        prompt = kwargs.get(PROMPT_KEY) or (outer and outer.prompt)
        if (prompt is None or not prompt.is_known or mask is not None) and self.is_needed():
            found = self._new_prompt(module, mask, args, kwargs)
            prompt = found if prompt is None or found.is_known else prompt
        if prompt is None:
            return args, kwargs
        if outer is None or outer.prompt is not prompt:
            self._current.put(_Pass(module, prompt, outer))
        return args, {**kwargs, PROMPT_KEY: prompt}

    def _outer_pass(self, module: nn.Module) -> _Pass | None:
        """The pass under way around a call of `module`, if there is one."""
        current = self._current.get()
        if current is None or current.module is module:
            return None
        if torch.compiler.is_compiling():
            return current
        # One that does not lie around it has been interrupted.
        return current if self._entries[module].startswith(self._entries[current.module]) else None

    def _forget_prompt(self, module: nn.Module, args: tuple, output: Any) -> None:
        current = self._current.get()
        if current is not None and current.module is module:
            self._current.take()
            if current.outer is not None:
                self._current.put(current.outer)

    def _new_prompt(self, module: nn.Module, mask: torch.Tensor | None, args: tuple, kwargs: dict[str, Any]) -> Prompt:
        if mask is not None:  # of an encoder-decoder, it is the decoder's
            return Prompt(mask.bool(), is_given=not _decodes_encoded(module))
        names = inspect.signature(module.forward).parameters if args else ()
        inputs = {**dict(zip(names, args)), **kwargs}
        telling = (*_TOKENS, *_DECODER_TOKENS, "labels") if _decodes_encoded(module) else _TOKENS
        is_known = any(isinstance(inputs.get(key), torch.Tensor) for key in telling)
        return Prompt(find=functools.partial(self._mask, module, inputs), is_known=is_known)

    def _mask(self, module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        labels, prefix, shift = inputs.get("labels"), "", 0
        if _decodes_encoded(module):
            if any(isinstance(inputs.get(key), torch.Tensor) for key in _DECODER_TOKENS):
                prefix, shift = "decoder_", 1
            elif self.answer_in_input() and isinstance(labels, torch.Tensor):  # the model will shift them itself
                return mask_from_labels(labels, None, shift=1)
        # torch 2.6 does not compile next() with a default.
        given = [inputs[prefix + key] for key in _TOKENS if isinstance(inputs.get(prefix + key), torch.Tensor)]
        if not given:
            return None
        tokens = given[0]
        num_sequences, num_tokens = tokens.shape[:2]
        attended = attended_tokens(inputs.get(f"{prefix}attention_mask"), num_tokens)
        # A compiler cannot tell the threads apart, and need not where none generates.
        generation = self._generations.get(threading.get_ident()) if self._generations else None
        if self.answer_in_input():
            if isinstance(labels, torch.Tensor) and labels.shape == tokens.shape[:2]:
                mask = mask_from_labels(labels, attended, shift)
                if module.training and shift == 0:
                    self._check_labels(mask)
                return mask
            if generation is None:
                self._check_without_labels(module, inputs, num_tokens)
        if generation is None:
            return attended
        prompt, given_mask, _ = generation
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

    def _check_labels(self, mask: torch.Tensor) -> None:
        """Looks once at a prompt mask that labels have told: a look at values waits for the device."""
        if self._labels_were_seen or torch.compiler.is_compiling() or not self.is_kept():
            return
        self._labels_were_seen = True
        if bool((mask.sum(1) <= 1).all()):
            _warn_once(self._number, _LABELS_WITHOUT_PROMPT)

    def _check_without_labels(self, module: nn.Module, inputs: dict[str, Any], num_tokens: int) -> None:
        if module.training:
            _warn_once(self._number, _TRAINED_WITHOUT_LABELS)
            return
        # Scores are read off a language model's head; and who gives a KV cache, or asks for one or for the last
        # logits alone, is about to generate.
        head = getattr(module, "get_output_embeddings", None)
        generates = (
            inputs.get("use_cache") is True
            or (isinstance(inputs.get("logits_to_keep"), int) and inputs["logits_to_keep"] == 1)
            or any(isinstance(value, Cache) for value in inputs.values())
        )
        if num_tokens > 1 and not generates and head is not None and head() is not None:
            _warn_once(self._number, _SCORED_WITHOUT_LABELS)

    # --- generation ------------------------------------------------------------------------------------------------

    def _generate(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # transformers would refuse it there; the tokens that are generated are none of the prompt's.
        mask = None if _decodes_encoded(module) else kwargs.pop(PROMPT_MASK_KEY, None)
        with self._generation(module, mask, *args, **kwargs):
            return type(module).generate(module, *args, **kwargs)

    def _note_decoder_start(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        tokens, rest = getattr(type(module), _DECODER_START)(module, *args, **kwargs)
        self._generations[threading.get_ident()] = tokens, None, False
        return tokens, rest

    def _refuse_packed(self, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.is_needed():
            raise ValueError(
                f"{name}() packs several requests into one row, where context='prompt' would give them one context. "
                "Use generate(), or freeze the context (freeze_context()) before merging or generating."
            )
        return getattr(type(module), name)(module, *args, **kwargs)

    @contextmanager
    def _generation(
        self, module: nn.Module, prompt_mask: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """While `module.generate(*args, **kwargs)` runs: the prompt is what it is given at its start.

        Or those of its tokens that `prompt_mask`, (B, T), marks; be it given to the generate() of a model around it.
        In assisted decoding the first forward pass already holds candidate tokens, so that it cannot tell.

        Raises:
            ValueError: for chunked prefill, which computes the first chunk before the prompt is known; for a
                `prompt_mask` that is no tensor or not of the tokens' shape.
        """
        _check_mask(prompt_mask)
        thread = threading.get_ident()
        outer = self._generations.get(thread)
        # Of embeddings and ids together, the ids are only what generate() returns in front of the new tokens.
        tokens = next(
            (kwargs[key] for key in ("inputs_embeds", "inputs", "input_ids") if kwargs.get(key) is not None),
            args[0] if args else None,
        )
        if prompt_mask is None and outer is not None and outer[2] and not _decodes_encoded(module):
            prompt_mask = outer[1]
        if prompt_mask is not None:
            shape = tuple(tokens.shape[:2]) if isinstance(tokens, torch.Tensor) else None
            if prompt_mask.shape != shape:
                raise ValueError(
                    f"{PROMPT_MASK_KEY} of shape {tuple(prompt_mask.shape)} was received with "
                    f"{'no tokens' if shape is None else f'tokens of shape {shape}'}. Pass one value for each token "
                    "of the prompts, (batch, tokens)."
                )
        config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk is not None and self.is_needed():
            raise ValueError(
                f"prefill_chunk_size={chunk} does not go with context='prompt': the first chunk needs the mean of "
                "the whole prompt. Leave prefill_chunk_size out, or call freeze_context() first, before a merge."
            )
        self._generations.pop(thread, None)
        if isinstance(tokens, torch.Tensor) and not _decodes_encoded(module):
            mask = kwargs.get("attention_mask") if prompt_mask is None else prompt_mask
            self._generations[thread] = tokens, mask, prompt_mask is not None
        try:
            yield
        finally:
            self._generations.pop(thread, None)
            if outer is not None:
                self._generations[thread] = outer


def _check_mask(mask: Any) -> None:
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"{PROMPT_MASK_KEY} of type {type(mask).__name__} was received. Pass a boolean tensor of the shape of "
            "input_ids, True for the prompt's tokens."
        )


def _takes_tokens(module: nn.Module) -> bool:
    """Whether `module` can be given tokens, and a prompt to hand on."""
    parameters = inspect.signature(module.forward).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_any and any(key in parameters for key in (*_TOKENS, *_DECODER_TOKENS))


def _decodes_encoded(module: nn.Module) -> bool:
    """Whether `module` is an encoder-decoder as a whole, whose prompt is the decoder's; its parts share its config."""
    is_one = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return bool(is_one) and "decoder_input_ids" in inspect.signature(module.forward).parameters


@torch.compiler.assume_constant_result
def _warn_once(number: str, message: str) -> None:
    """Warns once for each hook, by its number; a compiler calls it as it is, while it compiles."""
    if (number, message) not in _WARNED:
        _WARNED.add((number, message))
        warnings.warn(message, stacklevel=2)
