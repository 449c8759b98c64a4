"""Which checkpoints go: pure functions from records to steps.

A policy is any function from records, sorted by step, to the steps to delete. Those made here compose::

    keep_any(latest(3), every_steps(10_000), best_n(2, "eval_return", mode="max"))

What each of them keeps does not depend on what it gave up before: pruned after every save, in whatever order
the steps are saved, the same steps stay as pruned once at the end, and :func:`keep_any` of such policies is
such a policy again. It does not hold across a change of the records themselves (a step that is replaced has
other metrics and another time), nor for every policy that one can write: "every second one of those that are
left" halves what it kept each time it is asked.

What a manager protects (the highest step, pinned steps and so on) stays whatever its policy says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from operator import index
from typing import Any, Literal

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo, RetentionPolicy

__all__ = [
    "BestFn",
    "best",
    "best_n",
    "every_seconds",
    "every_steps",
    "keep_any",
    "keep_period_steps",
    "latest",
    "steps_to_delete",
]

BestFn = Callable[[Mapping[str, float]], float]
"""From the metrics of a checkpoint to the number that ranks it; a KeyError means that it has no rank."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def latest(max_to_keep: int = 5) -> RetentionPolicy:
    """Return the policy that keeps the ``max_to_keep`` highest steps.

    Raises:
        InvalidValueError: ``max_to_keep`` is no whole number of 1 or more.
    """
    count = _positive("max_to_keep", "the number of recent checkpoints to keep", max_to_keep)
    return _Keep(f"latest({count})", lambda infos: _steps(infos)[-count:])


def every_steps(interval: int) -> RetentionPolicy:
    """Return the policy that keeps the steps that are multiples of ``interval`` (0 is one).

    A run that saves beside the multiples, at 9,999 and 19,999 say, keeps none of them by this policy.

    Raises:
        InvalidValueError: ``interval`` is no whole number of 1 or more.
    """
    period = _positive("interval", "the number of steps from one kept checkpoint to the next", interval)
    return _Keep(f"every_steps({period})", lambda infos: keep_period_steps(_steps(infos), period))


def every_seconds(interval: float) -> RetentionPolicy:
    """Return the policy that keeps one checkpoint of every ``interval`` seconds: the one committed first.

    Time is cut into intervals that begin at 1970-01-01 00:00 UTC, so 3600 keeps the first checkpoint of each
    hour on the clock. Intervals that began at a checkpoint instead would all move when that one is deleted,
    replaced or stamped by a clock that is wrong. Two neighbours that are kept may therefore be less than
    ``interval`` apart, one late in its interval and one early in the next.

    Raises:
        InvalidValueError: ``interval`` is no number of 1 or more, or more than a ``timedelta`` can hold.
    """
    length = _seconds(interval)

    def keep(infos: Sequence[CheckpointInfo]) -> Iterable[int]:
        first: dict[int, tuple[datetime, int]] = {}
        for info in infos:
            if info.step is not None:
                nth, candidate = (info.created - _EPOCH) // length, (info.created, info.step)
                first[nth] = min(candidate, first.get(nth, candidate))
        return [step for _, step in first.values()]

    return _Keep(f"every_seconds({interval!r})", keep)


def best_n(n: int, metric: str | BestFn, *, mode: Literal["min", "max"]) -> RetentionPolicy:
    """Return the policy that keeps the ``n`` best checkpoints, the earliest of equals.

    A checkpoint without metrics, without this metric, or with NaN has no rank, and is never among the best.

    A manager's ``best_fn`` is independent of this: what it ranks best is protected besides. Where both
    rank alike that one is among the ``n``; where they differ it is kept in addition, and ``best_step()`` goes
    by ``best_fn`` alone.

    Args:
        n: how many to keep.
        metric: the name of a metric that ``save`` was given, or a function of all of its metrics.
        mode: whether the lowest ("min") or the highest ("max") is best.

    Raises:
        InvalidValueError: an argument has a value that cannot be used.
    """
    count = _positive("n", "the number of best checkpoints to keep", n)
    best_fn, text = _best_fn(metric)
    _check_mode(mode)
    return _Keep(
        f"best_n({count}, {text}, mode={mode!r})", lambda infos: _ranked(infos, best_fn, mode)[:count]
    )


def keep_any(*policies: RetentionPolicy) -> RetentionPolicy:
    """Return the policy that keeps what any of ``policies`` keeps: it deletes only what all of them delete.

    Raises:
        InvalidValueError: there are none, or one cannot be called; when the policy is used, one of them names
            steps that it was not shown.
    """
    if not policies:
        raise InvalidValueError("keep_any() needs one policy or more: with none, nothing would be kept.")
    for policy in policies:
        if not callable(policy):
            raise InvalidValueError(
                f"keep_any() takes retention policies, such as latest(3), and {policy!r} is none."
            )

    def keep(infos: Sequence[CheckpointInfo]) -> Iterable[int]:
        return frozenset(_steps(infos)).difference(
            frozenset.intersection(*(_given_up(policy, infos) for policy in policies))
        )

    return _Keep(f"keep_any({', '.join(map(repr, policies))})", keep)


