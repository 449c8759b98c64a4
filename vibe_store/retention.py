"""Which checkpoints go: pure functions from records to steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo, RetentionPolicy

__all__ = ["BestFn", "best", "keep_period_steps", "latest", "steps_to_delete"]

BestFn = Callable[[Mapping[str, float]], float]
"""From the metrics of a checkpoint to the number that ranks it; a KeyError means that it has no rank."""


def latest(max_to_keep: int = 5) -> RetentionPolicy:
    """Return the policy that keeps the ``max_to_keep`` highest steps."""
    if isinstance(max_to_keep, bool) or not isinstance(max_to_keep, int) or max_to_keep < 1:
        raise InvalidValueError(
            f"max_to_keep is the number of recent checkpoints to keep, 1 or more; got {max_to_keep!r}."
        )

    def policy(checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        return frozenset(_steps(checkpoints)[:-max_to_keep])

    return policy


def best(
    checkpoints: Iterable[CheckpointInfo], best_fn: BestFn, best_mode: Literal["min", "max"]
) -> int | None:
    """Return the step whose metrics rank best, the earliest of equals; None where no checkpoint has a rank.

    A checkpoint without metrics, without the metric that ``best_fn`` looks up, or with NaN has no rank.
    """
    sign = 1 if best_mode == "max" else -1
    ranked = [
        (sign * score, -info.step)
        for info in checkpoints
        if info.step is not None and (score := rank(info, best_fn)) is not None
    ]
    return -max(ranked)[1] if ranked else None


def rank(info: CheckpointInfo, best_fn: BestFn) -> float | None:
    """Return the number by which a checkpoint ranks, or None where it has none."""
    if info.metrics is None:
        return None
    try:
        score = float(best_fn(info.metrics))
    except KeyError:
        return None
    return None if score != score else score


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
        InvalidValueError: the policy named such a step.
    """
    steps = _steps(checkpoints)
    given_up = frozenset(policy(sorted(checkpoints, key=lambda info: info.step or 0)))
    if unknown := given_up - frozenset(steps):
        raise InvalidValueError(
            f"The retention policy {policy!r} asks to delete the steps {sorted(unknown)}, "
            f"which are none of those it was shown ({steps}). Nothing was deleted."
        )
    pinned = {info.step for info in checkpoints if info.pinned}
    return given_up - frozenset(steps[-1:]) - pinned - frozenset(protected)


def _steps(checkpoints: Iterable[CheckpointInfo]) -> list[int]:
    return sorted(info.step for info in checkpoints if info.step is not None)
