"""Turns the URL of a storage, or the name of a serializer or a retention policy, into the object itself.

What a provider names is imported here, when its name is first used, and not before.
"""

import difflib
import importlib
import os
import re
import threading
import warnings
from collections.abc import Iterable
from typing import Any, NoReturn, cast

from vibe_store.discovery import (
    DISABLE_VARIABLE,
    SCHEME,
    Kind,
    Plugin,
    Registration,
    Unavailable,
    collect,
    installed_plugins,
    is_disabled,
    kind_text,
    listed,
)
from vibe_store.errors import (
    InvalidValueError,
    PluginError,
    UnknownProviderError,
    VibeStoreWarning,
)
from vibe_store.interfaces import RetentionPolicy, Serializer, StorageBackend
from vibe_store.options import split_options
from vibe_store.provider_target import at_fault, check_usable, make
from vibe_store.storage.redaction import without_credentials

__all__ = [
    "Registry",
    "default_registry",
    "get_retention",
    "get_serializer",
    "open_storage",
]

_FALLBACK_STORAGE = "fsspec"
_MANGLED_SCHEME = re.compile(rf"(?:^|/)({SCHEME.pattern}):(?:/|$)")


class Registry:
    """What a given set of plugins provides; it does not change once made, and any thread may use it.

    Attributes:
        registrations: every provider, in the order of the plugins.
        unavailable: the plugins that are blocked or broken, in their order.
    """

    registrations: tuple[Registration, ...]
    unavailable: tuple[Unavailable, ...]

    def __init__(self, plugins: Iterable[Plugin], *, disabled: Iterable[str] = ()) -> None:
        """Import the plugins that are not disabled, and collect what they register.

        Args:
            plugins: the plugins.
            disabled: names of plugins or distributions that must not be imported; ``"*"`` stands for all that
                are not part of vibe_store.
        """
        plugins, disabled = tuple(plugins), tuple(disabled)
        self.registrations, self.unavailable = collect(plugins, disabled)
        self._notices = [
            f"The {row.plugin} is broken, so what it provides is missing. {row.reason}"
            for row in self.unavailable
            if row.status == "broken"
        ]
        self._notices += [
            f"{DISABLE_VARIABLE} names {name!r}, but no plugin of this name or from a distribution of this "
            "name is installed (what is part of vibe_store itself cannot be disabled)."
            for name in disabled
            if name != "*" and not any(is_disabled(plugin, [name]) for plugin in plugins)
        ]
        self._lock = threading.Lock()

    @classmethod
    def from_entry_points(cls) -> "Registry":
        """Return the registry of the built-ins and of every plugin that is installed and not disabled."""
        names = map(str.strip, os.environ.get(DISABLE_VARIABLE, "").split(","))
        return cls(installed_plugins(), disabled=[name for name in names if name])

    def open_storage(self, url: str | os.PathLike[str], **storage_options: Any) -> StorageBackend:
        """Open a storage, see :func:`open_storage`."""
        text = _url_text(url)
        scheme = self._scheme(text)
        if "://" in text:
            text = scheme + text[len(scheme) :]  # in lower case, as fsspec takes it
        row = None if scheme == _FALLBACK_STORAGE else self._find("storage", scheme)
        if row is None and scheme in _fsspec_protocols():
            row = self._find("storage", _FALLBACK_STORAGE)
        if row is None:
            self._raise_unknown("storage", scheme)
        return cast(StorageBackend, make(row, text, given={}, options=storage_options))

    def get_serializer(self, name: str, **options: Any) -> Serializer:
        """Make a serializer, see :func:`get_serializer`."""
        bare, given = split_options(name)
        row = self._find("serializer", bare)
        if row is None:
            self._raise_unknown("serializer", bare)
        serializer = cast(Serializer, make(row, given=given, options=options))
        if (own := getattr(serializer, "name", None)) != bare:
            # What it writes would say so in its manifest, and not be found by that name.
            raise at_fault(row, f"its attribute `name` is {own!r} instead of {bare!r}")
        return serializer

    def get_retention(self, name: str, **options: Any) -> RetentionPolicy:
        """Make a retention policy, see :func:`get_retention`."""
        bare, given = split_options(name)
        row = self._find("retention", bare)
        if row is None:
            self._raise_unknown("retention", bare)
        policy = make(row, given=given, options=options)
        if not callable(policy):
            raise at_fault(row, f"it returned {policy!r}, which cannot be called")
        return cast(RetentionPolicy, policy)

    def plugin_of(self, serializer: Serializer) -> Plugin | None:
        """Return the plugin that provides a serializer; None where it was made without one."""
        package = type(serializer).__module__.partition(".")[0]
        return next(
            (
                row.plugin
                for row in self.registrations
                if (row.kind, row.provider.name) == ("serializer", serializer.name)
                and re.split("[.:]", row.provider.target)[0] == package
            ),
            None,
        )

    def origin_of(self, kind: Kind, name: str) -> Plugin | None:
        """Return the plugin that has a provider, whatever follows its name; None where none has it."""
        bare = self._scheme(name) if kind == "storage" else split_options(name)[0]
        rows = (row for row in self.registrations if (row.kind, row.provider.name) == (kind, bare))
        return next((row.plugin for row in rows), None)

    def named(self, name: str) -> tuple[Registration, ...]:
        """Return every provider of this name, of whatever kind.

        Raises:
            UnknownProviderError: there is none; the message says which there are.
        """
        self._warn_once()
        found = tuple(row for row in self.registrations if row.provider.name == name)
        if not found:
            names = sorted({row.provider.name for row in self.registrations})
            close = difflib.get_close_matches(name, names)
            hint = f" Did you mean {listed([repr(match) for match in close], 'or')}?" if close else ""
            raise UnknownProviderError(
                f"Nothing is called {name!r}.{hint} Those that exist are {listed(names)}."
            )
        return found

    def _find(self, kind: Kind, name: str) -> Registration | None:
        self._warn_once()
        for row in self.registrations:
            if (row.kind, row.provider.name) == (kind, name):
                check_usable(row)
                return row
        return None

    def _warn_once(self) -> None:
        with self._lock:
            notices, self._notices = self._notices, []
        if notices:
            # The frames between: this one, _find, the method of this class, the public function.
            warnings.warn("\n".join(notices), VibeStoreWarning, stacklevel=5)

    def _names(self, kind: Kind) -> list[str]:
        return sorted({row.provider.name for row in self.registrations if row.kind == kind})

    def _scheme(self, text: str) -> str:
        scheme, separator, _ = text.partition("://")
        if separator and SCHEME.fullmatch(scheme):
            return scheme.lower()
        if separator:
            raise InvalidValueError(
                f"The storage {_without_credentials(text)!r} is neither a path nor a URL of the form "
                f"'scheme://...': {_without_credentials(scheme)!r} is no scheme."
            )
        for match in _MANGLED_SCHEME.finditer(text):
            if match[1].lower() in {*self._names("storage"), *_fsspec_protocols()}:
                raise InvalidValueError(
                    f"The storage {_without_credentials(text)!r} has lost a slash after '{match[1]}:', as "
                    "happens when a URL is made into a pathlib.Path. Pass the URL as text, "
                    f"'{match[1]}://...'; or, to mean a local folder of this name, pass 'file://' and its "
                    "absolute path."
                )
        return "file"

    def _raise_unknown(self, kind: Kind, name: str) -> NoReturn:
        names = self._names(kind)
        others: list[str] = []
        parts = [f"There is no {kind_text(kind)} {name!r}."]
        if kind == "storage":
            names = [known for known in names if known != _FALLBACK_STORAGE]
            others = [known for known in _fsspec_protocols() if known not in names]
            parts = [f"There is no storage for URLs that begin with '{name}://'."]
        if close := difflib.get_close_matches(str(name), [*names, *others], cutoff=0.7):
            parts.append(f"Did you mean {listed([repr(match) for match in close], 'or')}?")
        parts.append(f"Those that exist are {listed(names)}." if names else "None exists.")
        if others:
            parts.append(f"{len(others)} more come with fsspec: see fsspec.available_protocols().")
        parts.append(
            "Install the plugin package that provides it; `vibe-store plugins` lists what is installed."
        )
        parts += [
            f"Perhaps the {row.plugin} provides it, which is {row.status}: {row.reason}"
            for row in self.unavailable
        ]
        raise UnknownProviderError(" ".join(parts))