def best(
    checkpoints: Iterable[CheckpointInfo], best_fn: BestFn, best_mode: Literal["min", "max"]
) -> int | None:
    """Return the step whose metrics rank best, the earliest of equals; None where no checkpoint has a rank.

    A checkpoint without metrics, without the metric that ``best_fn`` looks up, or with NaN has no rank.
    """
    return next(iter(_ranked(checkpoints, best_fn, best_mode)), None)


def keep_period_steps(steps: Iterable[int], keep_period: int | None) -> frozenset[int]:
    """Return the steps that are multiples of ``keep_period`` (0 is one)."""
    return frozenset() if keep_period is None else frozenset(s for s in steps if s % keep_period == 0)


def steps_to_delete(
    checkpoints: Sequence[CheckpointInfo], policy: RetentionPolicy, *, protected: Iterable[int | None]
) -> frozenset[int]:
    """Return what ``policy`` gives up, less what is protected whatever a policy says.

    Protected are ``protected``, the highest step and every pinned step. A step that a policy names and that
    is none of ``checkpoints`` is an error of the policy.

    Raises:
        InvalidValueError: the policy named such a step, returned no steps at all, or raised something.
    """
    shown = tuple(sorted(checkpoints, key=lambda info: info.step or 0))
    pinned = {info.step for info in shown if info.pinned}
    return _given_up(policy, shown) - frozenset(_steps(shown)[-1:]) - pinned - frozenset(protected)


@dataclass(frozen=True, slots=True, repr=False)
class _Keep:
    """The policy that deletes all but what ``keep`` returns; its repr is the call that makes it."""

    text: str
    keep: Callable[[Sequence[CheckpointInfo]], Iterable[int]]

    def __call__(self, checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        return frozenset(_steps(checkpoints)).difference(self.keep(checkpoints))

    def __repr__(self) -> str:
        return self.text


def _given_up(policy: RetentionPolicy, shown: Sequence[CheckpointInfo]) -> frozenset[int]:
    """Ask a policy, and check its answer."""
    try:
        answer: object = policy(shown)
    except Exception as error:
        raise InvalidValueError(
            f"The retention policy {policy!r} raised {type(error).__name__}: {error}. Nothing was deleted."
        ) from error
    if not isinstance(answer, Iterable):
        raise InvalidValueError(
            f"The retention policy {policy!r} returned {answer!r}; it has to return the steps to delete, "
            "as a frozenset. Nothing was deleted."
        )
    given_up, steps = frozenset(answer), _steps(shown)
    if unknown := given_up.difference(steps):
        raise InvalidValueError(
            f"The retention policy {policy!r} asks to delete the steps {sorted(unknown, key=repr)}, "
            f"which are none of those it was shown ({steps}). Nothing was deleted."
        )
    return given_up


def _steps(checkpoints: Iterable[CheckpointInfo]) -> list[int]:
    return sorted(info.step for info in checkpoints if info.step is not None)


def _ranked(checkpoints: Iterable[CheckpointInfo], best_fn: BestFn, mode: Literal["min", "max"]) -> list[int]:
    """Return the steps that have a rank, the best first, the earlier of equals before the later."""
    sign = 1 if mode == "min" else -1
    ranked = [
        (sign * score, info.step)
        for info in checkpoints
        if info.step is not None and (score := _rank(info, best_fn)) is not None
    ]
    return [step for _, step in sorted(ranked)]


def _rank(info: CheckpointInfo, best_fn: BestFn) -> float | None:
    """Return the number by which a checkpoint ranks, or None where it has none."""
    if info.metrics is None:
        return None
    try:
        score = float(best_fn(info.metrics))
    except KeyError:
        return None
    return None if score != score else score


def _best_fn(metric: str | BestFn) -> tuple[BestFn, str]:
    """Return the function that ranks, and how to write it in a repr."""
    if isinstance(metric, str) and metric:
        return lambda metrics: metrics[metric], repr(metric)
    if callable(metric):
        return metric, getattr(metric, "__qualname__", repr(metric))
    raise InvalidValueError(
        f"metric is the name of a metric or a function from all metrics to a number; got {metric!r}."
    )


def _check_mode(mode: object) -> None:
    if mode not in ("min", "max"):
        raise InvalidValueError(f'mode is "min" or "max", whichever is best; got {mode!r}.')


def _positive(name: str, meaning: str, value: Any) -> int:
    try:
        number = 0 if isinstance(value, bool) else index(value)
    except TypeError:  # which arrays raise that are no whole number
        number = 0
    if number < 1:
        raise InvalidValueError(f"{name} is {meaning}, a whole number, 1 or more; got {value!r}.")
    return number


def _seconds(value: object) -> timedelta:
    if not isinstance(value, bool) and isinstance(value, int | float) and value >= 1:
        try:
            return timedelta(seconds=value)
        except OverflowError:
            pass  # infinity, or more than a hundred million years
    raise InvalidValueError(
        "interval is the number of seconds from one kept checkpoint to the next, "
        f"1 or more and at most {timedelta.max.days} days; got {value!r}."
    )
