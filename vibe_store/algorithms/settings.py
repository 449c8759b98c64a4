"""What the configurations of the algorithms check their fields with."""

from math import isfinite

from vibe_store.errors import InvalidValueError

__all__ = ["check", "check_fraction", "check_int", "check_positive", "check_sizes"]


def check(name: str, value: object, holds: bool, wanted: str) -> None:
    """Raise InvalidValueError, which names the field, its value and what is wanted, unless ``holds``."""
    if not holds:
        raise InvalidValueError(f"{name}={value!r} cannot be used: it must be {wanted}.")


def check_int(name: str, value: object, *, least: int) -> None:
    """Refuse what is no whole number, or less than ``least``."""
    check(name, value, _is_int(value, least), f"a whole number, at least {least}")


def check_sizes(name: str, value: tuple[object, ...]) -> None:
    """Refuse a tuple that does not consist of whole numbers of at least 1."""
    check(name, value, all(_is_int(size, 1) for size in value), "whole numbers, each at least 1")


def check_positive(name: str, value: float | None, *, otherwise: str = "") -> None:
    """Refuse a number that is not above 0, or is infinite; with ``otherwise``, None is fine."""
    if value is None and otherwise:
        return
    is_number = isinstance(value, int | float) and isfinite(value) and value > 0
    check(name, value, is_number, f"a number above 0{otherwise}")


def check_fraction(name: str, value: float, *, above_zero: bool = False) -> None:
    """Refuse a number outside of 0 to 1."""
    if above_zero:
        check(name, value, 0 < value <= 1, "above 0 and at most 1")
    else:
        check(name, value, 0 <= value <= 1, "from 0 to 1")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
