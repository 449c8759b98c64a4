"""Registers the retention policy ``gfs`` with vibe_store."""

from collections.abc import Sequence

from vibe_store.hookspecs import Provider, hookimpl

__all__ = ["vibe_store_retention"]


@hookimpl
def vibe_store_retention() -> Sequence[Provider]:
    """Register the policy; it is imported when it is first used."""
    return (
        Provider(
            name="gfs",
            target="vibe_store_gfs.policy:GrandfatherFatherSon",
            install="vibe-store-gfs",
        ),
    )
