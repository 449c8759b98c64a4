"""Options that stand behind the name of a provider, as text: ``gfs:hourly=24,daily=7``.

They are read by the types in the signature of what the name stands for, so that whoever writes a provider
writes nothing more than a function with annotations. Only the standard library is needed.
"""

import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from vibe_store.discovery import listed
from vibe_store.errors import InvalidValueError

__all__ = ["Given", "Option", "options_of", "read_options", "split_options"]

Given: TypeAlias = Mapping[str, str]
"""Options as they were written: text by name."""

_READABLE = (bool, int, float, str)
_NONE = type(None)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a provider.

    Attributes:
        name: its name; with two stars where it stands for keywords of any name.
        type: its annotation, as Python writes it; empty where it has none.
        default: its value where it is not given; None where it has none.
        required: whether it must be given.
    """

    name: str
    type: str
    default: object
    required: bool


def split_options(text: str) -> tuple[str, Given]:
    """Take ``name:key=value,key=value`` apart, or a name alone.

    Options are separated by commas, so that no value can hold one.

    Raises:
        InvalidValueError: what follows the name is not of this form, or gives an option twice.
    """
    name, colon, rest = text.partition(":")
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not key:
            raise InvalidValueError(
                f"{text!r} cannot be read: {part.strip()!r} is no 'option=value'. Write a name alone, or "
                "with options as 'name:option=value,option=value'."
            )
        if key in given:
            raise InvalidValueError(f"{text!r} gives the option {key!r} twice.")
        given[key] = value
    return name.strip(), given


def options_of(signature: inspect.Signature, *, after: int = 0) -> tuple[Option, ...]:
    """Return the options that a signature has, leaving out its first ``after`` parameters."""
    return tuple(
        Option(
            f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name,
            "" if parameter.annotation is parameter.empty else inspect.formatannotation(parameter.annotation),
            None if parameter.default is parameter.empty else parameter.default,
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD,
        )
        for parameter in list(signature.parameters.values())[after:]
        if parameter.kind in (*_NAMED, parameter.VAR_KEYWORD)
    )


def read_options(what: str, given: Given, signature: inspect.Signature) -> dict[str, Any]:
    """Read options by the annotations of a signature: bool, int, float, str, None, and literals of these.

    ``true`` and ``false`` are read as bool, and ``none`` as None, in any case of letters, where the option
    may be one. Of several types, the first of None, bool, int, float, literal and str that fits is taken.

    Args:
        what: what takes the options, for a sentence: ``"retention policy 'gfs'"``.
        given: text by name.
        signature: the signature, its annotations evaluated.

    Raises:
        InvalidValueError: an option is none of the signature's, its text cannot be read as its type, or no
            text could be.
    """
    parameters = {name: each for name, each in signature.parameters.items() if each.kind in _NAMED}
    for key in given:
        if key not in parameters:
            close = difflib.get_close_matches(key, parameters, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            takes = listed(list(parameters)) if parameters else "no options"
            raise InvalidValueError(f"The {what} takes {takes}; {key!r} is none of them.{hint}")
    return {key: _read(what, parameters[key], text) for key, text in given.items()}


def _read(what: str, parameter: inspect.Parameter, text: str) -> Any:
    choices = _choices(parameter.annotation)
    if not choices:
        raise InvalidValueError(
            f"The option {parameter.name!r} of the {what} cannot be given as text, as it takes no bool, int, "
            "float or str. Make the object in Python, and pass that instead of its name."
        )
    for read in (_none, _truth, _integer, _number, _literal, _text):
        found = read(text, choices)
        if found:
            return found[0]
    raise InvalidValueError(
        f"The option {parameter.name!r} of the {what} is {listed([_shown(each) for each in choices], 'or')}; "
        f"got {text!r}."
    )


_Found: TypeAlias = tuple[object, ...]
"""The value that a text was read as, alone; nothing where it is none of this type."""


def _choices(annotation: Any) -> list[Any]:
    """Return the types that text can be read as, and the values of literals, that an annotation allows."""
    if annotation is None:
        return [_NONE]
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for each in get_args(annotation) for choice in _choices(each)]
    if get_origin(annotation) is Literal:
        return [_NONE if value is None else value for value in get_args(annotation)]
    return [annotation] if annotation in (*_READABLE, _NONE) else []


def _none(text: str, choices: Sequence[Any]) -> _Found:
    return (None,) if _NONE in choices and text.lower() == "none" else ()


def _truth(text: str, choices: Sequence[Any]) -> _Found:
    return (_TRUTH[text.lower()],) if bool in choices and text.lower() in _TRUTH else ()


def _integer(text: str, choices: Sequence[Any]) -> _Found:
    try:
        return (int(text),) if int in choices else ()
    except ValueError:
        return ()


def _number(text: str, choices: Sequence[Any]) -> _Found:
    try:
        return (float(text),) if float in choices else ()
    except ValueError:
        return ()


def _literal(text: str, choices: Sequence[Any]) -> _Found:
    return tuple(value for value in choices if not isinstance(value, type) and str(value) == text)[:1]


def _text(text: str, choices: Sequence[Any]) -> _Found:
    return (text,) if str in choices else ()


def _shown(choice: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", _NONE: "none"}
    return names[choice] if isinstance(choice, type) else repr(choice)
