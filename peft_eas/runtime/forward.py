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

from .adapter import RoutedAdapter
from .context_cache import cached_length, read_context, write_context
from .prompt import PROMPT_KEY, ByThread, Prompt, keys_attended_to, masked_mean
from .skipped import advance_cache, find_cache

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

        Raises:
            ValueError: if the prompt is needed, but not known.
        """
        if tokens == "all":
            return z.float().mean(1)
        is_named = self.prompt is not None and self.prompt.is_given
        if tokens == "attended" or (tokens == "input" and not is_named):
            states, mask = self.attended
            states = z if states is None else states
            return masked_mean(states, keys_attended_to(mask, states.shape[:2]))
        if self.prompt is None or not self.prompt.is_known:
            raise ValueError(
                "A block was called outside of a forward pass of the whole model, so that its prompt is not known. "
                "Give the model, or the part of it that is called, input_ids or inputs_embeds by these names; where "
                "gradient checkpointing computes the block again (some models' are given no more than they need), "
                "leave that off; or freeze the context (freeze_context(), before a merge)."
            )
        return self.prompt.mean(z)

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
