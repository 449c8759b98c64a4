"""Registers the serializer ``safetensors`` with vibe_store."""

from collections.abc import Sequence

from vibe_store.hookspecs import Provider, hookimpl

__all__ = ["vibe_store_serializers"]


@hookimpl
def vibe_store_serializers() -> Sequence[Provider]:
    """Register the serializer; it is imported when it is first used."""
    return (
        Provider(
            name="safetensors",
            target="vibe_store_safetensors.serializer:SafetensorsSerializer",
            install="vibe-store-safetensors",
        ),
    )
