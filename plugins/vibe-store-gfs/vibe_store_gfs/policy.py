"""Grandfather-father-son retention: the last hours, days, weeks, months and years, one checkpoint of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo

__all__ = ["GrandfatherFatherSon"]

_PERIODS: Mapping[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda time: (time.year, time.month, time.day, time.hour),
    "daily": lambda time: (time.year, time.month, time.day),
    "weekly": lambda time: time.isocalendar()[:2],
    "monthly": lambda time: (time.year, time.month),
    "yearly": lambda time: (time.year,),
}
"""By option, the period that a time lies in; a later period is a greater tuple."""


@dataclass(frozen=True, slots=True)
class GrandfatherFatherSon:
    """Keeps the newest checkpoint of each of the last hours, days, weeks, months and years that have one.

    ``hourly=24`` keeps 24 checkpoints: of the 24 latest hours in which any was committed, the newest of each.
    Hours in which nothing was committed do not count, so that a run that was paused for a week keeps what it
    has. A checkpoint stays if it is kept by any of the options; one may be kept by several.

    Hours, days, months and years are those of the calendar in UTC, and weeks those of ISO 8601, from Monday
    on; none of them begins at a checkpoint. The newest is the one committed last, by the time in its
    manifest, and of equals the one with the highest step.

    What is kept does not depend on what was given up before: pruned after every save, the same checkpoints
    stay as pruned once at the end. (What a manager protects, the highest step say, stays besides.)

    Args:
        hourly: how many hours; 0 for none, as for each of the others.
        daily: how many days.
        weekly: how many weeks.
        monthly: how many months.
        yearly: how many years.

    Raises:
        InvalidValueError: one is no whole number of 0 or more, or all are 0, so that nothing would be kept.
    """

    hourly: int = 24
    daily: int = 7
    weekly: int = 4
    monthly: int = 12
    yearly: int = 0

    def __post_init__(self) -> None:
        for name, count in self._counts().items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise InvalidValueError(f"{name} is a whole number, 0 or more; got {count!r}.")
        if not any(self._counts().values()):
            raise InvalidValueError(
                f"With {', '.join(f'{name}=0' for name in _PERIODS)} nothing would be kept; set one of them."
            )

    def __call__(self, checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        """Return the steps to delete."""
        times = {info.step: info.created.astimezone(UTC) for info in checkpoints if info.step is not None}
        oldest_first = sorted(times, key=lambda step: (times[step], step))
        kept: set[int] = set()
        for name, count in self._counts().items():
            newest = {_PERIODS[name](times[step]): step for step in oldest_first}
            kept.update(newest[period] for period in sorted(newest, reverse=True)[:count])
        return frozenset(times) - kept

    def _counts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
