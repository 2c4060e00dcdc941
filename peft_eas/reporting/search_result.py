"""What a search found, in numbers and words: what skipping costs, and how sure that is."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# Of a candidate's value: a score without a meaning of its own (the higher, the less it costs to skip it), or a cost:
# by how much skipping it raises the logarithm of the loss, or the loss itself where that can be negative.
Unit = Literal["score", "log loss", "loss"]

_COST = "Cost: by how much skipping an attention raises the loss, against the mean of those that were chosen."
# What the column of values is called, and what it means.
COLUMNS: dict[Unit, tuple[str, str]] = {
    "score": ("score", "By the search's score, the higher, the less it costs to skip an attention."),
    "log loss": ("cost", _COST),
    "loss": ("cost", _COST),
}
# Rows of a card's table on either side of the choice.
NEIGHBOURS = 3


def against_chosen(costs: dict[str, float], chosen: Collection[str]) -> dict[str, float]:
    """Costs less the mean cost of the chosen. Where all sets that were tried are of one size, they tell costs apart,
    but not what all have in common."""
    known = [costs[name] for name in chosen if name in costs]
    reference = math.fsum(known) / max(1, len(known))
    return {name: cost - reference for name, cost in costs.items()}


def ranking_of(scores: Sequence[float]) -> list[int]:
    """Indices of the candidates, the one to skip first at the front, as `Strategy.ranking`."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)


def shown(increase: float, unit: Unit) -> float:
    """An increase as an axis shows it: of the log loss, as the increase of the loss in percent."""
    return 100.0 * math.expm1(min(increase, 100.0)) if unit == "log loss" else increase


def is_clear_decrease(increase: float, deviation: float | None) -> bool:
    """Whether a loss is below that with nothing skipped, by more than twice its deviation: a sign that the model has
    trained too little with nothing skipped to be held against it."""
    return deviation is not None and increase + 2.0 * deviation < 0.0


def increase_text(increase: float, unit: Unit, deviation: float | None = None) -> str:
    """An increase for people, with its standard deviation: "+2.1 ± 0.4 %", or "×12 ± 3" where the loss doubles."""
    percent = shown(increase, unit)
    ratio = 1.0 + percent / 100.0
    spread = None if deviation is None else deviation * (100.0 * ratio if unit == "log loss" else 1.0)
    if unit != "log loss":
        return f"{increase:+.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    if ratio >= 2.0:
        form = ".1e" if ratio >= 1e5 else ",.0f" if ratio >= 100.0 else ".1f"
        return f"×{ratio:{form}}" + ("" if spread is None else f" ± {spread / 100.0:{form}}")
    digits = 2 if abs(percent) < 1.0 and (spread is None or spread < 1.0) else 1
    return f"{percent:+.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}") + " %"


def value_text(value: float, unit: Unit) -> str:
    """A candidate's score or cost, in a table."""
    return f"{value:+.4f}" if unit == "score" else increase_text(value, unit)


