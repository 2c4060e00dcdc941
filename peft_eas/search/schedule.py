"""When a search begins, ends and freezes the context: its settings, and the steps that they mean in a run."""

import math
from typing import Any, Literal, NamedTuple

from ..strategies import STRATEGIES, Strategy
from ..strategies.bandit import check_search_values
from ..values import is_int

# Without `interval`, the most steps from one round of rewards to the next. Three sets in 32 steps make a small model's
# steps 7 % longer (examples/benchmark/search_cost.py): a forward pass takes nearly half of one with a frozen base.
LONGEST_INTERVAL = 32

# Without `interval`, a search has at least so many rounds, and tries so many sets for each candidate, if it has the
# steps: on METER's tasks, 33 rounds in 200 steps found far better sets than 8 (examples/compare).
LEAST_ROUNDS, SETS_PER_CANDIDATE = 32, 4

# Training begins with nothing skipped; the sets grow, and are of full size after this share of the search.
GROWN_AT = 2 / 3

# search_steps="auto": the search ends by this share of the run, and earlier if the choice has been settled, with sets
# of full size in training, for so many rounds on end.
AUTO_END = 0.3
SETTLED_ROUNDS = 5

# What decides the course of a search, in `EASSearch` and in `EASCallback` alike.
SETTINGS = (
    "strategy",
    "reward",
    "search_steps",
    "warmup_steps",
    "interval",
    "num_candidates",
    "score_lr",
    "score_temperature",
    "freeze_context_at",
)

# What a message offers in place of settings with which a run is too short for the search, the smallest change first.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"search_steps": 0.5},
    {"search_steps": 0.5, "warmup_steps": 0.1},
    {"search_steps": 0.5, "warmup_steps": 0},
    {"search_steps": 0.5, "warmup_steps": 0, "freeze_context_at": "search_end"},
)

# Optimizer steps, a fraction of the run, the step at which the search ends, or never.
StrategyName = Literal["thompson", "bandit"]
FreezeAt = int | float | Literal["search_end"] | None


