"""A model that is no language model and has no attention, of whose blocks a search may skip some."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import Dataset

from peft_eas import EASConfig

WIDTH, BLOCKS, USELESS = 8, 5, ["1", "3"]


class Blocks(nn.Module):
    """x → x + block(x), five times. The blocks `USELESS` add nothing at the start, so that skipping them is free."""

    def __init__(self, **options) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH, bias=False) for i in range(BLOCKS)})
        with torch.no_grad():
            for name, block in self.blocks.items():
                block.weight.copy_(0.3 * torch.randn(WIDTH, WIDTH, generator=generator))
                block.weight.mul_(name not in USELESS)
        self.active_config = EASConfig(**{"num_skip": 2, "context": "none", **options})
        self.candidates = list(self.blocks)
        self.skipped_modules: list[str] = []
        self.calls: list[str] = []
        self.shares: list[float] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for name, block in self.blocks.items():
            if name not in self.skipped_modules:
                x = x + block(x)
        loss = {} if labels is None else {"loss": nn.functional.mse_loss(x, labels)}
        return {**loss, "logits": x}

    def set_skipped_modules(self, names: Sequence[str]) -> None:
        self.skipped_modules = [name for name in self.candidates if name in names]

    def fix_skipped_modules(self, names: Sequence[str]) -> None:
        self.set_skipped_modules(names)
        self.active_config.skipped_modules = self.skipped_modules
        for name in self.skipped_modules:
            if name in self.blocks:
                del self.blocks[name]

    def anneal_context(self, share: float) -> None:
        self.shares.append(share)

    def freeze_context(self, is_resumed: bool = False) -> None:
        self.calls.append("freeze again" if is_resumed else "freeze")
        self.active_config.context = "running"

    def sync_context(self) -> None:
        self.calls.append("sync")


class Points(Dataset):
    """Random points, and what all blocks together make of them."""

    def __init__(self, size: int = 64, seed: int = 0) -> None:
        self.x = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.labels = Blocks()(self.x)["logits"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | slice) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}
