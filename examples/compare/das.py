"""DAS: whole layers are skipped, and an adapter stands for each; the bandit of EAS finds the layers.

Source: Wu et al., "Parameter and Computation Efficient Transfer Learning for Vision-Language Pre-trained Models"
(arXiv 2309.01479). A skipped layer computes y = x + s U C norm(x), with the norm in front of its attention; where that
stands behind (post-norm), x has passed the norm of the layer before. Kept layers have the adapters that kept MHAs have
under EAS. The authors' LaVIN mixes two matrices U by a router, which are one where contexts are frozen; their METER's
adapters have a ReLU, which EAS's have not either.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_eas import EASConfig, InputAdapter
from peft_eas.architectures import find_mhas
from peft_eas.runtime.skipped import advance_cache, find_cache


class SkippedLayer(nn.Module):
    """What is left of a skipped layer: an adapter behind its first norm, and an empty slot of the KV cache.

    Args:
        adapter: z → z + what stands for the layer, for z of shape (B, T, d). norm: what feeds it, or None.
        layer_idx: the slot, or None. num_extras: how many values, here None, the layer returns behind its hidden
            states; −1 where it returns these alone and not in a tuple.
    """

    def __init__(self, adapter: nn.Module, norm: nn.Module | None, layer_idx: int | None, num_extras: int) -> None:
        super().__init__()
        self.adapter = adapter
        self.norm = norm
        self.layer_idx = layer_idx
        self.num_extras = num_extras

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the layer does."""
        advance_cache(find_cache(args, kwargs), self.layer_idx, hidden_states)
        z = hidden_states if self.norm is None else self.norm(hidden_states)
        output = hidden_states + (self.adapter(z) - z)
        return output if self.num_extras < 0 else (output, *[None] * self.num_extras)


class LayerSkipping(nn.Module):
    """A model whose layers may be skipped whole, which `EASCallback` and `EASSearch` take like one of EAS.

    Args:
        base: the model, which is changed in place. batch: inputs of it; one pass tells what its layers return.
        num_skip: how many MHAs to skip, with the layers that hold them: as many layers as are full.
        r: rank of the adapter that stands for a layer, for each MHA that the layer holds, as PIAs would have it.
        arguments: further ones of `EASConfig`, for the adapters of kept layers.

    Attributes:
        candidates: full names of the layers that may be skipped. skipped_modules: of those that are skipped now.
        active_config: what the search asks for and writes.

    Raises:
        ValueError: if `num_skip` fills no layer.
    """

    def __init__(self, base: PreTrainedModel, batch: dict[str, Any], num_skip: int, r: int, **arguments: Any) -> None:
        super().__init__()
        norms: dict[str, nn.Module] = {}
        for _, block, row in find_mhas(base):
            if row.input_norm is not None:
                norms.setdefault(block, base.get_submodule(f"{block}.{row.input_norm}"))
        if hasattr(base, "accepts_loss_kwargs"):  # which Trainer asks the outermost model for
            self.accepts_loss_kwargs = base.accepts_loss_kwargs
        self.adapted = get_peft_model(base, EASConfig(num_skip=0, **arguments))
        self.eas = self.adapted.base_model
        self.candidates = list(dict.fromkeys(name.rpartition(".")[0] for name in self.eas.candidates))
        mhas_per_layer = len(self.eas.candidates) // len(self.candidates)
        if num_skip < mhas_per_layer:
            raise ValueError(
                f"LayerSkipping(num_skip={num_skip}): a layer holds {mhas_per_layer} of the "
                f"{len(self.eas.candidates)} MHAs. Skip at least as many."
            )
        self.active_config = EASConfig(num_skip=num_skip // mhas_per_layer)
        self.skipped_modules: list[str] = []
        self.layers = {name: base.get_submodule(name) for name in self.candidates}
        self.stand_ins = nn.ModuleDict()
        handles = [
            layer.register_forward_hook(partial(self._add, name, r * mhas_per_layer, norms.get(name)))
            for name, layer in self.layers.items()
        ]
        with torch.no_grad():
            self.adapted.eval()(**batch)
        for handle in handles:
            handle.remove()
        for name, layer in self.layers.items():
            layer.forward = partial(self._call, name, layer.forward)

    def _add(
        self, name: str, r: int, norm: nn.Module | None, layer: nn.Module, args: tuple, output: torch.Tensor | tuple
    ) -> None:
        hidden_states = output[0] if isinstance(output, tuple) else output
        config = self.eas.active_config
        adapter = InputAdapter(
            hidden_states.shape[-1], r, config.groups, config.scale, dropout=config.dropout, paths=1
        )
        indices = (getattr(module, "layer_idx", None) for module in layer.modules())
        stand_in = SkippedLayer(
            adapter.to(hidden_states.device),
            norm,
            next((index for index in indices if isinstance(index, int)), None),
            len(output) - 1 if isinstance(output, tuple) else -1,
        )
        self.stand_ins[name.replace(".", "/")] = stand_in

    def _call(self, name: str, kept: Any, *args: Any, **kwargs: Any) -> Any:
        forward = self.stand_ins[name.replace(".", "/")] if name in self.skipped_modules else kept
        return forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model."""
        return self.adapted(*args, **kwargs)

    def set_skipped_modules(self, names: Sequence[str]) -> None:
        """Skips exactly the layers `names` from the next forward pass on."""
        self.skipped_modules = [name for name in self.candidates if name in names]

    def fix_skipped_modules(self, names: Sequence[str]) -> None:
        """Skips the layers `names` for good: what only the others', or only their own layers, would use is dropped."""
        self.set_skipped_modules(names)
        self.active_config.skipped_modules = self.skipped_modules
        for name, layer in self.layers.items():
            if name in self.skipped_modules:
                layer.requires_grad_(False)
            else:
                del self.stand_ins[name.replace(".", "/")]

    def anneal_context(self, share: float) -> None:
        """Anneals the context of the kept layers' adapters."""
        self.eas.anneal_context(share)

    def freeze_context(self, is_resumed: bool = False) -> None:
        """Freezes the context of the kept layers' adapters."""
        self.eas.freeze_context(is_resumed)
        self.active_config.context = self.eas.active_config.context

    def sync_context(self) -> None:
        """Makes the contexts of the kept layers' adapters equal on all ranks."""
        self.eas.sync_context()

    def merge_and_unload(self) -> PreTrainedModel:
        """The model with the kept layers' adapters folded in, and of the skipped layers their adapters alone.

        It is to be used where it is: no class would load it with its layers skipped, so it refuses to be saved.
        """
        for layer in self.layers.values():
            del layer.forward
        model = self.adapted.merge_and_unload()
        for name in self.skipped_modules:
            model.set_submodule(name, self.stand_ins[name.replace(".", "/")])
        model.save_pretrained = _refuse_to_save
        return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "A model with layers that DAS skips cannot be saved: no class would load it. Save the state_dict() of the "
        "LayerSkipping model before merging."
    )