@dataclass(frozen=True)
class SearchResult:
    """What the search left beside scores and skip set.

    Attributes:
        strategy: name of its class.
        curve: `{"num_skip", "increase", "deviation"}`, lists: by how much the log loss is expected to grow against
            nothing skipped when so many candidates are skipped, the chosen or else the cheapest, and the standard
            deviation.
        measured: `{"num_skip", "increase", "deviation"}` of a few numbers skipped: the same, measured on held-out
            batches when the search ended; the deviation is the standard error.
        savings: `{"unit", "total", "per_candidate"}`: of what the whole base needs, "seconds", "bytes" of KV cache or
            "attentions", how much skipping each candidate saves.
        unit: of the increases.
    """

    strategy: str
    curve: dict[str, list[float]] | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)
    savings: dict[str, Any] | None = None
    unit: Unit = "log loss"

    @classmethod
    def of(cls, saved: dict[str, Any] | None) -> "SearchResult | None":
        """From the `search` of a config, a dict of these attributes, some of which may be missing or None."""
        if not saved:
            return None
        curve = saved.get("curve")
        unit: Unit = saved.get("unit") or "log loss"
        return cls(
            saved.get("strategy") or "an unnamed strategy",
            curve,
            list(saved.get("measured") or ()),
            saved.get("savings"),
            unit if curve else "score",
        )

    def expected(self, num_skip: int) -> tuple[float, float] | None:
        """The curve's increase and deviation at a number of skipped candidates."""
        if self.curve is None or num_skip not in self.curve["num_skip"]:
            return None
        at = self.curve["num_skip"].index(num_skip)
        return self.curve["increase"][at], self.curve["deviation"][at]

    def measurement(self, num_skip: int) -> tuple[float, float | None] | None:
        """The same as measured."""
        found = next((one for one in self.measured if one["num_skip"] == num_skip), None)
        return None if found is None else (found["increase"], found.get("deviation"))

    def saved(self, indices: Sequence[int]) -> tuple[str, list[str]] | None:
        """What the savings are called, and what they come to with the first 0, 1, … of the candidates skipped."""
        if self.savings is None or self.savings["unit"] not in ("seconds", "bytes"):
            return None
        is_time, total = self.savings["unit"] == "seconds", self.savings["total"]
        left, texts = total, []
        for index in (None, *indices):
            left -= 0.0 if index is None else self.savings["per_candidate"][index]
            share = max(left / total, 0.0)
            fast = f"{1 / share:.2f}×" if share > 1e-6 else ""
            texts.append(fast if is_time else f"{100 * share:.0f} %")
        return "Speed-up" if is_time else "KV cache left", texts

    def values(self, scores: dict[str, float], chosen: Collection[str]) -> dict[str, float]:
        """The scores in `unit`: as they are, or the costs that they stand for, against the mean of the chosen."""
        return scores if self.unit == "score" else against_chosen({name: -x for name, x in scores.items()}, chosen)

    def sentence(self, scores: dict[str, float], chosen: Sequence[str]) -> str:
        """The strategy and the chosen point.

        Args:
            scores: of all candidates, in the model's order.
            chosen: names, of which those without a score do not count: an earlier merge may have deleted them.
        """
        num_skip = sum(name in scores for name in chosen)
        text = f"The search ({self.strategy}) chose {num_skip} of {len(scores)} candidates to skip."
        points = {"measured": self.measurement(num_skip), "expected": self.expected(num_skip)}
        what, point = next(((what, at) for what, at in points.items() if at is not None), ("", None))
        if point is None:
            return text
        change = increase_text(point[0], self.unit, point[1])
        text += f" When it ended, that changed the held-out loss against nothing skipped by {change} ({what})."
        if is_clear_decrease(*point):
            text += " The model had learned less with nothing skipped, so it does not tell what attentions are worth."
        return text

    def table(self, scores: dict[str, float], chosen: Sequence[str]) -> list[tuple[str, ...]]:
        """Head and rows of the curve around the choice: number skipped, expected, measured, and what it saves; with
        arguments as of `sentence`."""
        if self.curve is None:
            return []
        own = [i for i, name in enumerate(scores) if name in chosen]
        ranking, at = ranking_of(list(scores.values())), len(own)
        near = range(at - NEIGHBOURS, at + NEIGHBOURS + 1)
        numbers = [number for number in self.curve["num_skip"] if number in near or self.measurement(number)]
        saved, saved_by_choice = self.saved(ranking), self.saved(own)
        rows = []
        for number in numbers:
            is_choice = number == at
            points = (self.expected(number), self.measurement(number))
            cells = ("" if point is None else increase_text(point[0], self.unit, point[1]) for point in points)
            saving = (saved_by_choice if is_choice else saved)[1][number] if saved else None
            label = f"{number}, the choice" if is_choice else str(number)
            rows.append((label, *cells, *([saving] if saved else [])))
        return [("Skipped", "Change of the loss, expected", "Measured", *(saved[:1] if saved else ())), *rows]
