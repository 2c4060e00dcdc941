"""What the log says of a search before and after it: how much it will see, and whether that has told it anything."""

import logging
import math
from typing import Any

from ..reporting.search_result import increase_text, is_clear_decrease
from ..strategies import Strategy, ThompsonSampling
from .schedule import Schedule, what_fits

logger = logging.getLogger(__name__)


def sets_per_round(strategy: Strategy, num_candidates: int) -> int:
    """`num_candidates`, or all the sets that there are."""
    if strategy.num_skip is None:
        return num_candidates
    return min(num_candidates, math.comb(len(strategy.candidates), strategy.num_skip))


def wanted_rounds(strategy: Strategy, num_candidates: int) -> int:
    """The least number of rounds in which as many sets are compared as there are candidates to tell apart."""
    return math.ceil(len(strategy.candidates) / sets_per_round(strategy, num_candidates))


def tell_of_search(
    strategy: Strategy, schedule: Schedule, settings: dict[str, Any], num_steps: int, interval: int
) -> None:
    """Says how many rounds there will be; warns where they are few, or no step is left to train what they find."""
    wanted = wanted_rounds(strategy, settings["num_candidates"])
    rounds = schedule.num_rounds(interval)
    text = (
        f"EAS: the search for {'' if strategy.num_skip is None else f'{strategy.num_skip} of '}"
        f"{len(strategy.candidates)} candidates to skip has {rounds} "
        f"round{'s' if rounds > 1 else ''} of {sets_per_round(strategy, settings['num_candidates'])} sets."
    )
    if rounds >= wanted:
        logger.info(text)
    else:
        logger.warning(
            "%s That is few: with fewer sets than candidates, much of the choice is chance. %s",
            text,
            what_fits(settings, num_steps, wanted),
        )
    if schedule.search_end == num_steps:
        logger.warning(
            "EAS: the search ends with the last of %d steps (search_steps=%s), so that no step trains the adapters "
            "with what it finds. %s",
            num_steps,
            settings["search_steps"],
            what_fits(settings, num_steps, min(rounds, wanted)),
        )


def tell_of_no_search(num_candidates: int) -> None:
    """Warns that the config asks for nothing to be skipped."""
    logger.warning(
        "EAS: EASConfig has neither num_skip nor skipped_modules, so nothing is searched and nothing skipped. Set "
        "num_skip to how many of the %d candidates are to be skipped, such as num_skip=%d, or to 0 to train the "
        "adapters alone.",
        num_candidates,
        max(1, num_candidates // 3),
    )


def tell_of_choice(strategy: Strategy, num_skip: int, measured: list[dict[str, Any]], interval: int) -> None:
    """Says what the finished search was measured to cost; warns where it has not settled."""
    for point in measured:
        logger.info(
            "EAS: skipping %d of %d changes the loss on held-out batches by %s%s.",
            point["num_skip"],
            len(strategy.candidates),
            increase_text(point["increase"], "log loss", point["deviation"]),
            " (one batch alone)" if point["deviation"] is None else " (its standard error)",
        )
    has_limit = isinstance(strategy, ThompsonSampling) and strategy.goal.kind == "cost"
    if has_limit and not measured:
        logger.warning(
            "EAS: on held-out batches, no set could be held against nothing skipped, as losses are NaN, infinite or "
            "not positive; so nothing is skipped. Look at the reward data, or set num_skip."
        )
    own = next((point for point in measured if point["num_skip"] == num_skip), None)
    if has_limit and own is not None and is_clear_decrease(own["increase"], own["deviation"]):
        logger.warning(
            "EAS: with %d skipped, the loss on held-out batches is %s against nothing skipped. The model has learned "
            "less with nothing skipped, so max_loss_increase limits little, and maybe too many are skipped. Let the "
            "search end later, such as with search_steps=0.5, or set num_skip.",
            num_skip,
            increase_text(own["increase"], "log loss", own["deviation"]),
        )
    doubt = strategy.doubt()
    if doubt is not None:
        logger.warning(
            "EAS: after %d rounds %s Give the search more rounds (%sa higher search_steps or a longer run), or larger "
            "reward batches.",
            len(strategy.rounds),
            doubt,
            "a lower interval, " if interval > 1 else "",
        )
