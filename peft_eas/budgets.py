"""What can decide how many MHAs are skipped, in place of `EASConfig(num_skip=...)`."""

import math
import warnings
from collections.abc import Callable
from typing import Any

from .values import is_finite

# By name, between which numbers each lies.
BUDGETS = {"max_loss_increase": (0.0, math.inf), "target_speedup": (1.0, math.inf), "target_kv_cache": (0.0, 1.0)}


def check_budgets(config: Any, require: Callable[[str, bool, str], None]) -> None:
    """Checks an `EASConfig`'s budgets, by `require(name, is_allowed, what_is_allowed)`.

    Raises:
        ValueError: for one out of range; for two, or one beside `num_skip`.
    """
    for name, (low, high) in BUDGETS.items():
        value = getattr(config, name)
        share = "" if high == math.inf else f" and below {high:g}, as a share (2 % is 0.02)"
        is_allowed = value is None or (is_finite(value) and low < value < high)
        require(name, is_allowed, f"a number above {low:g}{share}, or None")
    increase = config.max_loss_increase
    if increase is not None and increase >= 1.0:
        warnings.warn(
            f"EASConfig(max_loss_increase={increase:g}) lets the loss rise by {increase:.0%}. If that is not meant: "
            "2 % is 0.02.",
            stacklevel=5,
        )
    given = [name for name in ("num_skip", *BUDGETS) if getattr(config, name) is not None]
    if len(given) > 1 and config.skipped_modules is None:
        texts = (f"{name}={getattr(config, name)!r}" for name in given)
        raise ValueError(f"EASConfig({', '.join(texts)}): how many MHAs are to be skipped takes one of these.")
