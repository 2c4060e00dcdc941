"""A block with and without one of its MHAs, on the same inputs: what the MHA's adapters are fitted to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from ..architectures import at_path
from ..layers import Candidate
from ..runtime.forward import Argument
from ..runtime.prompt import attended_tokens


class Seen(NamedTuple):
    """What one pass of a block computed, for all tokens that are no padding.

    Attributes:
        ffn_input: (tokens, d), in front of the PIA. projection_input: (tokens, d_ffn), what the FFN's output
            projection reads, or None where the block has none. total: (tokens, d), the sum of the residual stream and
            what that projection writes, or None where there is no such sum.
    """

    ffn_input: torch.Tensor
    projection_input: torch.Tensor | None
    total: torch.Tensor | None


class BlockRecorder:
    """Behind every pass of a block, calls it again without each of `candidates`, on the same inputs.

    For passes in evaluation mode, without gradients and without a KV cache.

    Args:
        candidates: MHAs of one block, in front of one FFN.
        receive: is given, for each, the candidate, what the pass with it computed, and the one without it.
    """

    def __init__(
        self,
        block: nn.Module,
        candidates: Sequence[Candidate],
        adapter_name: str,
        receive: Callable[[Candidate, Seen, Seen], None],
    ) -> None:
        self.block, self.candidates, self.adapter_name, self.receive = block, candidates, adapter_name, receive
        row = candidates[0].architecture
        self._mask = Argument.of(block, "attention_mask")
        self._ffn = at_path(block, row.ffn)
        self._projection = row.output_projection and at_path(block, row.output_projection)
        # What reads the sum, or the block itself, if it returns it.
        self._sum: nn.Module | None = None
        self._knows_sum = self._projection is None
        self._inputs: dict[nn.Module, torch.Tensor] = {}
        self._is_repeating = False
        self._handles = [
            block.register_forward_hook(self._repeat, with_kwargs=True),
            *(self._note_input_of(module) for module in (self._ffn, self._projection) if module is not None),
        ]

    def remove(self) -> None:
        """Takes the hooks out of the block."""
        for handle in self._handles:
            handle.remove()

    def _note_input_of(self, module: nn.Module) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(value, torch.Tensor):
                self._inputs.pop(module, None)  # in the order of the last calls
                self._inputs[module] = value

        return module.register_forward_pre_hook(note, with_kwargs=True)

    def _repeat(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._is_repeating:
            return
        self._is_repeating = True
        try:
            if not self._knows_sum:
                self._find_sum(args, kwargs)
                block(*args, **kwargs)  # with all that is to be noted
            mask = attended_tokens(self._mask.read(args, kwargs), self._inputs[self._ffn].shape[-2])
            with_mha = self._seen(output, mask)
            for candidate in self.candidates:
                with _skipped(candidate, self.adapter_name):
                    self.receive(candidate, with_mha, self._seen(block(*args, **kwargs), mask))
        finally:
            self._is_repeating = False

    def _seen(self, output: Any, mask: torch.Tensor | None) -> Seen:
        """What the last pass, which returned `output`, computed."""
        total = _first(output) if self._sum is self.block else self._inputs.get(self._sum)
        values = (self._inputs[self._ffn], self._inputs.get(self._projection), total)
        return Seen(*(value if value is None else _tokens(value, mask) for value in values))

    def _find_sum(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds where what the projection writes arrives as it is, added to the residual stream.

        That is known by adding to it: in a pre-norm block it is what the block returns, in a post-norm block what the
        last norm reads. Where a norm or a scale comes before the sum, it is nowhere.
        """
        handles = [self._note_input_of(module) for module in self.block.modules() if module is not self.block]
        written: list[torch.Tensor] = []
        # A copy, as some blocks add to it in place.
        handles.append(self._projection.register_forward_hook(lambda _, __, output: written.append(output.clone())))
        try:
            passes = []
            for push in (None, self._push):
                pushing = push and self._projection.register_forward_hook(push)
                self._inputs = {}
                output = _first(self.block(*args, **kwargs))
                passes.append({**self._inputs, self.block: output})
                if pushing:
                    pushing.remove()
        finally:
            for handle in handles:
                handle.remove()
        plain, pushed = passes
        self._inputs, self._knows_sum = {}, True
        difference = self._difference(written[0])
        for module in reversed(plain):
            before, after = plain[module], pushed.get(module)
            is_alike = before.numel() == written[0].numel() and before.shape[-1] == written[0].shape[-1]
            if after is None or not is_alike:
                continue
            before, after = before.float(), after.float()
            moved = (after - before).reshape(-1, before.shape[-1]).mean(0)
            residual = before - written[0].float().view_as(before)
            if (moved - difference).norm() <= 1e-2 * difference.norm() and residual.norm() > 1e-3 * before.norm():
                self._sum = module
                break
        if self._sum is not None and self._sum is not self.block:
            self._handles.append(self._note_input_of(self._sum))

    def _difference(self, written: torch.Tensor) -> torch.Tensor:
        """(d,) alternating in sign, large enough to be seen next to the residual stream."""
        signs = torch.ones(written.shape[-1], device=written.device)
        signs[::2] = -1
        return signs * written.float().square().mean().sqrt()

    def _push(self, module: nn.Module, args: tuple, written: torch.Tensor) -> torch.Tensor:
        return (written.float() + self._difference(written)).to(written.dtype)


@contextmanager
def _skipped(candidate: Candidate, adapter_name: str) -> Iterator[None]:
    """Skips one MHA meanwhile."""
    before, candidate.drawn = candidate.drawn, {adapter_name: True}
    try:
        yield
    finally:
        candidate.drawn = before


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _tokens(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(tokens, width), one below the other, without those that the mask hides."""
    flat = value.reshape(-1, value.shape[-1])
    if mask is None or mask.numel() != len(flat):
        return flat
    return flat[mask.reshape(-1).to(flat.device)]
