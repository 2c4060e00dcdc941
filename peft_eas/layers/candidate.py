"""One MHA that may be skipped, as its wrappers share it."""

from collections.abc import Callable

from ..architectures import Architecture
from ..config import EASConfig
from ..runtime.forward import Call
from ..runtime.prompt import ByThread, Prompt


class Candidate:
    """One MHA that may be skipped, as its wrappers share it.

    Attributes:
        name: full name of the MHA. block: full name of its block. architecture: the block's row of the table.
        layer_idx: the MHA's slot of the KV cache, or None where there is none, as for a cross-attention.
        current: returns the prompt of the forward pass that is under way.
        configs: by adapter name, the configs of the adapters that have this MHA as a target.
        skipped_by: names of the adapters that skip it. kept_by: of those that never skip it.
        drawn: by adapter name, whether the step of a search that is under way skips it, whatever `skipped_by` says.
        call: the MHA's call, left for the FFN of the same forward pass, which is given less.
    """

    def __init__(
        self,
        name: str,
        block: str,
        architecture: Architecture,
        layer_idx: int | None,
        current: Callable[[], Prompt | None],
    ) -> None:
        self.name = name
        self.block = block
        self.architecture = architecture
        self.layer_idx = None if architecture.is_cross else layer_idx
        self.current = current
        self.configs: dict[str, EASConfig] = {}
        self.skipped_by: set[str] = set()
        self.kept_by: set[str] = set()
        self.drawn: dict[str, bool] = {}
        self.call: ByThread[Call] = ByThread()

    def is_skipped_by(self, adapter_name: str | None) -> bool:
        """Whether the adapter skips it in the next forward pass."""
        return self.drawn.get(adapter_name, adapter_name in self.skipped_by)

    @property
    def context_tokens(self) -> str:
        """What the context is the mean of; see `Call.context`."""
        if self.architecture.attends is not None:
            return "input" if self.architecture.kind == "encoder" and not self.architecture.is_cross else "attended"
        return "all" if self.architecture.kind in ("vision", "audio") else "prompt"
