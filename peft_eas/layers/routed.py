"""What the wrappers have in common whose adapters stand in front of projections, and may read a context."""

from typing import ClassVar

import torch
from torch import nn

from ..config import EASConfig
from ..folding.fold import ExpertWeights, LowRankMap, added, low_rank_map
from ..runtime.adapter import InputAdapter, RoutedAdapter
from ..runtime.context_cache import read_context, write_context
from ..runtime.forward import Call
from .adapted import AdaptedLayer


class RoutedLayer(AdaptedLayer):
    """A wrapper that holds an adapter in front of the projections of what it wraps."""

    adapter_class: ClassVar[type[RoutedAdapter]]

    @property
    def projections(self) -> dict[str, nn.Module | ExpertWeights]:
        """By name within the block, the projections that read what the adapter returns."""
        row = self.candidate.architecture
        if self.stands_for_skipped:
            return self.projections_within(row.ffn, row.ffn_projections)
        return self.projections_within(row.mha, row.mha_projections)

    def new_adapter(self, config: EASConfig, width: int) -> RoutedAdapter:
        """As above."""
        adapter_class = InputAdapter if config.context == "none" else self.adapter_class
        adapter = adapter_class(
            width,
            self.rank(config),
            groups=config.groups,
            scale=config.scale,
            router_temperature=config.router_temperature,
            dropout=config.dropout,
            init_weights=config.init_weights,
            paths=config.paths,
        )
        if config.context == "running":
            adapter.freeze_context()
        return adapter

    @property
    def needs_prompt(self) -> bool:
        """Whether the next forward pass takes this layer's context from the prompt."""
        return not self.merged and self.uses_prompt(self.adapter_in_force)

    def uses_prompt(self, adapter_name: str | None) -> bool:
        """Whether the adapter is of use here and takes its context from the prompt."""
        return self.used_adapter(adapter_name) is not None and self._takes_prompt(adapter_name)

    def _takes_prompt(self, adapter_name: str) -> bool:
        config = self.candidate.configs[adapter_name]
        # A kept MHA's adapter without a router reads no context.
        return config.context == "prompt" and (self.candidate.is_skipped_by(adapter_name) or config.paths > 1)

    def _context(self, adapter: RoutedAdapter, z: torch.Tensor, call: Call, seen: int) -> torch.Tensor | None:
        """The context for z, (B, T, d), of which the cache has seen `seen` tokens before: (B, d), or (1, d).

        None for an adapter that needs none.
        """
        name, candidate = self.adapter_in_force, self.candidate
        if not adapter.needs_context:
            return None
        if not self._takes_prompt(name):
            self._check_recorded(name)
            return adapter.running_context.detach()[None]
        if seen > 0:
            context = read_context(call.cache, candidate.layer_idx, (name, self.stands_for_skipped))
            if context is None:
                raise ValueError(
                    f"The KV cache holds {seen} tokens, but no context of the EAS adapter {name!r} for "
                    f"{candidate.name}: it was filled with other adapters or another skip set. Start with a new "
                    "cache after changing them, or use context='running'."
                )
            return context
        context = call.context(z, candidate.context_tokens)
        if self.training and call.prompt is not None and id(adapter) not in call.prompt.recorded:
            adapter.record(context.detach())
            call.prompt.recorded.add(id(adapter))
        return adapter.annealed(context)

    def _check_recorded(self, name: str) -> None:
        """Raises a ValueError where the running mean of the adapter `name` was recorded, but is not there."""
        adapter, config = self.used_adapter(name), self.candidate.configs[name]
        if config.context != "running" or not config.context_recorded or torch.compiler.is_compiling():
            return
        if adapter.needs_context and adapter.has_lost_context():
            raise ValueError(
                f"The running mean of the EAS adapter {name!r} for {self.candidate.name} is zero, but its config says "
                "that one was recorded (context_recorded=True): the weights were copied or loaded without "
                "running_context, or the skip set has changed since. Copy all of named_parameters(), or load the "
                "whole state dict; to train a new adapter by this config, set context='prompt'."
            )

    def _keep_context(self, context: torch.Tensor | None, call: Call) -> None:
        name = self.adapter_in_force
        if self.candidate.layer_idx is not None and self._takes_prompt(name):
            write_context(call.cache, self.candidate.layer_idx, (name, self.stands_for_skipped), context)

    def low_rank_map(self, adapter_names: list[str]) -> LowRankMap | None:
        """What the adapters `adapter_names` are together with their running contexts, or None without a use here."""
        adapters = self.used_adapters(adapter_names)
        return added([low_rank_map(adapter, adapter.running_context) for adapter in adapters])
