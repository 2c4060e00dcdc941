"""How much each attention changes what passes it: a choice of what to skip that needs no search."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..architectures import join
from ..evaluation import call_with, check_reached, evaluation_mode
from ..layers import MHALayer
from ..layers.candidate import Candidate
from ..model import EASModel
from ..runtime.forward import Argument
from ..runtime.prompt import attended_tokens
from ..skippable import eas_of


@torch.no_grad()
def attention_similarities(model: nn.Module, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Cosine similarity of the residual stream in front of and behind each candidate MHA.

    Source: He et al., "What Matters in Transformers? Not All Attention is Needed" (arXiv 2406.15786), section 3: the
    higher, the less the attention changes, so that the most similar are skipped first. The similarity is taken token
    by token. Where the MHA itself adds the residual and applies a norm (as in BERT), that norm's output is compared.

        names = sorted(similarities, key=similarities.get, reverse=True)[:k]
        model.base_model.fix_skipped_modules(names)

    Args:
        model: what `get_peft_model(model, EASConfig(num_skip=k, ...))` returned, with nothing skipped. It is called in
            evaluation mode, which is switched back afterwards.
        batches: keyword arguments of the model. Padding does not count, as far as an attention mask tells of it.

    Returns:
        by full name of the candidate, the mean over the tokens of all batches, in [-1, 1], in the model's order.

    Raises:
        TypeError: for a model without EAS adapters; for batches that are no dictionaries.
        ValueError: if an MHA is skipped, which changes nothing; for no batches; for an MHA that no token reached; for
            a mask of another kind than tensors, such as flex attention's.
    """
    eas = eas_of(model, "attention_similarities", "it")
    if not isinstance(eas, EASModel):
        raise TypeError(
            f"attention_similarities compares attentions, of which a {type(eas).__name__} tells nothing. Pass it the "
            "model that get_peft_model(model, EASConfig(...)) returns."
        )
    if eas.skipped_modules:
        raise ValueError(
            f"attention_similarities compares what all attentions do, but {len(eas.skipped_modules)} are skipped, "
            f"such as {eas.skipped_modules[0]}. Call set_skipped_modules([]) first."
        )
    candidates = {layer.candidate.name: layer.candidate for layer in eas.modules() if isinstance(layer, MHALayer)}
    meters = {name: _Meter(eas.model, candidates[name]) for name in eas.candidates}
    try:
        with evaluation_mode(model):
            for batch in batches:
                call_with(model, batch, "attention_similarities")
    finally:
        for meter in meters.values():
            meter.remove()
    check_reached({name: meter.count for name, meter in meters.items()})
    return {name: float(meter.total / meter.count) for name, meter in meters.items()}


class _Meter:
    """Hooks around one MHA that add up the similarities of its tokens."""

    def __init__(self, model: nn.Module, candidate: Candidate) -> None:
        row = candidate.architecture
        self.is_post_norm = row.kept_norm is not None
        self.mask: Any = None
        self.before: torch.Tensor | None = None
        self.total = torch.zeros(())
        self.count = 0

        block = model.get_submodule(candidate.block)
        argument = Argument.of(block, "attention_mask")
        first, last = row.input_norm or row.shared_norm or row.mha, row.output_norm or row.mha
        self.handles = [
            block.register_forward_pre_hook(partial(self._note_mask, argument), with_kwargs=True),
            model.get_submodule(join(candidate.block, first)).register_forward_pre_hook(self._note, with_kwargs=True),
            model.get_submodule(join(candidate.block, last)).register_forward_hook(self._compare),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _note_mask(self, argument: Argument, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.mask = argument.read(args, kwargs)
        if self.mask is not None and not isinstance(self.mask, torch.Tensor):
            raise ValueError(
                f"attention_similarities cannot tell the padding from an attention mask of type "
                f"{type(self.mask).__name__}. Load the model with attn_implementation='sdpa' or 'eager'."
            )

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.before = args[0] if args else kwargs["hidden_states"]

    def _compare(self, module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        before = self.before.float()
        behind = output.float() if self.is_post_norm else before + output.float()
        similarities = F.cosine_similarity(before, behind, dim=-1)
        if self.mask is not None:
            mask = attended_tokens(self.mask, similarities.shape[-1])
            similarities = similarities[mask.expand_as(similarities).to(similarities.device)]
        self.total = self.total.to(similarities.device) + similarities.sum()
        self.count += similarities.numel()
