"""UrlPath: what ``pathlib.Path`` is to a local disk, for the places that URLs name."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from vibe_store.errors import InvalidValueError
from vibe_store.storage.keys import check_key, check_url
from vibe_store.storage.redaction import without_credentials

__all__ = ["UrlPath", "place_of", "url_path_of", "with_home"]

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+._-]*://)(?P<path>.*?)(?P<chain>::.*)?", re.DOTALL)
_LOCAL = frozenset({"file://", "local://"})

_COLLAPSED = re.compile(
    r"^[A-Za-z][A-Za-z0-9+.-]+:/|(?:^|/)(?:abfss?|az|file|gcs|gs|https?|memory|s3a?|s?ftp):/", re.DOTALL
)
"""A URL that went through pathlib; one of a scheme that everybody knows also where it was made absolute."""


class UrlPath:
    """The URL of an object or of a folder of objects, and the options that open its storage; unchangeable.

    ``path / "name"`` is a place below, ``str(path)`` the URL as it is to be opened. It is no ``os.PathLike``:
    ``pathlib`` would make ``s3:/bucket`` of ``s3://bucket``. Nothing is looked up, so every URL has a path.

    Args:
        url: ``scheme://...``; a slash at its end goes.
        storage_options: options of the storage, such as credentials. ``repr`` shows none, nor the credentials
            in a URL; ``str`` shows the whole URL.

    Raises:
        InvalidValueError: ``url`` is no URL.
    """

    # A class of our own, not universal-pathlib's: that one knows the filesystems of fsspec, and a URL of a
    # scheme that only a plugin of ours knows has to work as well. No dataclass: `asdict` would take it apart
    # with all the secrets in its options, on the way to some file.
    __slots__ = ("_chain", "_path", "_scheme", "storage_options")

    _scheme: str
    _path: str
    _chain: str
    storage_options: Mapping[str, Any]

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        match = _URL.fullmatch(check_url(url))
        if match is None:
            raise InvalidValueError(f"{without_credentials(url)!r} is no URL of the form 'scheme://...'.")
        path = match["path"]
        object.__setattr__(self, "_scheme", match["scheme"])
        object.__setattr__(self, "_path", path.rstrip("/") or path[:1])
        object.__setattr__(self, "_chain", match["chain"] or "")
        object.__setattr__(self, "storage_options", dict(storage_options or {}))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        del value
        raise AttributeError(f"{name} of {self!r} cannot be set: make another UrlPath.")

    def __reduce__(self) -> tuple[type["UrlPath"], tuple[str, Mapping[str, Any]]]:
        return UrlPath, (self.url, self.storage_options)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"UrlPath({without_credentials(self.url)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UrlPath):
            return NotImplemented
        return (self.url, self.storage_options) == (other.url, other.storage_options)

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> "UrlPath":
        """Return the place of this name, or of several joined by ``"/"``, below this one.

        Raises:
            InvalidValueError: the name cannot be part of a key (``".."``, say).
        """
        if not isinstance(name, str):
            return NotImplemented
        below = check_key(name.rstrip("/"))
        return self._at(f"{self._path.rstrip('/')}/{below}" if self._path else below)

    @property
    def url(self) -> str:
        """The whole URL, credentials included."""
        return f"{self._scheme}{self._path}{self._chain}"

    @property
    def name(self) -> str:
        """The last name of the path, ``""`` where it has none."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "UrlPath":
        """The place around this one; of the root, the root."""
        around, slash, _ = self._path.rpartition("/")
        return self._at(around or slash)

    @property
    def is_root(self) -> bool:
        """Whether there is no more than one name (the bucket), so that nothing of ours is around it."""
        return "/" not in self._path.strip("/")

    def _at(self, path: str) -> "UrlPath":
        return UrlPath(f"{self._scheme}{path}{self._chain}", self.storage_options)


def url_path_of(place: object, storage_options: Mapping[str, Any] | None = None) -> UrlPath | None:
    """Return the UrlPath of what a user named as a place; None where that is on the local disk.

    Args:
        place: a URL as text, a UrlPath, or a path of universal-pathlib; anything else is taken to be local.
        storage_options: options that come on top of those that the place has, and win over them by name.
    """
    options: Mapping[str, Any] = {}
    if isinstance(place, UrlPath):
        options = place.storage_options
    elif hasattr(place, "protocol") and isinstance(getattr(place, "storage_options", None), Mapping):
        options = place.storage_options  # type: ignore[attr-defined]  # of universal-pathlib
    elif not isinstance(place, str):
        return None
    match = _URL.fullmatch(str(place))
    if match is None or match["scheme"].lower() in _LOCAL:
        return None
    return UrlPath(str(place), {**options, **(storage_options or {})})


def place_of(place: object, storage_options: Mapping[str, Any] | None = None) -> Path | UrlPath:
    """Return a place as a path of its kind; ``file:///`` is a local one, and ``~`` is resolved in others.

    Raises:
        InvalidValueError: it is a URL that went through ``pathlib``, or malformed; or options were given for
            the local disk; or a home folder is not known.
    """
    url = url_path_of(place, storage_options)
    if url is not None:
        return url
    text = place.url if isinstance(place, UrlPath) else _text(place)
    if storage_options:
        raise InvalidValueError(
            f"The local disk has no storage_options, but {text!r} was given {sorted(storage_options)}. "
            "Leave them out."
        )
    collapsed = _COLLAPSED.search(text)
    if collapsed and "://" not in text and not text.startswith("./"):
        check_url(text[collapsed.start() :].lstrip("/"))
    path = text.removeprefix("file://").removeprefix("local://")
    if "://" in path or (path != text and not path.startswith("/")):
        raise InvalidValueError(
            f"{without_credentials(text)!r} is neither a path nor a URL. Write a path, 'file:///' and an "
            "absolute path, or 'scheme://...'."
        )
    return with_home(path) if path == text else Path(path)


def with_home(path: str) -> Path:
    """Return a path in which a leading ``~`` is the home folder, as shells take it.

    Raises:
        InvalidValueError: the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidValueError(f"The home folder in {path!r} is not known. Write the whole path.") from error


def _text(place: object) -> str:
    text = os.fspath(place) if isinstance(place, os.PathLike) else place
    if not isinstance(text, str):
        raise InvalidValueError(f"A place is a path or a URL, of text; got {type(text).__name__} {text!r}.")
    return text
