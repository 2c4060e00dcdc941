"""Reads a search from what a run leaves behind; of any strategy, the library's own or not."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...strategies import STRATEGIES, AttentionBandit, Strategy, ThompsonSampling
from ..search_result import SearchResult, Unit, against_chosen, ranking_of

Source = str | os.PathLike | dict[str, Any]


@dataclass(frozen=True)
class Round:
    """Sets, as indices of candidates, and their finite losses on one batch."""

    step: int
    sets: list[set[int]]
    losses: list[float]


@dataclass(frozen=True)
class Search:
    """A search as the pictures need it.

    Attributes:
        values: of the candidates, in `unit`: costs against the mean cost of `skipped`, or else scores.
        deviations: of these costs.
        skipped: the MHAs that are skipped, or the best so far while the search is not over.
        training: step and loss of training steps.
        boundaries: what ends at which step, where that is known.
        bandit: the strategy itself, if it was the bandit. gain: by how much the log loss of the true best set is
            expected to be below that of the choice, if the strategy can tell.
        result: the curve and what belongs to it; its unit is "score" without a curve.
    """

    candidates: list[str]
    scores: dict[str, float]
    values: list[float]
    deviations: list[float] | None
    unit: Unit
    ranking: list[int]
    rounds: list[Round]
    training: list[tuple[int, float]]
    skipped: list[str]
    is_over: bool
    boundaries: dict[str, int]
    bandit: AttentionBandit | None
    gain: float | None
    result: SearchResult


def read_rounds(source: Source) -> Search:
    """As `read_search`, of a search that has learned something.

    Raises:
        FileNotFoundError, ValueError: if `source` holds no search, or one without a round.
    """
    search = read_search(source)
    if not search.rounds:
        raise ValueError("The search has no round of rewards yet, so there is no curve to draw. Train past warm-up.")
    return search


def read_search(source: Source) -> Search:
    """The search that `source` holds.

    Raises:
        FileNotFoundError, ValueError: if `source` holds no search.
    """
    record = source if isinstance(source, dict) else _read_file(Path(source))
    if "stateful_callbacks" in record:
        record = (record["stateful_callbacks"].get("EASCallback") or {}).get("record") or {}
    state = record.get("strategy", record.get("bandit"))  # as earlier versions call it
    if state is None:
        raise ValueError(
            f"{source if not isinstance(source, dict) else 'The record'} holds no search. Give the folder of a run "
            "with EASCallback that searched (not one with skipped_modules given), its eas_search.json, or a "
            "checkpoint's trainer_state.json."
        )
    name = state.get("strategy", "AttentionBandit")  # which earlier versions' states do not name
    candidates, scores, skipped = state["candidates"], state["scores"], record.get("skipped_modules")
    ranking = ranking_of(scores)
    rounds = [_round(number, one) for number, one in enumerate(state["rounds"])]
    training = [(int(text.split()[0]), float(text.split()[-1])) for text in state.get("steps", ())]
    losses = [loss for one in rounds for loss in one.losses] + [loss for _, loss in training]
    unit: Unit = "log loss" if all(loss > 0.0 for loss in losses) else "loss"  # as in `ThompsonSampling`
    own = {cls.__name__: cls for cls in STRATEGIES.values()}.get(name)
    strategy = None if own is None else own.from_state_dict(state)
    best = [candidates[i] for i in sorted(ranking[: state["num_skip"] or 0])] if strategy is None else strategy.best()
    chosen = best if skipped is None else skipped
    has_costs = "costs" in state
    return Search(
        candidates,
        dict(zip(candidates, scores)),
        list(against_chosen(dict(zip(candidates, state["costs"])), chosen).values()) if has_costs else scores,
        _deviations(strategy) or state.get("deviations"),
        unit if has_costs else "score",
        ranking,
        rounds,
        training,
        chosen,
        skipped is not None,
        _boundaries(record.get("schedule")),
        strategy if isinstance(strategy, AttentionBandit) else None,
        strategy.expected_gain() if rounds and isinstance(strategy, ThompsonSampling) else None,
        SearchResult.of({**record, "strategy": name, "unit": unit}),
    )


def _deviations(strategy: Strategy | None) -> list[float] | None:
    """Standard deviations of the costs against the mean cost of the chosen: what they have in common cancels out."""
    if not isinstance(strategy, ThompsonSampling):
        return None
    return strategy.costs_against_chosen()[1]


def _round(number: int, record: dict[str, Any]) -> Round:
    step = number + 1 if record["step"] is None else record["step"]
    pairs = [(names, loss) for names, loss in zip(record["sets"], record["losses"]) if loss is not None]
    sets = [set(map(int, names.split() if isinstance(names, str) else names)) for names, _ in pairs]
    return Round(step, sets, [loss for _, loss in pairs])


def _boundaries(schedule: dict[str, Any] | None) -> dict[str, int]:
    if schedule is None:
        return {}
    return {"end of the warm-up": schedule["warmup_end"], "end of the search": schedule["search_end"]}


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        checkpoints = sorted(
            (folder for folder in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)),
            key=lambda folder: int(folder.name.rpartition("-")[2]),
        )
        options = [path / "eas_search.json", path / "trainer_state.json"]
        options += [checkpoint / "trainer_state.json" for checkpoint in reversed(checkpoints)]
        found = next((option for option in options if option.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{path} has no eas_search.json, trainer_state.json or checkpoint in it. Give the output_dir of a run "
                "with EASCallback, or one of its checkpoints."
            )
        path = found
    return json.loads(path.read_text(encoding="utf-8"))
