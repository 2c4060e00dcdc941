"""What is searched: the loss of every skip set on every batch, by a model that is asked once for each, or by a table.

A skip set is a tuple of the candidates' indices, in order.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from examples.shared.json_lines import append_line, read_lines
from peft_eas import EASConfig, attention_similarities, fit_adapters

CALIBRATION_BATCHES = 8  # of the search's, for the cosine similarities
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


def problem_of(
    base: PreTrainedModel,
    batches: Sequence[dict[str, Any]],
    num_search: int,
    file: Path,
    settings: dict[str, Any],
    is_fitted: bool = False,
    **eas: Any,
) -> Problem:
    """The problem of what `base` loses, without any training, by attentions that are dropped.

    Args:
        batches: with labels; the first `num_search` are for searches. is_fitted: whether the library's adapters stand
            for what is dropped, fitted to the search's batches; otherwise nothing does. eas: further arguments of
            `EASConfig`.
    """
    identity = {"r": 1, "groups": 1, "paths": 1, "output_r": 0}
    config = EASConfig(num_skip=1, attention_r=0, context="none", **({} if is_fitted else identity), **eas)
    model = get_peft_model(base, config).eval()
    names = model.base_model.candidates
    similarities = attention_similarities(model, batches[: min(CALIBRATION_BATCHES, num_search)])
    if is_fitted:
        fit_adapters(model, batches[:num_search])

    @torch.no_grad()
    def measure(skipped: Set, batch: int) -> float:
        model.base_model.set_skipped_modules([names[index] for index in skipped])
        return model(**batches[batch]).loss.item()

    num_held_out = len(batches) - num_search
    return Problem(names, [similarities[name] for name in names], measure, num_search, num_held_out, file, settings)


def mask_of(skipped: Set) -> int:
    """A set as a number: bit i is set where candidate i is skipped."""
    return sum(1 << index for index in skipped)
