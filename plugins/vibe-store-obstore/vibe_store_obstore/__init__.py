"""Storages of vibe_store on the Rust object store: ``s3+obstore``, ``gs+obstore`` and ``az+obstore``."""

from collections.abc import Sequence

from vibe_store.hookspecs import Provider, hookimpl

__all__ = ["vibe_store_storage"]


@hookimpl
def vibe_store_storage() -> Sequence[Provider]:
    """Register the storages, one for each kind of bucket."""
    return tuple(
        Provider(
            name=f"{scheme}+obstore",
            target=f"vibe_store_obstore.storage:{target}",
            install="vibe-store-obstore",
        )
        for scheme, target in (("s3", "S3Obstore"), ("gs", "GcsObstore"), ("az", "AzureObstore"))
    )
