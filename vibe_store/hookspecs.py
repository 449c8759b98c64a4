"""The hooks of vibe_store, and the record that they return: all that a plugin package imports to register.

A whole plugin::

    from vibe_store.hookspecs import Provider, hookimpl

    @hookimpl
    def vibe_store_storage():
        return [Provider(name="ftp", target="vibe_store_ftp.storage:FTPStorage", install="vibe-store-ftp")]

and, in its ``pyproject.toml``::

    [project.entry-points.vibe_store]
    ftp = "vibe_store_ftp"
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pluggy

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "Provider",
    "hookimpl",
    "hookspec",
    "vibe_store_retention",
    "vibe_store_serializers",
    "vibe_store_storage",
]

API_VERSION = 1
"""The version of the plugin interface: of the hooks, and of what stands in :mod:`vibe_store.interfaces`."""

ENTRY_POINT_GROUP = "vibe_store"
"""The group of entry points by which plugins are found."""

hookspec = pluggy.HookspecMarker("vibe_store")
"""Marks the hooks below; plugins have no use for it."""

hookimpl = pluggy.HookimplMarker("vibe_store")
"""The decorator of a function in a plugin that implements a hook."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation that a plugin offers, by name; nothing is imported until the name is first used.

    Attributes:
        name: what users write: a URL scheme for a storage (``"s3"``), a serializer's name (``"orbax"``),
            or a retention policy's (``"latest"``). Of letters, digits and any of ``._+-``: a colon begins the
            options that users may write behind the name of a serializer or a policy.
        target: where it is, as ``"package.module:Attribute"``.
        install: what ``pip install`` must be given when importing the target fails (``"vibe-store[s3]"``).
        api: the version of this interface that the target was written for, see :data:`API_VERSION`. One that
            does not say was written for the first.
    """

    name: str
    target: str
    install: str = ""
    api: int = 1


@hookspec
def vibe_store_storage() -> Sequence[Provider]:
    """Return the storages of this plugin; each target is a subclass of ``StorageBackend``,
    called as ``target(url, **storage_options)``."""
    return ()


@hookspec
def vibe_store_serializers() -> Sequence[Provider]:
    """Return the serializers of this plugin; each target is a subclass of ``Serializer``,
    called as ``target(**options)``."""
    return ()


@hookspec
def vibe_store_retention() -> Sequence[Provider]:
    """Return the retention policies of this plugin; each target, called as ``target(**options)``,
    returns a ``RetentionPolicy``. The annotations of its parameters (bool, int, float, str, None, literals of
    these) say how options are read that a user writes as text, ``"every_steps:interval=1000"``."""
    return ()
