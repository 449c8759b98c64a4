"""Objects in a bucket that a filesystem of fsspec speaks to: what the storages on S3 and GCS share."""

from typing import Any

from vibe_store.storage.fsspec import open_filesystem
from vibe_store.storage.object_store import RETRY_ATTEMPTS, RETRY_BACKOFF_SECS, ObjectStore
from vibe_store.storage.redaction import secrets_of, without_credentials

__all__ = ["FsspecObjectStore"]


class FsspecObjectStore(ObjectStore):
    """Objects in a bucket, through a filesystem of fsspec.

    Of the filesystem only the connections, credentials and options are used, and none of its caches.

    Args:
        url: the bucket, perhaps with a path.
        retry_attempts: how often a request is tried.
        retry_backoff_secs: how long to wait at most before the second attempt; this doubles each time.
        storage_options: those of the filesystem.

    Attributes:
        fs: the filesystem.

    Raises:
        InvalidValueError: the URL names no bucket.
        MissingDependencyError: the package for this protocol is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        retry_attempts: int = RETRY_ATTEMPTS,
        retry_backoff_secs: float = RETRY_BACKOFF_SECS,
        **storage_options: Any,
    ) -> None:
        self.fs, path = open_filesystem(url, storage_options)
        bucket, folder, _ = self.fs.split_path(path.rstrip("/"))
        super().__init__(
            without_credentials(url),
            bucket=bucket,
            folder=folder,
            loop=lambda: self.fs.loop,
            secrets=secrets_of(url, storage_options),
            retry_attempts=retry_attempts,
            retry_backoff_secs=retry_backoff_secs,
        )