class Schedule(NamedTuple):
    """The optimizer steps at which rewards begin, the search ends, and the context is frozen (None: never).

    The share of the running mean grows from `first_share` at step `anneal_from` to 1 at the freeze.
    """

    warmup_end: int
    search_end: int
    freeze_step: int | None
    anneal_from: int = 0
    first_share: float = 0.0

    @classmethod
    def of(cls, settings: dict[str, Any], num_steps: int) -> "Schedule":
        """The schedule of a run of `num_steps`, of which a float among the settings is a fraction."""
        freeze_at = settings["search_steps" if settings["freeze_context_at"] == "search_end" else "freeze_context_at"]
        times = (settings["warmup_steps"], settings["search_steps"], freeze_at)
        warmup_end, search_end, freeze_step = (
            round(time * num_steps) if isinstance(time, float) else time for time in times
        )
        # Annealed from the start, where the freeze is no later than the warm-up's end.
        has_time = freeze_step is not None and warmup_end < freeze_step
        return cls(warmup_end, search_end, freeze_step, warmup_end if has_time else 0)

    def resumed(self, before: "Schedule", step: int) -> "Schedule":
        """This schedule of a run that got to `step` by the schedule `before`, maybe with another length or settings.

        What is over stays over, when it was; and the running mean's share goes on from where it was.
        """
        warmup_end = (before if before.warmup_end <= step else self).warmup_end
        search_end = (before if before.search_end <= step else self).search_end
        is_frozen = before.freeze_step is not None and before.freeze_step <= step
        freeze_step = (before if is_frozen else self).freeze_step
        share = before.running_share(step)
        if freeze_step == before.freeze_step and (share > 0.0 or warmup_end == before.warmup_end):
            anneal_from, first_share = before.anneal_from, before.first_share
        else:
            anneal_from, first_share = (step, share) if share > 0.0 else (max(step, self.anneal_from), 0.0)
        return Schedule(warmup_end, search_end, freeze_step, anneal_from, first_share)

    def running_share(self, step: int) -> float:
        """How much of the context is the running mean when `step` steps are done."""
        if self.freeze_step is None:
            return 0.0
        done = min(1.0, max(0, step - self.anneal_from) / max(1, self.freeze_step - self.anneal_from))
        return self.first_share + (1.0 - self.first_share) * done

    def growth(self, step: int) -> float:
        """Size of the sets to train with when `step` steps are done, as a share of the full size."""
        return min(1.0, (step + 1) / max(1.0, GROWN_AT * self.search_end))

    def num_rounds(self, interval: int) -> int:
        """Number of rounds of rewards, of which there is one every `interval` steps."""
        return max(0, self.search_end - self.warmup_end) // interval

    def has_room(self, interval: int, num_steps: int, rounds: int) -> bool:
        """Whether a run has `rounds` rounds, steps left to train what they find, and no freeze before these."""
        freeze_step = self.search_end if self.freeze_step is None else self.freeze_step
        is_in_order = self.search_end < num_steps and self.search_end <= freeze_step <= num_steps
        return is_in_order and self.num_rounds(interval) >= rounds

    def check(self, settings: dict[str, Any], num_steps: int, interval: int, rounds: int | None) -> None:
        """Raises a ValueError where the freeze is beyond the run, or a search has no room for rewards or goes on
        beyond the freeze. `rounds` are what the search should have, None where there is none."""
        has_search = rounds is not None
        search_steps = settings["search_steps"]
        if has_search and not self.warmup_end + interval <= self.search_end <= num_steps:
            raise ValueError(
                f"A search that ends at step {self.search_end} (search_steps={search_steps}) with rewards every "
                f"{interval} steps (interval) from step {self.warmup_end} on (warmup_steps="
                f"{settings['warmup_steps']}) does not fit into a run of {num_steps} steps, or has no rewards. "
                + what_fits(settings, num_steps, rounds)
            )
        freeze_at = f"freeze_context_at={settings['freeze_context_at']!r}"
        if self.freeze_step is not None and self.freeze_step > num_steps:
            earlier = "freeze_context_at='search_end'" if self.search_end <= num_steps else "freeze_context_at=0.5"
            if settings["freeze_context_at"] == "search_end":
                earlier = "search_steps=0.3"
            raise ValueError(
                f"{freeze_at} is step {self.freeze_step} (search_steps={search_steps}), beyond a run of {num_steps} "
                f"steps. Set {earlier}, or freeze never (freeze_context_at=None)."
            )
        if has_search and self.freeze_step is not None and self.freeze_step < self.search_end:
            raise ValueError(
                f"{freeze_at} is step {self.freeze_step}, before the search is "
                f"over at step {self.search_end} (search_steps={search_steps}). Freeze later, such as with "
                "freeze_context_at='search_end', or search for less."
            )


