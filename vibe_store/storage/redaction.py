"""Keeps secrets out of what people see: the credentials in URLs, and storage options in what others raise."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

__all__ = ["redact", "secrets_of", "without_credentials"]

_HIDDEN = "***"
_SHORTEST = 4
"""Shorter texts are in every other word, and protect nothing."""

_PASSWORD = re.compile(r"(?P<before>:/+[^/:@\s]*):(?P<secret>[^/]*)@")
# A password with a slash in it; what follows a colon may also be a port.
_PASSWORD_WITH_SLASH = re.compile(r"(?P<before>:/+[^/:@\s]*):(?!\d{1,5}(?:/|$))(?P<secret>[^@]*)@")
_TOKEN = re.compile(r"(?P<before>\bhttps?:/+)(?P<secret>[^/@]*)@")
_QUERY = re.compile(r"(?P<before>\?)(?P<secret>[^?:\s]*=.*?)(?=::|$)", re.DOTALL)

_OPEN_TO_ALL = frozenset(
    {
        "account_name", "bucket", "endpoint", "endpoint_url", "host", "hostname", "location", "port",
        "profile", "project", "protocol", "region", "region_name", "target_protocol", "user", "username",
    }
)  # fmt: skip
"""Options that say where and who, which an error should say too. Any other may be a secret."""

_OF_BUILTIN_ERRORS = ("filename", "filename2", "msg", "name", "path", "reason", "strerror", "text")
"""Attributes that exceptions of Python have beside their arguments."""


def without_credentials(url: str) -> str:
    """Return a URL, or a chain of them, without passwords, tokens and queries, to be shown."""
    url = _TOKEN.sub(rf"\g<before>{_HIDDEN}@", url)
    url = _PASSWORD.sub(r"\g<before>@", url)
    url = _PASSWORD_WITH_SLASH.sub(r"\g<before>@", url)
    return _QUERY.sub(rf"\g<before>{_HIDDEN}", url)


def secrets_of(url: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every text in a URL and the options that go with it that nobody else should see, longest first.

    That is any option but those that are open to all, since a filesystem may call its password anything.
    """
    found = {*_in_url(url), *_in_options(options)}
    found |= {unquote(secret) for secret in found}
    return tuple(sorted((text for text in found if len(text) >= _SHORTEST), key=len, reverse=True))


def redact(error: BaseException, secrets: Iterable[str]) -> None:
    """Take secrets out of an error, in place: out of its text, its notes, and all that it was raised from."""
    _redact(error, tuple(secrets), set())


def _in_url(url: str) -> Iterator[str]:
    for match in _TOKEN.finditer(url):
        yield match["secret"]
        yield from match["secret"].split(":")
    for pattern in (_PASSWORD, _PASSWORD_WITH_SLASH):
        yield from (match["secret"] for match in pattern.finditer(url))
    for match in _QUERY.finditer(url):
        yield match["secret"]
        yield from (value for _, _, value in (pair.partition("=") for pair in match["secret"].split("&")))


def _in_options(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes | bytearray):
        yield value.decode("latin-1")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _in_url(str(inner)) if name in _OPEN_TO_ALL else _in_options(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _in_options(inner)


def _redact(error: BaseException, secrets: tuple[str, ...], seen: set[int]) -> None:
    if id(error) in seen:
        return
    seen.add(id(error))
    error.args = tuple(_clean(argument, secrets) for argument in error.args)
    for name in (*_OF_BUILTIN_ERRORS, *vars(error)):
        value = getattr(error, name, None)
        if isinstance(value, str | list) and (cleaned := _clean(value, secrets)) != value:
            setattr(error, name, cleaned)
    text, representation = str(error), repr(error)
    if _holds(text, secrets) or _holds(representation, secrets):
        _speak_for(error, _clean(text, secrets), _clean(representation, secrets))
    inner = (error.__cause__, error.__context__, *getattr(error, "exceptions", ()))
    for each in inner:
        if isinstance(each, BaseException):
            _redact(each, secrets, seen)


def _speak_for(error: BaseException, text: str, representation: str) -> None:
    """Give an error whose own class makes its text, of a request that it keeps, say, a text of ours.

    It stays of its class. (Another error in its place would have it as the context.)
    """
    kind = type(error)
    own = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__str__": lambda _: text,
        "__repr__": lambda _: representation,
    }
    error.__class__ = type(kind.__name__, (kind,), own)


def _clean(value: Any, secrets: tuple[str, ...]) -> Any:
    """Return a value without secrets: the value itself where it has none, else a text or a list of such."""
    if isinstance(value, list):
        return [_clean(inner, secrets) for inner in value]
    if not isinstance(value, str):
        return _clean(repr(value), secrets) if _holds(repr(value), secrets) else value
    if not _holds(value, secrets):
        return value
    for secret in secrets:
        value = value.replace(secret, _HIDDEN)
    return value


def _holds(text: str, secrets: tuple[str, ...]) -> bool:
    return any(secret in text for secret in secrets)
