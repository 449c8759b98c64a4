"""Registers what this package provides; each target is imported when its name is first used."""

from collections.abc import Sequence

from vibe_store.hookspecs import Provider, hookimpl


@hookimpl
def vibe_store_storage() -> Sequence[Provider]:
    """The storage for ``sqlite://`` URLs."""
    return [Provider("sqlite", "vibe_store_template.storage:SqliteStorage", "vibe-store-template")]


@hookimpl
def vibe_store_serializers() -> Sequence[Provider]:
    """The serializer ``raw``."""
    return [Provider("raw", "vibe_store_template.serializer:RawSerializer", "vibe-store-template")]


@hookimpl
def vibe_store_retention() -> Sequence[Provider]:
    """The retention policy ``records``."""
    return [Provider("records", "vibe_store_template.retention:Records", "vibe-store-template")]
