"""Continuous batching in transformers (`generate_batch`), whose KV cache has pages for every layer that it counts.

A manager reads of the config how many layers there are, and of which types. So it is given a copy of the model, which
shares all tensors with the model itself and looks like one of its kept attentions alone.

Needs nothing but torch and transformers: it is a part of the file that a merged checkpoint carries.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .vllm_backend import deleted_layers, number_kept_attentions

_MANAGER = "_cached_continuous_batching_manager"  # where transformers keeps one for the next time


class BatchingMixin:
    """Continuous batching of a merged model class, with pages for the kept attentions alone."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock class."""
        kept = getattr(self, _MANAGER, None)
        model = model_of_kept_attentions(self) if kept is None else kept.model
        manager = super(BatchingMixin, model).init_continuous_batching(*args, **kwargs)
        if model is not self:  # the manager has chosen another attention in the config that it reads
            model.base_model.config._attn_implementation = model.config._attn_implementation
        return manager

    @contextmanager
    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As the stock class."""
        with super().continuous_batching_context_manager(*args, **kwargs) as manager:
            yield manager
        if getattr(manager.model, _MANAGER, None) is manager:
            setattr(self, _MANAGER, manager)


def model_of_kept_attentions(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` on the same tensors, whose config knows the kept attentions alone, by which they are numbered.

    The model itself where there is nothing to save, or nothing is left.
    """
    if model.config.is_encoder_decoder:  # which a manager does not take
        return model
    whole = model.config.get_text_config(decoder=True)
    skipped = deleted_layers(model, is_text_model=whole is model.config)
    if not 0 < len(skipped) < whole.num_hidden_layers:
        return model
    shared = (*model.parameters(), *model.buffers(), getattr(model, "_device_mesh", None))
    copied = copy.deepcopy(model, {id(one): one for one in shared})
    whole = copied.config.get_text_config(decoder=True)
    copied.config = copy.deepcopy(copied.config)  # the parts inside, which run all blocks, keep the other
    number_kept_attentions(copied, whole, copied.config.get_text_config(decoder=True), skipped)
    return copied
