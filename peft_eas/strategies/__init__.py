"""How a search chooses: plain numbers, no tensors of a model."""

from typing import Any

from .bandit import AttentionBandit
from .strategy import Strategy
from .thompson import ThompsonSampling

# By the names that `EASSearch(strategy=...)` takes.
STRATEGIES: dict[str, type[Strategy]] = {"thompson": ThompsonSampling, "bandit": AttentionBandit}


def restored(state: dict[str, Any]) -> Strategy:
    """The strategy in the given state of `state_dict`.

    Raises:
        ValueError: for the state of a strategy that is not the library's own.
    """
    name = state.get("strategy", "AttentionBandit")  # which earlier versions' states do not name
    own = {strategy.__name__: strategy for strategy in STRATEGIES.values()}
    if name not in own:
        raise ValueError(f"The search was made by {name}, which is not one of {', '.join(own)}.")
    return own[name].from_state_dict(state)