def default_interval(schedule: Schedule, rounds: int) -> int:
    """Steps between rounds of rewards, of which `rounds` make a set for each candidate."""
    length = schedule.search_end - schedule.warmup_end
    return max(1, min(LONGEST_INTERVAL, length // max(LEAST_ROUNDS, SETS_PER_CANDIDATE * rounds)))


def what_fits(settings: dict[str, Any], num_steps: int, rounds: int) -> str:
    """A sentence that names what to change for a search of `rounds` rounds, after which steps are left to train what
    it finds: settings, the length of the run, or both. Where the run is too short for so many, settings for one."""
    change = _fitting(settings, num_steps, rounds) or _fitting(settings, num_steps, 1)
    num_longer = _fitting_steps(settings, rounds)
    ways = [f"set {_as_arguments(change)}"] if change else []
    if num_longer is not None and num_longer > num_steps:
        ways.append(f"train for {num_longer} steps")
    if not ways:
        freeze_at = None if settings["freeze_context_at"] is None else "search_end"
        change = {"search_steps": 0.3, "warmup_steps": 0.1, "freeze_context_at": freeze_at}
        num_longer = _fitting_steps({**settings, **change}, rounds)
        ways = [f"train for {num_longer} steps with {_as_arguments(change)}"]
    text = ", or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def _as_arguments(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _fitting(settings: dict[str, Any], num_steps: int, rounds: int) -> dict[str, Any] | None:
    """What to change of the settings so that a run of `num_steps` has room for `rounds` rounds."""
    for change in _CHANGES:
        if settings["freeze_context_at"] is None:
            change = {name: value for name, value in change.items() if name != "freeze_context_at"}
        schedule = Schedule.of({**settings, **change}, num_steps)
        longest = max(0, schedule.search_end - schedule.warmup_end) // rounds
        interval = min(settings["interval"] or longest, longest)
        if interval >= 1 and schedule.has_room(interval, num_steps, rounds):
            if settings["interval"] is not None:
                change = {**change, "interval": interval}
            return {name: value for name, value in change.items() if value != settings[name]}
    return None


def _fitting_steps(settings: dict[str, Any], rounds: int) -> int | None:
    """Length of a run that has room for `rounds` rounds with the settings as they are, if there is any."""
    times = settings["search_steps"], settings["warmup_steps"]
    (search_share, search_steps), (warmup_share, warmup_steps) = (
        (time, 0) if isinstance(time, float) else (0.0, time) for time in times
    )
    freeze_at, interval = settings["freeze_context_at"], settings["interval"] or 1
    num_steps = max(search_steps + 1, freeze_at if is_int(freeze_at) else 1)
    if search_share > warmup_share:  # one step more than is missing, because both ends are rounded
        missing = rounds * interval + 1 + warmup_steps - search_steps
        num_steps = max(num_steps, math.ceil(round(missing / (search_share - warmup_share), 6)))
    return num_steps if Schedule.of(settings, num_steps).has_room(interval, num_steps, rounds) else None


def check_settings(
    caller: str,
    strategy: Any,
    reward: str,
    search_steps: Any,
    warmup_steps: Any,
    interval: Any,
    num_candidates: Any,
    score_lr: Any,
    score_temperature: Any,
    freeze_context_at: Any,
) -> None:
    """Raises a ValueError for a setting of `caller` that is out of range whatever the run."""
    is_own = isinstance(strategy, type) and issubclass(strategy, Strategy)
    if not is_own and not (isinstance(strategy, str) and strategy in STRATEGIES):
        raise ValueError(
            f"{caller}(strategy={strategy!r}): strategy must be {' or '.join(map(repr, STRATEGIES))}, or a subclass "
            "of peft_eas.Strategy."
        )
    check_search_values(score_temperature, score_lr, reward)
    if search_steps != "auto":
        _check_steps(caller, "search_steps", search_steps, others=', or "auto"')
    _check_steps(caller, "warmup_steps", warmup_steps)
    if freeze_context_at not in (None, "search_end"):
        _check_steps(caller, "freeze_context_at", freeze_context_at, others=', or "search_end", or None')
    for name, value, least in (("interval", interval, 1), ("num_candidates", num_candidates, 2)):
        if not is_int(value, least) and not (name == "interval" and value is None):
            raise ValueError(f"{caller}({name}={value!r}): {name} must be an integer of at least {least}.")


def _check_steps(caller: str, name: str, value: Any, others: str = "") -> None:
    least = 0 if name == "warmup_steps" else 1
    is_steps = is_int(value, least)
    is_fraction = isinstance(value, float) and (0.0 < value <= 1.0 or value == least == 0)
    if not (is_steps or is_fraction):
        raise ValueError(
            f"{caller}({name}={value!r}): {name} must be an integer of at least {least} (optimizer steps) or a "
            f"float {'from 0.0' if least == 0 else 'above 0.0'} to 1.0 (fraction of the run){others}."
        )
