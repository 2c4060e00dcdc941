"""What is searched: the loss of every skip set on every batch, by a model that is asked once for each, or by a table.

A skip set is a tuple of the candidates' indices, in order.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.shared.json_lines import append_line, read_lines

Set = tuple[int, ...]


class Problem:
    """Candidates, of which any set may be skipped, and what that costs.

    The batches 0 to `num_search` − 1 are for searches, the `num_held_out` ones behind them for the scores.

    Args:
        candidates: names, in layer order.
        similarities: of each candidate, as from `attention_similarities`: the higher, the less it does.
        measure: returns the loss of a set on a batch.
        file: what keeps the losses, so that nothing is measured twice. settings: what they depend on, for JSON.

    Raises:
        SystemExit: if `file` holds losses that were measured with other settings.
    """

    def __init__(
        self,
        candidates: Sequence[str],
        similarities: Sequence[float],
        measure: Callable[[Set, int], float],
        num_search: int,
        num_held_out: int,
        file: Path,
        settings: dict[str, Any],
    ) -> None:
        self.candidates = list(candidates)
        self.similarities = list(similarities)
        self.num_search = num_search
        self.num_held_out = num_held_out
        self._measure = measure
        self._file = file
        settings = {**settings, "num_search": num_search, "num_held_out": num_held_out}
        kept = read_lines(file)
        if not kept:
            append_line(file, settings)
        first, *lines = kept or [settings]
        if first != settings:
            raise SystemExit(
                f"{file} holds losses that were measured with {first}; now the settings are {settings}. Give another "
                "--output-dir, or delete the file."
            )
        self._losses = {(mask, batch): loss for mask, batch, loss in lines}

    def loss(self, skipped: Set, batch: int) -> float:
        """The loss with `skipped` skipped on a batch."""
        key = (mask_of(skipped), batch)
        if key not in self._losses:
            self._losses[key] = round(self._measure(skipped, batch), 6)
            append_line(self._file, [*key, self._losses[key]])
        return self._losses[key]

    def score(self, skipped: Set) -> float:
        """The mean loss on the batches that no search sees."""
        return self._mean(skipped, range(self.num_search, self.num_search + self.num_held_out))

    def search_score(self, skipped: Set) -> float:
        """The mean loss on all batches of the search."""
        return self._mean(skipped, range(self.num_search))

    def _mean(self, skipped: Set, batches: range) -> float:
        return statistics.fmean(self.loss(skipped, batch) for batch in batches)


def mask_of(skipped: Set) -> int:
    """A set as a number: bit i is set where candidate i is skipped."""
    return sum(1 << index for index in skipped)
