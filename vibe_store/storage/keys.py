"""What a key, a prefix, a byte range and a root URL may be: the checks that every storage shares."""

import re
import unicodedata

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError
from vibe_store.storage.redaction import without_credentials

__all__ = [
    "check_key",
    "check_keys",
    "check_prefix",
    "check_range",
    "check_url",
    "is_key",
]

_DRIVE = re.compile(r"[A-Za-z]:")
_COLLAPSED_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)?", re.DOTALL)


def check_key(key: str) -> str:
    """Return ``key`` if it is one: non-empty names joined by ``"/"``, none of them ``"."`` or ``".."``.

    Nor may it hold a backslash, a control character or a lone surrogate, begin like a Windows drive, or hold
    a name that begins with :data:`~vibe_store.durable_files.TEMPORARY_PREFIX`. How long a key may be is left
    to the storage.

    Raises:
        InvalidValueError: it is none; the message says why.
    """
    problem = _problem_of_key(key)
    if problem:
        raise InvalidValueError(f"The key {key!r} cannot be used: {problem}. Use names joined by '/'.")
    return key


def check_keys(keys: object) -> list[str]:
    """Return every key of an iterable, checked; one string is refused, as its characters would be the keys.

    Raises:
        InvalidValueError: it is a string, or one of the keys is none.
    """
    if isinstance(keys, str | bytes):
        raise InvalidValueError(
            f"keys must be a collection of keys, not one {type(keys).__name__}: {keys!r}."
        )
    return [check_key(key) for key in keys]  # type: ignore[attr-defined]  # raises TypeError where it is none


def is_key(key: str) -> bool:
    """Whether ``key`` is one; see :func:`check_key`."""
    return _problem_of_key(key) is None


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if some key can begin with it; ``""`` is the prefix of every key.

    Raises:
        InvalidValueError: no key can.
    """
    problem = None
    if not isinstance(prefix, str):
        problem = f"it is of type {type(prefix).__name__}, not str"
    elif prefix:
        *names, last = prefix.split("/")
        problem = _problem_of_text(prefix) or next(filter(None, map(_problem_of_name, names)), None)
        if problem is None and last.startswith(TEMPORARY_PREFIX):
            problem = f"names that begin with {TEMPORARY_PREFIX!r} are those of unfinished objects"
    if problem:
        raise InvalidValueError(f"The prefix {prefix!r} cannot be used: {problem}.")
    return prefix


def check_range(start: int, end: int | None) -> None:
    """Refuse a byte range that counts from the end; one that reaches past the end is fine.

    Raises:
        InvalidValueError: ``start`` or ``end`` is negative.
    """
    for name, value in (("start", start), ("end", end)):
        if value is not None and value < 0:
            raise InvalidValueError(
                f"{name} must be 0 or more (it counts from the first byte), but is {value}."
            )


def check_url(url: str) -> str:
    """Return ``url`` if it can be the root of a storage, be it a URL or a path.

    Raises:
        InvalidValueError: it is no text, it is empty, or it is a URL that went through ``pathlib``, which
            makes ``s3:/bucket`` of ``s3://bucket``.
    """
    if not isinstance(url, str):
        raise InvalidValueError(
            f"The root of a storage must be a str, but {url!r} is a {type(url).__name__}."
        )
    if not url.strip() or _problem_of_text(url.replace("\\", "/")):
        raise InvalidValueError(
            f"The root of a storage must be a path or a URL, but it is {without_credentials(url)!r}."
        )
    collapsed = _COLLAPSED_URL.fullmatch(url)
    if collapsed:
        shown, slash = without_credentials(url), "//" if collapsed["scheme"] == "file" else "/"
        whole = shown.replace(":/", f":/{slash}", 1)
        raise InvalidValueError(
            f"{shown!r} is a URL that lost a slash, as happens when a URL is made a pathlib.Path. "
            f"Pass it as a str: {whole!r}. (A folder of that name is './{shown}'.)"
        )
    return url


def _problem_of_key(key: str) -> str | None:
    if not isinstance(key, str):
        return f"it is of type {type(key).__name__}, not str"
    if not key:
        return "it is empty"
    return _problem_of_text(key) or next(filter(None, map(_problem_of_name, key.split("/"))), None)


def _problem_of_text(text: str) -> str | None:
    if "\\" in text:
        return "it holds a backslash"
    if _DRIVE.match(text):
        return "it begins like a Windows drive"
    if not text.isprintable() and any(unicodedata.category(character) in {"Cc", "Cs"} for character in text):
        return "it holds a control character or a lone surrogate"
    return None


def _problem_of_name(name: str) -> str | None:
    if not name:
        return "one of its names is empty"
    if name in {".", ".."}:
        return f"it holds the name {name!r}"
    if name.startswith(TEMPORARY_PREFIX):
        return f"names that begin with {TEMPORARY_PREFIX!r} are those of unfinished objects"
    return None
