"""What the configurations of the algorithms check their fields with."""

from collections.abc import Sequence
from math import isfinite
from typing import get_type_hints

from vibe_store.errors import InvalidValueError

__all__ = ["check", "check_fraction", "check_int", "check_kinds", "check_positive", "checked_sizes"]


def check(name: str, value: object, holds: bool, wanted: str) -> None:
    """Raise InvalidValueError, which names the field, its value and what is wanted, unless ``holds``."""
    if not holds:
        raise InvalidValueError(f"{name}={value!r} cannot be used: it must be {wanted}.")


def check_kinds(config: object) -> None:
    """Refuse a field of a dataclass that is to be a bool or a float, by its annotation, and is none.

    What passes is Python's own, so that JSON holds it; a NumPy scalar is not cast in silence.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint is bool:
            check(name, value, isinstance(value, bool), "True or False")
        elif hint is float:
            check(name, value, _is_number(value), "a number, a float of Python")
        elif hint == float | None:
            check(name, value, value is None or _is_number(value), "a number, a float of Python, or None")


def check_int(name: str, value: object, *, least: int) -> None:
    """Refuse what is no whole number, or less than ``least``."""
    check(name, value, _is_int(value, least), f"a whole number, at least {least}")


def checked_sizes(name: str, value: object) -> tuple[int, ...]:
    """Return whole numbers of at least 1 as a tuple; refuse what is no sequence of those."""
    sizes = tuple(value) if isinstance(value, Sequence) else ()
    fine = isinstance(value, Sequence) and all(_is_int(size, 1) for size in sizes)
    check(name, value, fine, "a tuple of whole numbers, each at least 1")
    return sizes


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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
