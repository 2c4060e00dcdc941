"""When a search begins, ends and freezes the context: its settings, and the steps that they mean in a run."""

from typing import Any, Literal, NamedTuple

from ..strategies.bandit import check_search_values
from ..values import is_int

# What decides the course of a search, in `EASSearch` and in `EASCallback` alike.
SETTINGS = (
    "reward",
    "search_steps",
    "warmup_steps",
    "interval",
    "num_candidates",
    "score_lr",
    "score_temperature",
    "freeze_context_at",
)


# Optimizer steps, a fraction of the run, the step at which the search ends, or never.
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

    def check(self, settings: dict[str, Any], num_steps: int, has_search: bool) -> None:
        """Raises a ValueError where the freeze is beyond the run, or a search has no room for rewards or goes on
        beyond the freeze."""
        interval, search_steps = settings["interval"], settings["search_steps"]
        if has_search and not self.warmup_end + interval <= self.search_end <= num_steps:
            raise ValueError(
                f"A search that ends at step {self.search_end} (search_steps={search_steps}) with rewards every "
                f"{interval} steps (interval) from step {self.warmup_end} on (warmup_steps="
                f"{settings['warmup_steps']}) does not fit into a run of {num_steps} steps, or has no rewards. Lower "
                "interval or warmup_steps, change search_steps, or train for longer."
            )
        freeze_at = f"freeze_context_at={settings['freeze_context_at']!r}"
        if self.freeze_step is not None and self.freeze_step > num_steps:
            raise ValueError(
                f"{freeze_at} is step {self.freeze_step} (search_steps={search_steps}), beyond a run of {num_steps} "
                "steps. Freeze earlier, or never (None)."
            )
        if has_search and self.freeze_step is not None and self.freeze_step < self.search_end:
            raise ValueError(
                f"{freeze_at} is step {self.freeze_step}, before the search is "
                f"over at step {self.search_end} (search_steps={search_steps}). Freeze later, or search for less."
            )


def check_settings(
    caller: str,
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
    check_search_values(score_temperature, score_lr, reward)
    _check_steps(caller, "search_steps", search_steps)
    _check_steps(caller, "warmup_steps", warmup_steps)
    if freeze_context_at not in (None, "search_end"):
        _check_steps(caller, "freeze_context_at", freeze_context_at, others=', or "search_end", or None')
    for name, value, least in (("interval", interval, 1), ("num_candidates", num_candidates, 2)):
        if not is_int(value, least):
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
