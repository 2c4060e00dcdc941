"""What a search is to find, and the strategy that finds it: from the config, the settings, or a saved state."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..config import EASConfig
from ..skippable import Skippable
from ..strategies import STRATEGIES, AttentionBandit, Strategy, ThompsonSampling, restored
from ..strategies.goal import Goal
from .savings import Savings, count_kv_bytes, measure_time

# Predicted speed-ups were within 1.5 % of those measured after a merge, on six families.
SAFETY = 1.02


def goal_of(config: EASConfig, measure: Callable[[], Savings]) -> Goal | None:
    """What decides how many are skipped, where `num_skip` does not. `measure` is called where savings decide.

    Raises:
        ValueError: for a target that skipping all candidates does not reach.
    """
    if config.budget is None:
        return None
    name, value = config.budget
    if name == "max_loss_increase":
        return Goal("cost", math.log1p(value))
    savings = measure()
    if name == "target_speedup":  # of which the parts' times tell to a few percent
        value = max(value, min(value * SAFETY, savings.speedup(savings.saved)))
    amount = savings.for_speedup(value) if name == "target_speedup" else savings.for_share(value)
    return Goal("saving", amount, tuple(savings.saved.values()))


def savings_of(config: EASConfig, model: nn.Module, batch: Mapping[str, Any], **shapes: int) -> Savings:
    """What the config's target is about, time or bytes of KV cache, as `measure_time` or `count_kv_bytes` tell it."""
    measure = count_kv_bytes if config.target_speedup is None else measure_time
    return measure(model, batch, **shapes)


def savings_of_batches(config: EASConfig, model: nn.Module, batches: Sequence[Any] | None) -> Savings:
    """The same at the shapes of the first batch.

    Raises:
        ValueError: where there is none of the model's arguments.
    """
    batch = batches[0] if batches else None
    name, value = config.budget
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"EASConfig({name}={value:g}) asks for savings, which are measured on a batch, but batches= has no "
            "dictionaries of the model's arguments. Pass EASSearch(savings=measure_time(model, batch)) or "
            "count_kv_bytes(model, batch)."
        )
    return savings_of(config, model, batch)


def new_strategy(
    settings: dict[str, Any], candidates: Sequence[str], num_skip: int | None, goal: Goal | None, seed: int
) -> Strategy:
    """The strategy that the settings name.

    Raises:
        ValueError: for a goal, of which only Thompson sampling knows.
    """
    strategy = STRATEGIES.get(settings["strategy"], settings["strategy"])
    if goal is not None:
        if not issubclass(strategy, ThompsonSampling):
            raise ValueError(
                f"strategy={settings['strategy']!r} searches sets of num_skip attentions, and cannot decide how many. "
                "Set EASConfig(num_skip=...), or strategy='thompson'."
            )
        return strategy(candidates, seed=seed, goal=goal)
    if strategy is AttentionBandit:
        names = {"temperature": "score_temperature", "lr": "score_lr", "reward": "reward"}
        return AttentionBandit(candidates, num_skip, seed=seed, **{own: settings[name] for own, name in names.items()})
    return strategy(candidates, num_skip, seed=seed)


def resumed_strategy(
    present: Strategy | None, state: dict[str, Any], eas: Skippable, fixed: list[str] | None
) -> Strategy | None:
    """The strategy of a search's state, whichever this search was made with, unless that is the user's own.

    Args:
        present: what this search was made with, if there is anything to search. fixed: what is skipped for good.

    Returns:
        None where the state has none, and none is needed.

    Raises:
        ValueError: if the state is of no search, of one that goes on where this one is over, for other candidates, or
            for another number of them.
    """
    saved = state["strategy"] if "strategy" in state else state["bandit"]  # as earlier versions call it
    is_searching = present is not None and fixed is None
    if saved is None:
        if is_searching:
            raise ValueError(
                f"The checkpoint of step {state['step']} holds no search to resume: it was written without "
                "EASCallback or EASSearch. Start the run anew, or name the MHAs to skip in "
                "EASConfig(skipped_modules=...)."
            )
        return None
    if state["skipped_modules"] is None and not is_searching:
        raise ValueError(
            f"The checkpoint is from the middle of a search, but this model's skip set is fixed already ({fixed}), so "
            "the adapters to search with are gone. Make the model by get_peft_model with num_skip, as for the first "
            "run, and resume with that."
        )
    budget = eas.active_config.budget
    if is_searching and "budget" in state and tuple(state["budget"] or ()) != (budget or ()):
        before, now = ("num_skip" if one is None else "{}={:g}".format(*one) for one in (state["budget"], budget))
        raise ValueError(
            f"The saved search decides by {before} how many are skipped, but this model's EASConfig by {now}. Resume "
            "with the EASConfig that the search was started with, or start anew."
        )
    if present is None or type(present) in STRATEGIES.values():
        strategy = restored(saved)
    else:
        strategy = present
        strategy.load_state_dict(saved)
    num_skip = eas.active_config.num_skip
    if num_skip is None and fixed is not None:  # made with the MHAs that the search has found
        num_skip = len(fixed)
    is_other_number = None not in (strategy.num_skip, num_skip) and strategy.num_skip != num_skip
    if strategy.candidates != list(eas.candidates) or is_other_number:
        raise ValueError(
            f"The saved search is for {strategy.num_skip} of {len(strategy.candidates)} candidates "
            f"({', '.join(strategy.candidates)}), but this model asks for {num_skip} of {len(eas.candidates)} "
            f"({', '.join(eas.candidates)}). Resume with the model and EASConfig that the search was started with, or "
            "start anew."
        )
    return strategy
