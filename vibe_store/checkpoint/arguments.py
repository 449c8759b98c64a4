"""What users pass to a save, checked before anything is written: sentences for people, by name and path."""

import functools
import json
import math
import operator
import sys
from collections.abc import Mapping
from typing import Any

from vibe_store.checkpoint.manifest import ITEM_NAME
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree

__all__ = ["STATE", "check_items", "check_json_object", "check_metrics", "check_positive"]

STATE = "state"
"""The item that holds the pytree which is passed to ``save`` itself."""

# Python reads no number of more digits, unless it is told to.
_TOO_LARGE: int = 10**sys.int_info.default_max_str_digits

_MAX_ITEM_NAME = 200
"""On disks a name has 255 bytes at most, and files add the id of an attempt and what tells their kind."""


def check_positive(name: str, value: Any) -> int:
    """Return a whole number of 1 or more, or raise."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # which arrays raise that are no whole number
        number = 0
    if number < 1:
        raise InvalidValueError(f"{name} is a whole number, 1 or more; got {value!r}.")
    return number


def check_items(state: PyTree, items: Mapping[str, PyTree] | None) -> dict[str, PyTree]:
    """Return all pytrees of one checkpoint by item name."""
    if items is not None and not isinstance(items, Mapping):
        raise InvalidValueError(f"items is a dict of pytrees by name; got {items!r}.")
    for name in items or {}:
        _check_item_name(name)
    return {STATE: state, **(items or {})}


@functools.lru_cache(maxsize=64)
def _check_item_name(name: object) -> None:
    if not isinstance(name, str) or not ITEM_NAME.fullmatch(name):
        raise InvalidValueError(
            f"The item name {name!r} cannot be used: it becomes a file name, "
            "so give letters, digits, '_' and '-', not beginning with '-'."
        )
    if len(name) > _MAX_ITEM_NAME:
        raise InvalidValueError(
            f"The item name {name[:20]!r}... has {len(name)} characters, and as it becomes part of file "
            f"names, {_MAX_ITEM_NAME} are the most. Choose a shorter one."
        )
    if name.lower() in {STATE, "manifest", "metadata", "best", "pinned"}:
        raise InvalidValueError(f"The item name {name!r} is taken; choose another.")


def check_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Return metrics as floats (NaN and infinity are numbers too), or raise by name."""
    if metrics is None:
        return None
    if not isinstance(metrics, Mapping):
        raise InvalidValueError(f"metrics is a dict of numbers by name; got {metrics!r}.")
    return {_text(name): _metric(name, value) for name, value in metrics.items()}


def check_json_object(name: str, value: object, *, indent: int | None = None) -> bytes:
    """Return a dict as the bytes of a JSON file, or raise by path."""
    if not isinstance(value, Mapping):
        raise InvalidValueError(f"{name} is a dict that JSON can hold; got {value!r}.")
    try:
        if not _is_json(value):
            _refuse_json(value, name)
        return _encoder(indent).encode(value).encode() + b"\n"
    except RecursionError:
        raise InvalidValueError(f"{name} contains itself, or is nested too deeply for JSON.") from None


@functools.cache
def _encoder(indent: int | None) -> json.JSONEncoder:
    return json.JSONEncoder(indent=indent, default=dict)


def _metric(name: object, value: Any) -> float:
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except OverflowError:
        raise InvalidValueError(
            f"The metric {name!r} is a number too large for a float. Pass a smaller one, or leave it out."
        ) from None
    except (TypeError, ValueError):
        raise InvalidValueError(
            f"The metric {name!r} is {value!r}, which is no number. Pass a float, or leave it out."
        ) from None


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise InvalidValueError(f"The name of a metric is text; got {name!r}.")
    return name


def _is_json(value: Any) -> bool:
    """Whether JSON can hold a value as it is; every save asks, so it builds no text on the way."""
    if value is None or isinstance(value, str):
        return True
    if isinstance(value, int):
        return -_TOO_LARGE < value < _TOO_LARGE
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return isinstance(value, (dict, Mapping)) and all(
        isinstance(key, str) and _is_json(inner) for key, inner in value.items()
    )


def _refuse_json(value: Any, path: str) -> None:
    """Raise for the first thing in a value that JSON cannot hold; do nothing where there is none."""
    if _is_json(value):
        return
    if isinstance(value, int):
        raise InvalidValueError(
            f"{path} is a whole number of more than {sys.int_info.default_max_str_digits} digits, which "
            "would not be read again. Leave it out or pass text."
        )
    if isinstance(value, float):
        raise InvalidValueError(f"{path} is {value}, which JSON cannot hold. Leave it out or pass text.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InvalidValueError(f"{path} has the key {key!r}; JSON takes only text as keys.")
            _refuse_json(inner, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _refuse_json(inner, f"{path}[{index}]")
    else:
        raise InvalidValueError(
            f"{path} is {value!r} of type {type(value).__name__}, which JSON cannot hold. "
            "Convert it to numbers, text, lists and dicts."
        )
