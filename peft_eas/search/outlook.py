"""What the log says of a search before and after it: how much it will see, and whether that has told it anything."""

import logging
import math
from typing import Any

from ..strategies.bandit import AttentionBandit
from .schedule import Schedule, what_fits

logger = logging.getLogger(__name__)

# A search has told its candidates apart where the likeliest is drawn this many times as often as the unlikeliest. In
# simulated searches for 12 of 29 candidates one round of three sets leads to 1.2 times, ten to 2.5.
LEAST_RATIO = 1.25


def sets_per_round(bandit: AttentionBandit, num_candidates: int) -> int:
    """`num_candidates`, or all the sets that there are."""
    return min(num_candidates, math.comb(len(bandit.candidates), bandit.num_skip))


def wanted_rounds(bandit: AttentionBandit, num_candidates: int) -> int:
    """The least number of rounds in which as many sets are compared as there are candidates to tell apart."""
    return math.ceil(len(bandit.candidates) / sets_per_round(bandit, num_candidates))


def tell_of_search(bandit: AttentionBandit, schedule: Schedule, settings: dict[str, Any], num_steps: int) -> None:
    """Says how many rounds there will be; warns where they are few, or no step is left to train what they find."""
    rounds, wanted = schedule.num_rounds(settings["interval"]), wanted_rounds(bandit, settings["num_candidates"])
    text = (
        f"EAS: the search for {bandit.num_skip} of {len(bandit.candidates)} candidates to skip has {rounds} "
        f"round{'s' if rounds > 1 else ''} of {sets_per_round(bandit, settings['num_candidates'])} sets."
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


def tell_of_choice(bandit: AttentionBandit) -> None:
    """Warns where the finished search has not told its candidates apart."""
    p = bandit.probabilities()
    if max(p) >= LEAST_RATIO * min(p):
        return
    logger.warning(
        "EAS: after %d rounds the search has hardly told the %d candidates apart (entropy %.3f of at most %.3f), so "
        "that what is skipped is little better than drawn at random. Give it more rounds (a lower interval, a higher "
        "search_steps or a longer run)%s.",
        len(bandit.rounds),
        len(p),
        bandit.entropy(),
        math.log(len(p)),
        ", or reward='relative'" if bandit.reward == "exp" else "",
    )
