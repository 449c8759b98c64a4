"""The lines of a metrics log: one JSON object each, from what a training loop measures and back."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vibe_store.errors import InvalidValueError

__all__ = ["encoded", "is_object", "is_past", "kept", "not_loggable", "parsed", "unboxed"]


def encoded(metrics: object) -> bytes:
    """Return one line, with its end.

    Raises:
        InvalidValueError: it is no mapping, or a value in it is none that can be logged; by key.
    """
    if not isinstance(metrics, Mapping):
        raise InvalidValueError(f"A line of metrics must be a mapping, not {_described(metrics)}.")
    return (json.dumps(_plain_mapping(metrics, ""), allow_nan=False) + "\n").encode("ascii")


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a line holds; None where it holds none, or not a whole one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def is_object(line: bytes) -> bool:
    """Whether a line, with or without its end, holds a whole JSON object."""
    return parsed(line) is not None


def is_past(line: bytes, step: int) -> bool:
    """Whether a line has a number as its ``"step"``, and that is past ``step``."""
    logged = (parsed(line) or {}).get("step")
    return isinstance(logged, int | float) and not isinstance(logged, bool) and logged > step


def kept(lines: Iterable[bytes], step: int) -> Iterator[bytes]:
    """Yield the lines that are not past ``step``, and not cut short; each ends."""
    for line in lines:
        if not line.endswith(b"\n"):
            # What a writer left when it was killed, unless only the line's end is missing.
            if is_object(line) and not is_past(line, step):
                yield line + b"\n"
        elif not is_past(line, step):
            yield line


def unboxed(value: Any, key: str) -> Any:
    """Return what a scalar of NumPy or JAX holds, and whatever else as it is; ``key`` is its place.

    Raises:
        InvalidValueError: it holds nothing yet.
    """
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception as error:
        raise InvalidValueError(
            f"The metric {key!r} is {_described(value)}, which has no value to log (was it traced "
            "by jax.jit?); log it outside of the traced function."
        ) from error


def not_loggable(value: Any, key: str, hint: str = "") -> InvalidValueError:
    """Return the error for a value that no log takes."""
    return InvalidValueError(
        f"The metric {key!r} is {_described(value)}, but only numbers, strings, booleans, None, and dicts "
        f"and lists of these can be logged{hint}."
    )


def _plain(value: Any, key: str) -> Any:
    """Turn a value into what JSON can hold; ``key`` is its place, for the message."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return _checked_int(value, key)
    if isinstance(value, float):
        return value if math.isfinite(value) else _NON_FINITE[str(float(value))]
    if isinstance(value, Mapping):
        return _plain_mapping(value, key)
    if isinstance(value, list | tuple):
        return [_plain(element, f"{key}[{index}]") for index, element in enumerate(value)]
    scalar = unboxed(value, key)
    if scalar is not value and (scalar is None or isinstance(scalar, bool | int | float | str)):
        return _plain(scalar, key)
    hint = "; call .tolist() on it first" if hasattr(value, "tolist") and hasattr(value, "shape") else ""
    raise not_loggable(value, key, hint)


def _checked_int(value: int, key: str) -> int:
    digits = sys.int_info.default_max_str_digits
    if not -(10**digits) < value < 10**digits:
        raise InvalidValueError(
            f"The metric {key!r} is a whole number of more than {digits} digits, which would not be read "
            "again; log it as a float or a string."
        )
    return value


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _plain_mapping(mapping: Mapping[Any, Any], key: str) -> dict[str, Any]:
    plain = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            place = f" in {key!r}" if key else ""
            raise InvalidValueError(f"The names of metrics must be strings, but one{place} is {name!r}.")
        plain[name] = _plain(value, f"{key}.{name}" if key else name)
    return plain


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = f"of type {type(value).__name__}"
    return f"{kind} (shape {shape}, dtype {dtype})" if shape is not None and dtype is not None else kind
