"""The storages, serializers and retention policies of vibe_store itself, registered like any plugin's."""

from collections.abc import Sequence

from vibe_store.hookspecs import Provider, hookimpl

__all__ = ["vibe_store_retention", "vibe_store_serializers", "vibe_store_storage"]


@hookimpl
def vibe_store_storage() -> Sequence[Provider]:
    """Register the storages; the one named ``"fsspec"`` also opens every scheme that only fsspec knows."""
    return (
        Provider(name="file", target="vibe_store.storage.local:LocalStorage"),
        # fsspec's other name for it; through fsspec it would lose atomicity and durability.
        Provider(name="local", target="vibe_store.storage.local:LocalStorage"),
        Provider(name="memory", target="vibe_store.storage.memory:MemoryStorage"),
        Provider(name="s3", target="vibe_store.storage.s3:S3Storage", install="vibe-store[s3]"),
        Provider(name="gs", target="vibe_store.storage.gcs:GcsStorage", install="vibe-store[gcs]"),
        Provider(name="gcs", target="vibe_store.storage.gcs:GcsStorage", install="vibe-store[gcs]"),
        Provider(name="fsspec", target="vibe_store.storage.fsspec:FsspecStorage"),
    )


@hookimpl
def vibe_store_serializers() -> Sequence[Provider]:
    """Register the serializers."""
    return (
        Provider(name="eqx", target="vibe_store.serializers.eqx:EqxSerializer"),
        Provider(
            name="orbax",
            target="vibe_store.serializers.orbax:OrbaxSerializer",
            install="vibe-store[orbax]",
        ),
    )


@hookimpl
def vibe_store_retention() -> Sequence[Provider]:
    """Register the retention policies."""
    return tuple(
        Provider(name=name, target=f"vibe_store.retention:{name}")
        for name in ("latest", "every_steps", "every_seconds", "best_n")
    )
