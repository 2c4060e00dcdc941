"""Loads a merged EAS checkpoint. Written by peft_eas (Apache-2.0); do not edit."""

"""The two adapters of Efficient Attention Skipping as plain modules, without any knowledge of PEFT.

Source: Wu et al., "Not All Attention is Needed" (arXiv 2403.15226), section 3.3, with the modality routing of
LaVIN (Luo et al., "Cheap and Quick", arXiv 2305.15023).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class Affine(nn.Module):
    """x → W x + b, W of shape (d_out, d_in), drawn like `nn.Linear`'s.

    It is none, since what looks for linear layers to adapt or to quantise would take this one, whose weights are also
    read without a call.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        nn.Linear.reset_parameters(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes (…, d_in), returns (…, d_out)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class GroupedUp(nn.Module):
    """Up-projection r → d in `groups` diagonal blocks: block g of the output reads slice g of the bottleneck.

    `weight` has shape (d, r / groups): rows g·d/groups … (g+1)·d/groups hold block g. `bias` has shape (d,). Both
    start at zero.
    """

    def __init__(self, r: int, d: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(d, r // groups))
        self.bias = nn.Parameter(torch.zeros(d))

    def dense_weight(self) -> torch.Tensor:
        """The block-diagonal matrix of shape (d, r) that this projection stands for."""
        return _block_diagonal(self.weight, self.groups)

    def extra_repr(self) -> str:
        d, slice_size = self.weight.shape
        return f"{slice_size * self.groups}, {d}, groups={self.groups}"


def _block_diagonal(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Weights of shape (…, d, r / groups) as the block-diagonal matrices, (…, d, r), that they stand for."""
    blocks = weight.unflatten(-2, (groups, -1))
    dense = weight.new_zeros(*blocks.shape[:-1], groups, blocks.shape[-1])
    dense.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return dense.flatten(-4, -3).flatten(-2)


class RoutedAdapter(nn.Module):
    """What both adapters share: a bottleneck, routed up-projections, and the running mean of the contexts.

    The router mixes the paths, g = softmax((R m) / τ); since the mix does not depend on the token, the paths are mixed
    as weights, once per sequence (or once for all, when the context is the running mean). One path needs no router:
    Σ_e g_e U_e is U_0 then. What reads no context has no running mean of it either.

    Args:
        d: width of the model. r: rank of the bottleneck. groups: diagonal blocks of the up-projections.
        scale: factor s on the adapter's output. router_temperature: τ.
        dropout: probability with which a bottleneck unit is dropped in training.
        init_weights: with True the up-projections stay at zero and the adapter is the identity; with False they are
            drawn like the down-projections.
        paths: number of up-projections that the router mixes; 1 for no router.

    Raises:
        ValueError: if r or `paths` is not positive, or if `groups` divides r or d with a remainder.
    """

    has_context_path: ClassVar[bool] = False
    _annealed_to: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(
        self,
        d: int,
        r: int,
        groups: int = 2,
        scale: float = 1.0,
        router_temperature: float = 10.0,
        dropout: float = 0.0,
        init_weights: bool = True,
        paths: int = 2,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"The rank of an adapter must be at least 1, but r={r} was received.")
        if paths < 1:
            raise ValueError(f"An adapter needs at least 1 up-projection, but paths={paths} was received.")
        for name, value in (("the rank", r), ("the model's width", d)):
            if groups < 1 or value % groups:
                raise ValueError(
                    f"groups={groups} does not divide {name} ({value}). Choose a number of groups that divides both "
                    f"r={r} and d={d}; groups=1 always does."
                )
        self.scale = scale
        self.router_temperature = router_temperature
        self.token_down = Affine(d, r)
        if self.has_context_path:
            self.context_down = Affine(d, r)
        self.up = nn.ModuleList([GroupedUp(r, d, groups) for _ in range(paths)])
        self.router = Affine(d, paths) if paths > 1 else None
        self.dropout = nn.Dropout(dropout)
        # Statistics in the manner of BatchNorm: the context that takes the prompt's place once it is frozen.
        self.register_buffer("running_context", torch.zeros(d) if self.needs_context else None)
        self.register_buffer("num_contexts", torch.zeros((), dtype=torch.long) if self.needs_context else None)
        self.reset_parameters(init_weights)

    @property
    def needs_context(self) -> bool:
        """Whether what the adapter computes depends on a context."""
        return self.has_context_path or self.router is not None

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draws the weights anew; see `init_weights` of the class."""
        for down in [self.token_down] + ([self.context_down] if self.has_context_path else []):
            nn.init.xavier_uniform_(down.weight)
            nn.init.zeros_(down.bias)
        for up in self.up:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            if not init_weights:
                nn.init.xavier_uniform_(up.weight)
                nn.init.normal_(up.bias, std=0.02)

    def route(self, context: torch.Tensor) -> torch.Tensor:
        """Weights of the paths, shape (B, paths), for contexts of shape (B, d)."""
        logits = F.linear(context.to(self.router.weight.dtype), self.router.weight, self.router.bias)
        return F.softmax(logits / self.router_temperature, dim=-1, dtype=torch.float32).to(logits.dtype)

    def mixed_up(self, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ_e g_e U_e, shape (B, d, r / groups), and Σ_e g_e β_e, shape (B, d), for contexts of shape (B, d).

        Without a router B is 1, for sequences of any context.
        """
        weights = torch.stack([up.weight for up in self.up])
        biases = torch.stack([up.bias for up in self.up])
        if self.router is None:
            return weights, biases
        gates = self.route(context)
        return torch.einsum("be,edk->bdk", gates, weights), gates @ biases

    def affine_map(self, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The map z → z + left (C z) + shift that the adapter is, in evaluation mode, for a fixed context.

        Takes contexts of shape (B, d); returns left, (B, d, r), and shift, (B, d), in float32. With Ū = Σ_e g_e U_e
        and β = Σ_e g_e β_e (arXiv 2403.15226, section 3.3, equation of the re-parameterisation): for PIA, left = s/2 Ū
        and shift = s (½ Ū (A m + a + c) + β); for a kept MHA's adapter, left = s Ū and shift = s (Ū c + β). For an
        adapter that needs no context, which may be None, B is 1.
        """
        context = None if context is None else context.float()
        up = torch.stack([path.weight.float() for path in self.up])
        up_bias = torch.stack([path.bias.float() for path in self.up])
        if self.router is not None:
            logits = F.linear(context, self.router.weight.float(), self.router.bias.float())
            gates = torch.softmax(logits / self.router_temperature, dim=-1)
            up, up_bias = torch.einsum("be,edk->bdk", gates, up), gates @ up_bias
        constant, share = self.token_down.bias.float(), 1.0
        if self.has_context_path:
            down, share = self.context_down, 0.5
            constant = constant + F.linear(context, down.weight.float(), down.bias.float())
        left = (self.scale * share) * _block_diagonal(up, self.up[0].groups)
        shift = (left @ constant[..., None])[..., 0] + self.scale * up_bias
        return left.expand(len(shift), -1, -1), shift

    @torch.no_grad()
    def record(self, context: torch.Tensor, momentum: float = 0.01) -> None:
        """Takes the batch mean of `context`, shape (B, d), into the running mean.

        The first 1 / momentum batches count alike, so that a short run has an unbiased mean; later ones enter with
        weight `momentum`, so that a long run follows the weights as they change.
        """
        self.num_contexts += 1
        weight = (1.0 / self.num_contexts).clamp_min(momentum)
        self.running_context.lerp_(context.mean(0).to(self.running_context), weight.to(self.running_context))

    def anneal(self, share: float) -> None:
        """Lets the running mean, as it is now, take `share` of the prompt's place in `annealed` until the next call.

        A mean that is not known yet takes none. That it stays as it was keeps passes equal: those that gradient
        checkpointing computes twice, and micro-batches on several ranks.
        """
        self._annealed_to = (self.running_context.clone(), share * (self.num_contexts > 0)) if share > 0 else None

    def annealed(self, context: torch.Tensor) -> torch.Tensor:
        """The contexts, (B, d), that are to be taken in the place of the prompts' ones; see `anneal`."""
        if self._annealed_to is None:
            return context
        mean, share = self._annealed_to
        return torch.lerp(context, mean.to(context), share.to(context))

    def _expand(self, z: torch.Tensor, bottleneck: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """z + s (Σ_e g_e U_e) dropout(bottleneck), for z of shape (B, T, d) and a bottleneck of shape (B, T, r)."""
        weight, bias = self.mixed_up(context)
        groups = self.up[0].groups
        # (B, T, r) → (B, groups, T, r/groups), times (B, groups, r/groups, d/groups): one batched product.
        sliced = self.dropout(bottleneck).unflatten(-1, (groups, -1)).transpose(1, 2)
        blocks = weight.unflatten(1, (groups, -1)).transpose(-1, -2)
        update = (sliced @ blocks).transpose(1, 2).flatten(-2) + bias[:, None]
        return z + (self.scale * update).to(z.dtype)


class PropagationAdapter(RoutedAdapter):
    """PIA, the propagation-of-information adapter: stands for a skipped MHA in front of the FFN.

    For z of shape (B, T, d) and a context m of shape (B, d), or (1, d) for all sequences alike (section 3.3):

        u = ½ (A m + C z)        g = softmax((R m) / τ)        PIA(z) = z + s Σ_e g_e U_e dropout(u)

    Submodules: `context_down` (A), `token_down` (C), `up` (U_0, U_1, …), `router` (R). Arguments and errors are those
    of `RoutedAdapter`.
    """

    has_context_path = True

    def forward(self, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Returns PIA(z), in the shape and dtype of z."""
        dtype = self.token_down.weight.dtype
        bottleneck = 0.5 * (self.context_down(context.to(dtype))[:, None] + self.token_down(z.to(dtype)))
        return self._expand(z, bottleneck, context)


class InputAdapter(RoutedAdapter):
    """The adapter at the input of a kept MHA: z + s Σ_e g_e U_e dropout(C z).

    It has no context path; the context, shape (B, d) or (1, d), only drives the router, and may be None without one.
    With one path it also is what PIA is with context="none": each token's own, C z, is all that enters the bottleneck.
    Arguments and errors are those of `RoutedAdapter`.
    """

    def forward(self, z: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the adapted input, in the shape and dtype of z."""
        return self._expand(z, self.token_down(z.to(self.token_down.weight.dtype)), context)

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
            if module.training:
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

"""Where what a prompt decides is kept while a model generates.

Each layer's context lives in that layer's own slot of the KV cache, so that it follows the sequence through beam
search, reordering, and copies.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers.cache_utils import Cache


@functools.cache
def _slot_class(base: type) -> type:
    """A class of cache layer that carries contexts beside what `base` holds, so that they follow the sequences.

    `eas_contexts` holds, by key, what the prompt alone decides, of shape (B, …): a context, or what follows from it.
    """

    class ContextSlot(base):
        eas_contexts: dict[Hashable, torch.Tensor]

        def _change_contexts(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.eas_contexts = {key: change(context) for key, context in self.eas_contexts.items()}

        def reset(self) -> None:
            super().reset()
            self.eas_contexts = {}

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)
            if int(self.get_seq_length()) == 0:
                self.eas_contexts = {}

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._change_contexts(lambda context: context.index_select(0, beam_idx.to(context.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._change_contexts(lambda context: context.repeat_interleave(repeats, dim=0))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._change_contexts(lambda context: context[indices])

    ContextSlot.__name__ = ContextSlot.__qualname__ = base.__name__
    return ContextSlot


def cached_length(cache: Cache | None, layer_idx: int | None) -> int:
    """Number of tokens that layer `layer_idx` has seen before, by its slot in `cache`."""
    return 0 if cache is None or layer_idx is None else int(cache.get_seq_length(layer_idx))


def read_context(cache: Cache | None, layer_idx: int | None, key: Hashable) -> torch.Tensor | None:
    """What layer `layer_idx` keeps in `cache` under `key` for each sequence, shape (B, …), or None."""
    if cache is None or layer_idx is None:
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    slot = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    return getattr(slot, "eas_contexts", {}).get(key)


def write_context(cache: Cache | None, layer_idx: int, key: Hashable, context: torch.Tensor) -> None:
    """Keeps `context`, shape (B, …), in the slot that layer `layer_idx` has in `cache`."""
    if cache is None:
        return
    slot = getattr(cache, "self_attention_cache", cache).layers[layer_idx]
    if not hasattr(slot, "eas_contexts"):
        slot.__class__ = _slot_class(type(slot))
        slot.eas_contexts = {}
    slot.eas_contexts[key] = context

"""How a skipped MHA behaves: what it adds to the residual stream, and what it leaves in the KV cache.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class NoUpdate:
    """What a skipped MHA adds to the residual stream: zeros in the shape of `like`, that nobody has to add.

    A sum with it is the other summand itself, and scaling or dropout leave it what it is; so a block's code runs as it
    was written, without a kernel for nothing. For anything else it turns into the zeros that it stands for.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like

    def zeros(self) -> torch.Tensor:
        """The zeros as a tensor, never written out."""
        return self.like.new_zeros(()).expand_as(self.like)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _SUMS and len(args) == 2 and not kwargs and args[0].shape == args[1].shape:
            return args[1] if isinstance(args[0], cls) else args[0]
        if func in _PRODUCTS and isinstance(args[1], cls) and args[0].shape == args[1].shape[-1:]:
            return args[1]  # a scale of each channel
        if func is F.dropout and isinstance(args[0], cls):
            return args[0]
        return func(*_written_out(args), **dict(zip(kwargs or (), _written_out((kwargs or {}).values()))))

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    __radd__ = __iadd__ = __add__

    def __mul__(self, factor: Any) -> Any:
        return self if isinstance(factor, (int, float)) else self.zeros() * factor

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.zeros()[index]

    @property
    def shape(self) -> torch.Size:
        """Shape of the zeros."""
        return self.like.shape

    def __getattr__(self, name: str) -> Any:
        if name == "like" or name.startswith("__"):  # asked for while it is being copied
            raise AttributeError(name)
        return getattr(self.zeros(), name)


def _written_out(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        v.zeros() if isinstance(v, NoUpdate) else _written_out(v) if isinstance(v, (list, tuple)) else v
        for v in values
    )


_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.add_}
_PRODUCTS = {torch.Tensor.mul}


def find_cache(args: Iterable[Any], kwargs: dict[str, Any]) -> Cache | None:
    """The KV cache among the arguments of a call, whatever its name."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def skipped_return(
    hidden_states: torch.Tensor, norm: nn.Module | None, returns: Iterable[str | None] | None, kwargs: dict[str, Any]
) -> Any:
    """What a skipped MHA returns: what it adds, alone or in front of what `returns` names of its arguments.

    It adds nothing, but for a kept `norm` of `hidden_states`.
    """
    update = skipped_output(hidden_states) if norm is None else norm(hidden_states)
    return update if returns is None else (update, *(kwargs.get(name) for name in returns))


def skipped_output(hidden_states: torch.Tensor) -> NoUpdate | torch.Tensor:
    """What a skipped MHA adds to the residual stream: nothing, in the shape of `hidden_states`."""
    update = NoUpdate(hidden_states)
    # A compiler sees through the zeros, but not through the class.
    return update.zeros() if torch.compiler.is_compiling() else update


class EmptyLayer(DynamicLayer):
    """A growing cache layer of no heads: like any other, but that its length does not depend on its size."""

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.dim() == 4 else 0

    def grow(self, num_tokens: int) -> None:
        """Counts `num_tokens` more tokens."""
        batch, _, length, _ = self.keys.shape
        self.keys = self.values = self.keys.new_empty((batch, 0, length + num_tokens, 0))


def advance_cache(cache: Cache | None, layer_idx: int | None, hidden_states: torch.Tensor) -> None:
    """Lets the cache's slot of a skipped MHA count the tokens of `hidden_states`, (B, T, d), and hold nothing else.

    The slot gets keys and values of no heads: they take no memory, but lengths, masks, sliding windows, beams and
    cropping go on as for any other layer, whichever layer is asked.

    Raises:
        ValueError: if the slot holds keys already, from a time when the MHA was not skipped.
    """
    if cache is None or layer_idx is None:
        return
    cache = getattr(cache, "self_attention_cache", cache)
    slot = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    batch, num_tokens = hidden_states.shape[:2]
    if slot is not None and slot.is_initialized and slot.keys.dim() == 4:
        if slot.keys.shape[1] > 0:
            raise ValueError(
                f"The KV cache holds keys of layer {layer_idx}, whose attention is skipped now. It was filled by "
                "another model, with another skip set, or by early_initialization(). Start with a new cache."
            )
        if isinstance(slot, EmptyLayer):
            slot.grow(num_tokens)
            return
        if type(slot) is DynamicLayer and slot.keys.shape[-2] > 0:
            raise ValueError(
                f"The KV cache's slot of layer {layer_idx}, whose attention is skipped, was made anew from its keys "
                "and values, and so has lost its length. Copy the cache with copy.deepcopy()."
            )
        if isinstance(slot, StaticLayer) and not slot.is_sliding:
            slot.cumulative_length.add_(num_tokens)  # all that an update would do but for copying nothing
            return
    nothing = hidden_states.new_empty((batch, 0, num_tokens, 0))
    if type(slot) is DynamicLayer or (slot is None and _next_slot_is_dynamic(cache, layer_idx)):
        empty = EmptyLayer()
        empty.dtype, empty.device = nothing.dtype, nothing.device
        empty.keys = empty.values = nothing
        empty.is_initialized = True
        cache.layers[layer_idx : layer_idx + 1] = [empty]
    else:
        cache.update(nothing, nothing, layer_idx)


def _next_slot_is_dynamic(cache: Cache, layer_idx: int) -> bool:
    """Whether the cache would append a growing slot for the layer, as it does when it was made without a config."""
    return layer_idx == len(cache.layers) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer


class SkippedMHA(nn.Module):
    """Stands where a deleted MHA was. It has no parameters and computes nothing, but for a post-norm's kept norm.

    Args:
        layer_idx: slot of the KV cache, or None for models without one, and for a cross-attention.
        marker: name of the first weight of the deleted MHA; an empty tensor takes its place in the checkpoint.
        kept_norm: name of the norm inside the MHA that a post-norm block still applies, or None. norm: that norm.
        returns: what the MHA returned behind its output: for each the argument that is handed on, or None; or None
            as a whole if it returned its output alone.
    """

    def __init__(
        self,
        layer_idx: int | None,
        marker: str,
        kept_norm: str | None = None,
        norm: nn.Module | None = None,
        returns: Sequence[str | None] | None = (None,),
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.returns = returns
        self.kept_norm = kept_norm
        *parents, last = marker.split(".")
        _container(self, parents, Marker).register_buffer(last, torch.empty(0))
        if kept_norm is not None:
            *parents, last = kept_norm.split(".")
            _container(self, parents, nn.Module).add_module(last, norm)

    def __repr__(self) -> str:
        return f"SkippedMHA({'deleted' if self.kept_norm is None else f'deleted but for {self.kept_norm}'})"

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As `nn.Module.named_modules`, without the marker, whose place other methods would take for a projection."""
        return (item for item in super().named_modules(*args, **kwargs) if not isinstance(item[1], Marker))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block adds to its residual, and no attention weights; shapes as the deleted MHA's."""
        if self.layer_idx is not None:
            advance_cache(find_cache(args, kwargs), self.layer_idx, hidden_states)
        norm = None if self.kept_norm is None else self.get_submodule(self.kept_norm)
        return skipped_return(hidden_states, norm, self.returns, kwargs)


class Marker(nn.Module):
    """Leads to the marker of a deleted MHA, under the names that lead to the MHA's first weight."""

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """None: who moves a model's tensors about, as accelerate does, has nothing to move here."""
        return iter(())


def _container(module: nn.Module, path: list[str], kind: type[nn.Module]) -> nn.Module:
    for name in path:
        if not hasattr(module, name):
            module.add_module(name, kind())
        module = getattr(module, name)
    return module

"""How a merged model's blocks run: without the MHAs that are deleted, and behind the adapters that stay, if any do.

Adapters stay where their context is to be each prompt's own, for any batch and any padding.

An adapter depends on the token only through z → z + left (C z) + shift, where left and shift follow from the prompt
alone (arXiv 2403.15226, section 3.3). Both are computed once per sequence, with the prompt, and kept in the layer's
slot of the KV cache; every later token costs two thin products. They stay in front of the projections, where they are
of the model's width: behind them, folded into the weights but for what the router decides, there would be one pair of
thin factors per projection, each of the FFN's width, to read for every token.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache






ADAPTER_NAME = "eas_adapter"  # in front of the name of the MHA
SHIFT_NAME = "eas_shift"


class Argument(NamedTuple):
    """An argument of a module's call: its name, and its position, or −1 where it is given by name alone."""

    name: str
    position: int

    @classmethod
    def of(cls, module: nn.Module, name: str) -> "Argument":
        """Finds `name` in the forward method of `module`."""
        parameters = list(inspect.signature(module.forward).parameters)
        return cls(name, parameters.index(name) if name in parameters else -1)

    def read(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Its value, or None where it is not given."""
        return args[self.position] if 0 <= self.position < len(args) else kwargs.get(self.name)


class Attended(NamedTuple):
    """Where the call of an MHA holds what it attends to.

    Attributes:
        states: the states, or None for its own input. mask: their mask.
    """

    states: Argument | None
    mask: Argument

    @classmethod
    def of(cls, mha: nn.Module, names: tuple[str, str]) -> "Attended":
        """Finds the arguments `names`, of states and mask, in the forward method of `mha`."""
        states, mask = (Argument.of(mha, name) for name in names)
        return cls(None if states.name == "hidden_states" else states, mask)

    def read(self, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, Any]:
        """The states, (B, S, d), or None; and the mask, in whatever form the MHA takes it."""
        return tuple(None if argument is None else argument.read(args, kwargs) for argument in self)


class Call:
    """One call of an MHA, as far as its adapters need to know; that of the FFN behind it is given less.

    Args:
        args, kwargs: of the call. current: returns the prompt of the pass, for models that hand their MHAs none.
        attended: where the call holds what the MHA attends to, if that is what the context is the mean of.

    Attributes:
        num_sequences: B, where the hidden states are (B, T, d). prompt: which tokens are the prompt. cache: the KV
            cache. attended: the states that the MHA attends to, (B, S, d), or None for its own tokens, and its mask.
        packing: where the tokens of each sequence are, (B, T), if they are all in one row; else None.
    """

    def __init__(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        current: Callable[[], Prompt | None],
        attended: Attended | None = None,
    ) -> None:
        z = args[0] if args else kwargs["hidden_states"]
        self.num_sequences = z.shape[0] if z.dim() == 3 else 1
        self.num_tokens = z.shape[:-1].numel()  # of all sequences
        self.prompt = kwargs.get(PROMPT_KEY) or current()
        self.cache = find_cache(args, kwargs)
        states, mask = (None, None) if attended is None else attended.read(args, kwargs)
        self.packing = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 1:  # where each of the sequences in one row ends
            lengths = mask.diff()
            mask = self.packing = torch.arange(int(lengths.max()), device=mask.device) < lengths[:, None]
        self.attended = states, mask

    def context(self, z: torch.Tensor, tokens: str) -> torch.Tensor:
        """The context m in float32, (B, d), where an adapter reads z, (B, T, d).

        `tokens` tells what m is the mean of: "prompt"; "all"; "attended", what the MHA attends to; or "input", the
        same unless the user has named the prompt.
        """
        if tokens == "all":
            return z.float().mean(1)
        is_named = self.prompt is not None and self.prompt.is_given
        if tokens == "attended" or (tokens == "input" and not is_named):
            states, mask = self.attended
            states = z if states is None else states
            return masked_mean(states, keys_attended_to(mask, states.shape[:2]))
        return (self.prompt or Prompt(None)).mean(z)

    def as_sequences(self, z: torch.Tensor) -> torch.Tensor:
        """z as (B, T, d), where a block may have flattened it to (B T, d), or packed sequences of any lengths.

        Raises:
            ValueError: if it has another number of tokens than the MHA was given.
        """
        if z.dim() == 3:
            return z
        if z.shape[:-1].numel() != self.num_tokens:
            raise ValueError(
                f"An FFN was given {z.shape[:-1].numel()} tokens (a tensor of shape {tuple(z.shape)}), but the "
                f"attention in front of it {self.num_tokens}, in {self.num_sequences} sequences. In the block's row "
                "of ARCHITECTURES, set `ffn` to the module that is given all tokens, such as that around several "
                "experts."
            )
        if self.packing is None:
            return z.unflatten(0, (self.num_sequences, -1))
        return z.new_zeros(*self.packing.shape, z.shape[-1]).masked_scatter(self.packing[..., None], z)

    def as_given(self, sequences: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The inverse: `sequences`, (B, T, d), in the shape of `given`."""
        return sequences.view(given.shape) if self.packing is None else sequences[self.packing]


class Carrier:
    """Pre-hook on an MHA: takes note of its call, for what is given less.

    Args:
        current, attended: see `Call`.
    """

    def __init__(self, current: Callable[[], Prompt | None], attended: Attended | None) -> None:
        self.current = current
        self.attended = attended
        self._call: ByThread[Call] = ByThread()

    def __call__(self, mha: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._call.put(Call(args, kwargs, self.current, self.attended))
        return args, {key: value for key, value in kwargs.items() if key != PROMPT_KEY}

    def take(self) -> Call:
        """The call, which is not held any longer.

        Raises:
            RuntimeError: if the MHA was not called before, as by a copy of the FFN alone.
        """
        call = self._call.take()
        if call is None:
            raise RuntimeError(
                "An FFN with an adapter that takes each prompt's context was called without the deleted attention in "
                "front of it. It cannot be copied or called on its own (PEFT's modules_to_save does), and a deleted "
                "cross-attention must be given what it attended to; leave it out, or merge the model with a frozen "
                "context."
            )
        return call


class PromptedAdapter:
    """An adapter whose context is each prompt's: what it does to z, and what it keeps of the prompt meanwhile.

    Args:
        adapter: the adapter.
        layer_idx: slot of the KV cache, or None where what a prompt decides is computed anew in every pass.
        tokens: what the context is the mean of; see `Call.context`.
    """

    def __init__(self, adapter: RoutedAdapter, layer_idx: int | None, tokens: str) -> None:
        adapter.running_context = adapter.num_contexts = None  # of no use here, hence not in the checkpoint
        adapter.dropout.p = 0.0
        self.adapter = adapter
        self.layer_idx = layer_idx
        self.tokens = tokens
        self.keys = tuple((type(adapter).__name__, part) for part in ("left", "shift"))

    def __call__(
        self, z: torch.Tensor, call: Call, counted: int = 0
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Takes z, (B, T, d), of which the cache's slot has counted `counted` tokens already.

        Returns what the projections read instead of z, and what a new prompt has decided, to `keep`, or None.

        Raises:
            ValueError: if the cache was filled by another model.
        """
        # Whether the slot holds what the prompt has decided tells more than its length, a tensor in a static cache.
        left, shift = (read_context(call.cache, self.layer_idx, key) for key in self.keys)
        new = None
        if left is None:
            self._check_is_new(call.cache, counted)
            context = call.context(z, self.tokens) if self.adapter.needs_context else None
            left, shift = (part.expand(len(z), *part.shape[1:]) for part in self.adapter.affine_map(context))
            left, shift = left.transpose(1, 2).to(z.dtype).contiguous(), shift[:, None].to(z.dtype)
            new = left, shift
        return torch.baddbmm(z + shift, F.linear(z, self.adapter.token_down.weight), left), new

    def _check_is_new(self, cache: Cache | None, counted: int) -> None:
        seen = 0 if torch.compiler.is_compiling() else cached_length(cache, self.layer_idx) - counted
        if cache is not None and seen > 0:
            raise ValueError(
                f"The KV cache holds {seen} tokens of layer {self.layer_idx}, but not what their prompt makes of its "
                "adapter: it was filled by another model. Start with a new cache."
            )

    def keep(self, new: tuple[torch.Tensor, ...] | None, cache: Cache | None) -> None:
        """Writes what a new prompt has decided into the layer's slot of `cache`, once there is one."""
        if new is not None and cache is not None and self.layer_idx is not None:
            for key, value in zip(self.keys, new):
                write_context(cache, self.layer_idx, key, value)


def replace_hidden_states(z: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with z as the hidden states, which come first or by name."""
    return ((z, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": z})


class AdaptedForward:
    """The forward pass of an MHA or FFN behind adapters; it stands in the place of the module's own.

    Args:
        module: the module.
        current: returns the prompt of the pass, for models that hand their MHAs none.
        is_counted: whether the cache has counted a pass's tokens when the module is called, as before an FFN.

    `prompted` holds the adapters, in the order in which they are applied, each with the carrier of its MHA's call, or
    None where the module is given all that is needed.
    """

    def __init__(self, module: nn.Module, current: Callable[[], Prompt | None], is_counted: bool) -> None:
        self.module = module
        self.current = current
        self.is_counted = is_counted
        self.prompted: list[tuple[PromptedAdapter, Carrier | None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the module does."""
        z = args[0] if args else kwargs["hidden_states"]
        decided = []
        for prompted, carrier in self.prompted:
            call = Call(args, kwargs, self.current) if carrier is None else carrier.take()
            sequences = call.as_sequences(z)
            sequences, new = prompted(sequences, call, sequences.shape[1] if self.is_counted else 0)
            z = call.as_given(sequences, z)
            decided.append((prompted, new, call.cache))
        kwargs.pop(PROMPT_KEY, None)
        args, kwargs = replace_hidden_states(z, args, kwargs)
        output = type(self.module).forward(self.module, *args, **kwargs)
        for prompted, new, cache in decided:
            prompted.keep(new, cache)
        return output


class ShiftedForward:
    """The forward pass of an FFN behind one vector, its parameter `eas_shift`, (d,), that is added to every token."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the module does."""
        shifted = hidden_states + getattr(self.module, SHIFT_NAME)
        return type(self.module).forward(self.module, shifted, *args, **kwargs)


def _no_prompt() -> None:
    """Stands for a function, and can be pickled."""


class BranchForward:
    """The forward pass of a pre-norm block without its MHA, y = x + branch(x) (arXiv 2403.15226, section 3.3).

    It stands in the place of the block's own, which would call the stub, and norms that are gone.

    Args:
        block: the block. branch: names of its children that make up the branch, in order.
        layer_idx: slot of the KV cache, or None for models without one.
    """

    def __init__(self, block: nn.Module, branch: list[str], layer_idx: int | None) -> None:
        self.block = block
        self.branch = branch
        self.layer_idx = layer_idx
        # By the child in front of which an adapter stands; and the prompt of the pass, if the block is given none.
        self.prompted: dict[str, PromptedAdapter] = {}
        self.current: Callable[[], Prompt | None] = _no_prompt

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes what the block does and returns its output, in the shape of `hidden_states`, (B, T, d)."""
        cache = find_cache(args, kwargs)
        advance_cache(cache, self.layer_idx, hidden_states)
        children, update = self.block._modules, hidden_states
        for name in self.branch:
            if name in self.prompted:
                prompted = self.prompted[name]
                call = Call((hidden_states, *args), kwargs, self.current)
                update, new = prompted(update, call, counted=hidden_states.shape[1])
                prompted.keep(new, cache)
            update = children[name](update)
        return hidden_states + update

"""How a merged model is saved, pushed and loaded: with the code that another process needs; complete, or not at all.

Needs nothing but torch, transformers and what they need themselves: it is a part of the file that it writes.
"""

import ast
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel



CODE_FILE = "modeling_eas.py"
# The modules of which that file is made, in the order in which they need each other.
CODE_PARTS = ("adapter", "prompt", "context_cache", "skipped", "forward", "checkpoint", "merged")
# What else is done to the folder of a saved model; the package writes the model card.
AFTER_SAVE: list[Callable[[PreTrainedModel, Path], None]] = []


def code_text() -> str:
    """Text of the file that lets a process without the package load a merged checkpoint."""
    here = Path(__file__)
    if here.name == CODE_FILE:
        return here.read_text(encoding="utf-8")
    sources = [(here.parent / f"{part}.py").read_text(encoding="utf-8") for part in CODE_PARTS]
    head = '"""Loads a merged EAS checkpoint. Written by peft_eas (Apache-2.0); do not edit."""'
    return "\n\n".join([head, *map(_without_relative_imports, sources)])


def code_files(base_classes: Iterable[type]) -> dict[str, str]:
    """By name, the code file, and where `base_classes`, of the base model, are not transformers', what they come from.

    A module that needs no other of its own package is copied and imported from there; any other is imported under its
    own name, so that transformers asks for its package.

    Raises:
        ValueError: for classes that no other process could import.
    """
    by_module: dict[str, set[str]] = {}
    for base_class in base_classes:
        if base_class.__module__.partition(".")[0] != "transformers":
            by_module.setdefault(base_class.__module__, set()).add(base_class.__name__)
    files, imports = {}, []
    for module, names in sorted(by_module.items()):
        if module == "__main__":
            raise ValueError(
                f"{', '.join(sorted(names))} of this model's base are defined in the script that runs (__main__), "
                "where nobody can import them from. Move them into a module, import it, load the adapter on the base "
                "there and merge again."
            )
        source = Path(sys.modules[module].__file__)
        text, place = source.read_text(encoding="utf-8"), module
        if _stands_alone(text, module.partition(".")[0]):
            place = f".{source.stem}"
            files[source.name] = text
        elif module.startswith("transformers_modules."):
            raise ValueError(
                f"{module}, the code of this model's base, was loaded with trust_remote_code and needs other files "
                f"beside it, which a merged checkpoint does not hold. Put it all into one file, {source.name}, or "
                "install it as a package, load the base and the adapter again, and merge."
            )
        imports.append(f"from {place} import {', '.join(sorted(names))}\n")
    code = code_text()
    added = "".join(line for line in imports if line not in code)
    return {**files, CODE_FILE: f"{code}\n\n{added}" if added else code}


def _stands_alone(source: str, package: str) -> bool:
    """Whether a module of `package` imports nothing of it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    is_relative = any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in nodes)
    return not is_relative and package not in {name.partition(".")[0] for name in names}


def _without_relative_imports(source: str) -> str:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


class CheckpointMixin:
    """Saving, pushing and loading of a merged model class, which tells `_auto_map` and `_class_named`."""

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        """By Auto class, the class of the code file that it shall load."""
        raise NotImplementedError

    @classmethod
    def _base_classes(cls) -> set[type]:
        """The base model's own classes that this class and those of `_auto_map` are made from."""
        raise NotImplementedError

    @classmethod
    def _class_named(cls, name: str) -> type[PreTrainedModel]:
        """The merged model class of that name; raises AttributeError if no base is known for it."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As the stock class, but never with random weights in the place of missing ones; a new head may be random.

        Raises:
            OSError, ValueError: if files of the checkpoint are missing, damaged, or do not fit its config.
        """
        advice = f"Copy or download {pretrained_model_name_or_path} again, with config.json as it was saved."
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"The checkpoint's weights cannot be read ({error}). {advice}") from error
        except OSError as error:
            raise OSError(f"{error} {advice}") from error
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                "The checkpoint's weights do not have the shapes that its config asks for, in it the record `eas` of "
                f"the skipped attentions. {advice}"
            ) from error
        name = (model.config.architectures or [None])[0]
        lost = sorted(set(info["missing_keys"]) & _saved_keys(model))
        below = [{key.partition(".")[2] for key in keys} for keys in (lost, info["unexpected_keys"])]
        if name != cls.__name__ and below[0] & below[1]:
            raise ValueError(
                f"{cls.__name__} names its weights otherwise than {name}, from which the checkpoint was saved: as in "
                f"the stock class, {len(lost)} would stay random, such as {lost[0]}. Load it with AutoModel, save "
                "that, and load the result."
            )
        strange = [key for key in info["unexpected_keys"] if f".{ADAPTER_NAME}_" in key or name == cls.__name__]
        if strange:
            raise ValueError(
                f"The checkpoint has {len(strange)} weights that its config tells nothing of, such as "
                f"{sorted(strange)[0]}: they belong to another model. {advice}"
            )
        if lost:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} of the weights that it was saved with, such as {lost[0]}. {advice}"
            )
        if any(parameter.is_meta for name, parameter in model.named_parameters() if f".{ADAPTER_NAME}_" in name):
            raise ValueError(
                "device_map offloads adapters that this model has kept for each prompt's own context, which are not "
                "brought back when they are needed. Choose a device_map that offloads nothing, or merge the model "
                "with a frozen context."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        processing_class: Any = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As the stock class, and beside the weights the code that loads them, the model card, and `processing_class`.

        Args:
            processing_class: a tokenizer or processor to save in the same folder, or None.

        Raises:
            ValueError: before anything is written, for a base whose code no other process could import.
        """
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in kwargs}
        files = code_files(self._base_classes())
        self.config.auto_map = self._auto_map()
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        for function in AFTER_SAVE:
            function(self, folder)
        if push_to_hub:
            self.push_to_hub(
                hub.pop("repo_id", folder.resolve().name),
                processing_class=processing_class,
                max_shard_size=kwargs.get("max_shard_size", "50GB"),
                token=kwargs.get("token"),
                **hub,
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processing_class: Any = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Uploads what `save_pretrained` writes in one commit; a model card in the repository is kept and extended.

        Args:
            repo_id: name of the repository, which is created if there is none. tags: more tags for the model card.
            revision: branch to push to, created if there is none. kwargs: `commit_message`, `commit_description` and
                `create_pr`, as in `HfApi.upload_folder`.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kwargs.setdefault("commit_message", f"Upload {type(self).__name__}")
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):  # no card yet
                api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
            self.save_pretrained(folder, processing_class=processing_class, max_shard_size=max_shard_size)
            if tags:
                _add_tags(Path(folder) / "README.md", tags)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, ignore_patterns=[".cache/*"], **kwargs
            )


def _saved_keys(model: PreTrainedModel) -> set[str]:
    """Names, as in `model`, of the weights of the class that the checkpoint of `model` was saved from."""
    name = (model.config.architectures or [type(model).__name__])[0]
    if name == type(model).__name__:
        return set(model.state_dict())
    try:
        saved_class = model._class_named(name)
    except AttributeError:
        return set(model.state_dict())
    with torch.device("meta"):
        saved = saved_class(model.config)
    names = {key.removeprefix(f"{saved.base_model_prefix}.") for key in saved.state_dict()}
    return {key for key in model.state_dict() if key.removeprefix(f"{model.base_model_prefix}.") in names}


def _add_tags(path: Path, tags: list[str]) -> None:
    card = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(path)

"""Models whose skipped MHAs are deleted: how they are built, saved and loaded.

A merged checkpoint has the model type `eas_<base model type>`; its config records under `eas` what was deleted, which
projections have gained a bias, and which adapters have stayed. Two locks keep it from being loaded into a stock class,
which would fill the deleted attention with random weights: in config.json, the place of `id2label` holds a sentence
where every stock config wants a number, so that its error shows the sentence; and each deleted MHA leaves an empty
tensor under the name of its first weight, whose shape no stock model accepts.

This module and those it imports need nothing but torch and transformers. Put together in one file, they are saved with
every merged checkpoint, which so loads without the package.
"""

import hashlib
import importlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
















FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "gemma3", "olmo2", "phi3"),
    *("starcoder2", "mixtral", "qwen3_moe", "llama4_text", "llama4", "deepseek_v3"),
    *("gpt2", "gpt_neox", "falcon", "opt"),
    *("bert", "roberta", "xlm-roberta", "modernbert", "vit", "dinov2"),
    *("clip", "clip_text_model", "clip_vision_model", "siglip", "siglip_text_model", "siglip_vision_model"),
    *("t5", "bart", "whisper", "encoder-decoder"),
    *("llava", "llava_next", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "smolvlm", "idefics3"),
    *("paligemma", "internvl", "vilt", "bridgetower"),
)
# Of the record `eas`. A process may load a checkpoint with the code of another one, which may be older.
FORMAT = 3
# Python shows the first 200 characters of what is not a number.
LOCK = (
    "EAS checkpoint: this class would fill its deleted attentions with random weights. "
    "Run `pip install peft_eas`, `import peft_eas`, and use an Auto class; "
    "or an Auto class with trust_remote_code=True."
)


def apply_record(
    model: PreTrainedModel, record: dict[str, Any], kept: dict[str, RoutedAdapter | torch.Tensor] | None = None
) -> None:
    """Deletes from `model` what `record`, the config's `eas`, names as skipped, and adds the biases it names.

    Where the context is each prompt's own, the adapters that the record names are put in place, and in front of a
    mixture of experts the shifts: those of `kept`, by name, or new ones for a checkpoint's weights.

    Raises:
        ValueError: if the model has no module of a recorded name.
    """
    for name, entry in record["skipped"].items():
        mha = _find(model, name)
        if isinstance(mha, SkippedMHA):  # by the body, which is a merged model itself
            continue
        norm = mha.get_submodule(entry["kept_norm"]) if entry["kept_norm"] else None
        stub = SkippedMHA(entry["layer_idx"], entry["marker"], entry["kept_norm"], norm, entry["returns"])
        _replace(model, name, stub.to(next(mha.parameters()).device))
        for norm_name in entry["norms"]:
            _replace(model, norm_name, nn.Identity())
        if entry["branch"] is not None:
            block = _find(model, entry["block"])
            block.forward = BranchForward(block, entry["branch"], entry["layer_idx"])
    for name in record["biases"]:
        projection = _find(model, name)
        weight = getattr(projection, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(_misfit(model, name))
        if projection.bias is None:
            projection.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
    for name, width in record.get("shifts", {}).items():
        ffn = _find(model, name)
        if not hasattr(ffn, SHIFT_NAME):
            weight = next(parameter for parameter in ffn.parameters() if parameter.is_floating_point())
            shift = kept[name] if kept else torch.zeros(width)
            setattr(ffn, SHIFT_NAME, nn.Parameter(shift.to(weight.device, weight.dtype), weight.requires_grad))
            ffn.forward = ShiftedForward(ffn)
    if record.get("context") == "prompt":
        # Under another head than a language model's, labels mark no answer among the tokens.
        has_answer = record["answer_in_input"] and (model.can_generate() or not hasattr(model, "num_labels"))
        hook = PromptHook(model, is_needed=_yes, answer_in_input=_yes if has_answer else _no)
        for mha, entry in sorted(record["adapters"].items(), key=lambda item: item[1]["position"]):
            if not hasattr(_find(model, entry["block"]), entry["name"]):
                _keep_adapter(model, mha, kept[mha] if kept else _new_adapter(entry), record, hook)


def _yes() -> bool:
    return True


def _no() -> bool:
    return False


def _new_adapter(entry: dict[str, Any]) -> RoutedAdapter:
    return (PropagationAdapter if entry["stands_for_skipped"] else InputAdapter)(**entry["shape"])


def _keep_adapter(
    model: PreTrainedModel, mha: str, adapter: RoutedAdapter, record: dict[str, Any], hook: PromptHook
) -> None:
    """Puts `adapter` in front of the MHA of the name `mha`, or of the FFN behind it if it is deleted."""
    entry = record["adapters"][mha]
    block, module = _find(model, entry["block"]), _find(model, entry["module"])
    weight = next(module.parameters(), None)
    if weight is None:
        raise ValueError(_misfit(model, entry["module"]))
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else model.dtype  # quantised
    # It belongs to the block, for not every module takes another child: a Sequential would call it.
    block.add_module(entry["name"], adapter.to(weight.device, dtype))
    prompted = PromptedAdapter(adapter, entry["layer_idx"], entry["tokens"])
    skipped = record["skipped"].get(mha)
    if skipped is not None and skipped["branch"] is not None:
        block.forward.prompted[entry["child"]], block.forward.current = prompted, hook.current
        return
    carrier = None
    if entry["stands_for_skipped"] or entry["attended"] is not None:
        attended = entry["attended"] and Attended(*(part and Argument(*part) for part in entry["attended"]))
        carrier = Carrier(hook.current, attended)
        _find(model, mha).register_forward_pre_hook(carrier, with_kwargs=True)
    if not isinstance(module.forward, AdaptedForward):
        module.forward = AdaptedForward(module, hook.current, is_counted=entry["stands_for_skipped"])
    module.forward.prompted.append((prompted, carrier))


def _resolve(model: nn.Module, name: str) -> str:
    """A name relative to the base model, as it is in `model`, be that the base model or one with a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}.{name}" if prefix and hasattr(model, prefix) else name


def relative_name(model: nn.Module, name: str) -> str:
    """The inverse: a name in `model`, relative to its base model."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix and hasattr(model, prefix) else name


def _find(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(_resolve(model, name))
    except AttributeError as error:
        raise ValueError(_misfit(model, name)) from error


def _misfit(model: nn.Module, name: str) -> str:
    return (
        f"The checkpoint's config says that {name} was changed by EAS, but {type(model).__name__} has no such module. "
        "Load it with the class that its config names under `architectures`, and leave `eas` as it is."
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    _find(model, name)
    parent, _, child = _resolve(model, name).rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.training))


class MergedConfigMixin:
    """What every `EAS…Config` adds to the stock config: the record `eas`, and the lock described above."""

    eas: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        register_models(cls)
        if not isinstance(config_dict.get("eas"), dict):
            raise ValueError(
                f"A config of type {cls.model_type} needs the record `eas` of what was deleted, but it is missing. "
                "Take config.json as merge_and_unload() and save_pretrained() wrote it."
            )
        _check_record(config_dict["eas"], cls.model_type)
        return super().from_dict(_unlock(config_dict), **kwargs)

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        return json.dumps(_lock(json.loads(super().to_json_string(*args, **kwargs))), indent=2, sort_keys=True) + "\n"


def _check_record(record: dict[str, Any], model_type: str) -> None:
    if record.get("format") != FORMAT:
        raise ValueError(
            f"The record `eas` in the checkpoint's config has format {record.get('format')!r}, but this code reads "
            f"format {FORMAT}. Run `pip install --upgrade peft_eas`, `import peft_eas`, and load it in a new process."
        )
    if record.get("checksum") != checksum(record) or record["family"] != model_type:
        raise ValueError(
            "The record `eas` in config.json, of what EAS has changed in the model, is not as it was saved: the "
            "weights beside it would be put to a use that they were not trained for. Restore config.json. To skip "
            "other attentions, merge the adapter again."
        )


def checksum(record: dict[str, Any]) -> str:
    """Checksum of what a record says about the model's function."""
    counted = {key: value for key, value in record.items() if key not in ("checksum", "origin", "speed")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def _lock(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Puts the lock into a config and its sub-configs, which stock classes can be loaded from as well."""
    parts = {key: _lock(v) for key, v in config_dict.items() if isinstance(v, dict) and "model_type" in v}
    return {**config_dict, **parts, "id2label": {LOCK: config_dict.get("id2label")}}


def _unlock(config_dict: dict[str, Any]) -> dict[str, Any]:
    unlocked = {key: _unlock(v) if isinstance(v, dict) else v for key, v in config_dict.items()}
    if isinstance(unlocked.get("id2label"), dict) and LOCK in unlocked["id2label"]:
        unlocked["id2label"] = unlocked["id2label"][LOCK]
    return {key: v for key, v in unlocked.items() if (key, v) != ("id2label", None)}


class MergedModelMixin(CheckpointMixin):
    """What every merged model class adds to the stock class: it is built, and then what its record names changes."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        _check_record(config.eas, config.model_type)
        super().__init__(config, *args, **kwargs)
        apply_record(self, config.eas)

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        module = CODE_FILE.removesuffix(".py")
        classes = {name: model_class for name, _, model_class in _auto_classes(cls.config_class)}
        classes["AutoConfig"] = cls.config_class
        return {name: f"{module}.{some_class.__name__}" for name, some_class in classes.items()}

    @classmethod
    def _base_classes(cls) -> set[type]:
        merged = [cls, *(model_class for _, _, model_class in _auto_classes(cls.config_class))]
        return {_stock_of(cls.config_class, MergedConfigMixin), *(_stock_of(c, CheckpointMixin) for c in merged)}

    # What transformers reads off the source of the stock class's module, it would look for in this one.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._stock_class()._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._stock_class()._can_set_experts_implementation()

    @classmethod
    def _stock_class(cls) -> type[PreTrainedModel]:
        return _stock_of(cls, CheckpointMixin)

    @classmethod
    def _class_named(cls, name: str) -> type[PreTrainedModel]:
        return globals()[name] if name in globals() else __getattr__(name)


def _stock_of(merged: type, mixin: type) -> type:
    """The class that `merged` was made from; `mixin` is the last one before it."""
    return merged.__mro__[merged.__mro__.index(mixin) + 1]


_CLASSES: dict[type, type] = {}


def merged_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of merged models whose base has the config class `stock`; the same one at every call."""
    return _subclass(stock, MergedConfigMixin, model_type=f"eas_{stock.model_type}")


def merged_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class of merged models whose base has the model class `stock`; the same one at every call."""
    config_class = merged_config_class(stock.config_class)
    return _subclass(stock, MergedModelMixin, config_class=config_class, config=config_class)


def _subclass(stock: type, mixin: type, **attributes: Any) -> type:
    if issubclass(stock, mixin):
        return stock
    if stock not in _CLASSES:
        name = f"EAS{stock.__name__}"
        # Of a base that has an `_auto_class`, transformers would copy the module, in the place of the merged one's.
        own = {"__module__": __name__, "__qualname__": name, "_auto_class": None}
        _CLASSES[stock] = type(name, (mixin, stock), {**own, **attributes})
        globals()[name] = _CLASSES[stock]  # where pickle looks for it
    return _CLASSES[stock]


def register_family(model_type: str) -> type[PreTrainedConfig]:
    """Lets the Auto classes load merged models whose base has the type `model_type`.

    The families of `FAMILIES` are registered on import. For a model that is not transformers' own, call this where it
    is registered with the Auto classes, so that whoever imports its module can load its merged checkpoints. The module
    itself should do so only where it is no copy beside a merged model's weights, which need no package to be loaded:

        if not __name__.startswith("transformers_modules."):
            from peft_eas.merged import register_family

            register_family("my_model")

    Raises:
        ValueError: if the Auto classes do not know `model_type`.
    """
    _check_type(model_type)
    config_class = merged_config_class(CONFIG_MAPPING[model_type])
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    return config_class


def check_registered(model_class: type[PreTrainedModel]) -> None:
    """Raises ValueError if the Auto classes would not load a model of this class, or would take another for it."""
    config_class = model_class.config_class
    _check_type(config_class.model_type)
    if model_class.__module__.partition(".")[0] == "transformers":
        return
    known = CONFIG_MAPPING[config_class.model_type]
    if known is not config_class:
        raise ValueError(
            f"To the Auto classes the model type {config_class.model_type!r} is {known.__name__}'s, whose model they "
            f"would load for this {model_class.__name__}, merged. Give its {config_class.__name__} a model_type of "
            "its own and register both classes: AutoConfig.register(...), and AutoModel.register(...) or that of its "
            "task."
        )
    if not any(mapping.get(config_class, None) is model_class for _, _, mapping in _auto_mappings()):
        raise ValueError(
            f"No Auto class knows {model_class.__name__}, so that none could load it merged. Register it first: "
            f"AutoModel.register({config_class.__name__}, {model_class.__name__}), or that of its task."
        )


def _check_type(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"The Auto classes do not know the model type {model_type!r}, so that they could not load it merged. "
            f"Register its classes first: AutoConfig.register({model_type!r}, ...) and AutoModel.register(...), or "
            "that of its task."
        )


def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Registers a merged model class with every Auto class that has one for the stock config.

    Called when a merged config is first read, so that importing the package imports no model's code.
    """
    for _, auto_class, model_class in _auto_classes(config_class):
        if config_class not in auto_class._model_mapping:
            auto_class.register(config_class, model_class)


def _auto_classes(config_class: type[PreTrainedConfig]) -> Iterator[tuple[str, type, type[PreTrainedModel]]]:
    """Yields (name of an Auto class, that class, the merged model class that it shall load for `config_class`)."""
    stock = _stock_of(config_class, MergedConfigMixin)
    for name, auto_class, mapping in _auto_mappings():
        model_class = mapping.get(stock, None)
        if getattr(model_class, "config_class", None) is stock:
            yield name, auto_class, merged_model_class(model_class)


def _auto_mappings() -> Iterator[tuple[str, type, Any]]:
    """Yields (name of an Auto class, that class, its mapping from config classes to model classes)."""
    for name in modeling_auto.__all__:
        auto_class = getattr(modeling_auto, name)
        if (mapping := getattr(auto_class, "_model_mapping", None)) is not None:
            yield name, auto_class, mapping


def turn_into_merged(
    model: PreTrainedModel, record: dict[str, Any], kept: dict[str, RoutedAdapter | torch.Tensor]
) -> PreTrainedModel:
    """Applies `record` to a model in memory and makes it one of the classes above, in place; see `apply_record`."""
    apply_record(model, record, kept)
    record = _with_earlier_merges(record, getattr(model.config, "eas", None))
    config_class = register_family(model.config_class.model_type)
    register_models(config_class)
    for module in model.modules():  # sub-models share the config object
        if getattr(module, "config", None) is model.config and isinstance(module, PreTrainedModel):
            # Names that the stock checkpoint had are not those of the merged one, which is saved as it is.
            module._weight_conversions = []
    model.config.__class__ = config_class
    model.config.__dict__.pop("model_type", None)  # which a config that was read from a file has of its own
    record = {**record, "family": config_class.model_type}
    model.config.eas = {**record, "checksum": checksum(record)}
    model.config._name_or_path = ""
    model.__class__ = merged_model_class(type(model))
    # A class hands out hidden states and attentions only once the base class's constructor has seen it.
    PreTrainedModel.__init__(object.__new__(type(model)), model.config)
    return model


def _with_earlier_merges(record: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The record of all merges into a model: what an earlier one added to an MHA that is deleted now is gone."""
    if earlier is None:
        return record
    skipped = {**earlier["skipped"], **record["skipped"]}
    biases = [name for name in earlier["biases"] if not name.startswith(tuple(f"{mha}." for mha in skipped))]
    shifts = {**earlier.get("shifts", {}), **record.get("shifts", {})}
    return {**record, "skipped": skipped, "biases": biases + record["biases"], "shifts": shifts}


def __getattr__(name: str) -> type:
    """Builds `EASLlamaForCausalLM` and the like on first use, so that they can be imported and unpickled by name."""
    if not name.startswith("EAS"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = _stock_named(name.removeprefix("EAS"))
    if stock is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: neither transformers nor its Auto classes know "
            f"{name.removeprefix('EAS')}. Import the module that defines and registers it first."
        )
    return (merged_config_class if issubclass(stock, PreTrainedConfig) else merged_model_class)(stock)


def _stock_named(name: str) -> type | None:
    """A base model's class: one that was saved beside this file, transformers', or one that is registered there."""
    if name in globals():
        return globals()[name]
    registered = list(CONFIG_MAPPING._extra_content.values())
    for _, _, mapping in _auto_mappings():
        registered += getattr(mapping, "_extra_content", {}).values()
    own = next((found for found in registered if getattr(found, "__name__", None) == name), None)
    return own or getattr(importlib.import_module("transformers"), name, None)


for _family in FAMILIES:
    register_family(_family)