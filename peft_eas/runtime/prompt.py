"""Which tokens are the prompt.

The mean m of the prompt (arXiv 2403.15226, section 3.3) is the one statistic of an adapter that depends on the
sample. `PromptHook` marks the prompt once per forward pass; the mark travels as a keyword argument to every MHA.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

PROMPT_KEY = "eas_prompt"
PROMPT_MASK_KEY = "eas_prompt_mask"


class Prompt:
    """The prompt of one forward pass.

    Args:
        mask: boolean, (B, T), True for prompt tokens; None for every token.
        find: returns such a mask; called when it is first needed: a pass that goes on behind a KV cache needs none.
        is_given: whether it is the user's, and not only what the model's inputs tell.
        is_known: False where the inputs tell nothing of tokens, as an image's.

    `recorded` names the adapters whose statistic has seen this pass, which gradient checkpointing computes twice.
    """

    def __init__(
        self,
        mask: torch.Tensor | None = None,
        find: Callable[[], torch.Tensor | None] | None = None,
        is_given: bool = False,
        is_known: bool = True,
    ) -> None:
        self._mask = mask
        self._find = find
        self.is_given = is_given
        self.is_known = is_known
        self.recorded: set[int] = set()

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask."""
        if self._find is not None:
            self._mask, self._find = self._find(), None
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
