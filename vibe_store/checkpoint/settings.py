"""How a manager is set: each argument checked, with a sentence for a person where it cannot be used."""

from collections.abc import Mapping
from typing import Literal

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import RetentionPolicy, Serializer
from vibe_store.registry import get_retention, get_serializer
from vibe_store.retention import BestFn, latest

__all__ = [
    "check_best_fn",
    "check_mode",
    "check_rank",
    "check_seconds",
    "check_timeout",
    "policy_of",
    "serializer_of",
]


def policy_of(retention: str | RetentionPolicy | None, max_to_keep: int) -> RetentionPolicy:
    """Return a retention policy by its name, itself, or as the highest ``max_to_keep``."""
    if retention is None:
        return latest(max_to_keep)
    if isinstance(retention, str):
        return get_retention(retention)
    if not callable(retention):
        raise InvalidValueError(
            f"retention is the name of a retention policy, or one, such as latest(5); got {retention!r}."
        )
    return retention


def check_mode(mode: str) -> Literal["min", "max"]:
    """Return whether the lowest or the highest is best, or raise."""
    if mode == "min":
        return "min"
    if mode == "max":
        return "max"
    raise InvalidValueError(f'best_mode is "min" or "max"; got {mode!r}.')


def check_best_fn(best_fn: BestFn | None) -> BestFn | None:
    """Return a function that ranks, or None, or raise."""
    if best_fn is not None and not callable(best_fn):
        raise InvalidValueError(
            "best_fn is a function from metrics to a number, such as lambda metrics: metrics['loss']; "
            f"got {best_fn!r}."
        )
    return best_fn


def serializer_of(serializer: str | Serializer) -> Serializer:
    """Return a serializer by its name, or itself, or raise."""
    if isinstance(serializer, str):
        return get_serializer(serializer)
    if not isinstance(serializer, Serializer):
        raise InvalidValueError(
            f'serializer is the name of a serializer, or one, "eqx" say; got {serializer!r}.'
        )
    return serializer


def check_timeout(seconds: float) -> float:
    """Return the seconds that a save may take, more than 0, or raise."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise InvalidValueError(
            f"async_timeout_secs is a number of seconds above 0, or None to save in the caller's thread; "
            f"got {seconds!r}."
        )
    return float(seconds)


def check_seconds(name: str, seconds: float) -> float:
    """Return a number of seconds of 0 or more, or raise."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise InvalidValueError(f"{name} is a number of seconds, 0 or more; got {seconds!r}.")
    return float(seconds)


def check_rank(best_fn: BestFn, metrics: Mapping[str, float]) -> None:
    """Raise where ``best_fn`` makes no number of these metrics; a metric that is missing is none."""
    try:
        rank = best_fn(metrics)
    except KeyError:
        return
    except Exception as error:
        raise InvalidValueError(
            f"best_fn raised {type(error).__name__} for the metrics {dict(metrics)}: {error}. It has to "
            "return a number; NaN, for a checkpoint that is never best."
        ) from error
    try:
        float(rank)
    except (TypeError, ValueError):
        raise InvalidValueError(
            f"best_fn returned {rank!r} for the metrics {dict(metrics)}; it has to return a number."
        ) from None