class _Default:
    """The registry of this process, made when it is first asked for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._registry: Registry | None = None
        self._loading = False

    def get(self) -> Registry:
        with self._lock:
            if self._registry is not None:
                return self._registry
            if self._loading:
                raise PluginError(
                    "A plugin asked vibe_store for a provider while the plugins were still being imported; "
                    "it must do so in a function that is called later."
                )
            self._loading = True
            try:
                self._registry = Registry.from_entry_points()
            finally:
                self._loading = False
            return self._registry


_default = _Default()


def default_registry() -> Registry:
    """Return the registry of the built-ins and the installed plugins.

    The first call in a process makes it, and reads the environment variable
    :data:`~vibe_store.discovery.DISABLE_VARIABLE`.
    """
    return _default.get()


def open_storage(url: str | os.PathLike[str], **storage_options: Any) -> StorageBackend:
    """Open the storage that a URL or a local path names. Nothing is created before the first write.

    Args:
        url: ``"scheme://..."`` as text, or a local path. A scheme that no plugin provides but fsspec knows is
            opened through fsspec.
        storage_options: passed to the storage, each as a keyword.

    Raises:
        InvalidValueError: the URL is not well formed, or the storage does not take an option. (One that the
            client library of an object store does not know, the first request tells.)
        UnknownProviderError: there is no storage for the scheme; the message says which there are.
        MissingDependencyError: the storage needs a package that is not installed; the message says which.
        PluginError: the plugin that provides the scheme is at fault, or several plugins claim it.
    """
    return default_registry().open_storage(url, **storage_options)


def get_serializer(name: str, **options: Any) -> Serializer:
    """Make the serializer of this name (``"eqx"``, say), with its options as keywords or behind its name.

    Args:
        name: the name alone, or with options that are read by the types of the serializer's own signature:
            ``"orbax:compress=true"``.
        options: more options, as they are.

    Raises:
        InvalidValueError: the serializer does not take an option, or the text of one cannot be read.
        UnknownProviderError: there is none of this name; the message says which there are.
        MissingDependencyError: it needs a package that is not installed; the message says which.
        PluginError: the plugin that provides it is at fault, or several plugins claim the name.
    """
    return default_registry().get_serializer(name, **options)


def get_retention(name: str, **options: Any) -> RetentionPolicy:
    """Make the retention policy of this name (``"latest"``, say), with its options as keywords or behind it.

    Args:
        name: the name alone, or with options that are read by the types of the policy's own signature:
            ``"best_n:n=2,metric=eval_return,mode=max"``.
        options: more options, as they are.

    Raises:
        InvalidValueError: the policy does not take an option, or the text of one cannot be read.
        UnknownProviderError: there is none of this name; the message says which there are.
        MissingDependencyError: it needs a package that is not installed; the message says which.
        PluginError: the plugin that provides it is at fault, or several plugins claim the name.
    """
    return default_registry().get_retention(name, **options)


def _url_text(url: object) -> str:
    if not isinstance(url, str | os.PathLike):
        raise InvalidValueError(
            f"A storage is opened by a URL or a path, not by {type(url).__name__} {url!r}."
        )
    text: object = os.fspath(url)
    if not isinstance(text, str):
        raise InvalidValueError(f"A storage is opened by a URL or a path of text, not of bytes: {text!r}.")
    if not text:
        raise InvalidValueError("The URL or path of the storage is empty; pass '.' for the current folder.")
    return text


def _without_credentials(text: str) -> str:
    return re.sub(r"(:/+)[^/@]+@", r"\1***@", without_credentials(text))


def _fsspec_protocols() -> list[str]:
    fsspec = importlib.import_module("fsspec")
    return sorted({*fsspec.available_protocols(), *fsspec.registry})
