"""A bucket of a server of this machine, as the tests of object stores take it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vibe_store.interfaces import StorageBackend
from vibe_store.registry import open_storage


@dataclass(frozen=True)
class Bucket(ABC):
    """A bucket of a server.

    Attributes:
        url: the bucket's.
        server: the URL of the server.
        storage_options: with which the bucket's URL is on that server.
        answers_within_secs: how long the server takes at most to answer.
    """

    url: str
    server: str
    storage_options: Mapping[str, Any]
    answers_within_secs: float

    def open(self, path: str, **options: Any) -> StorageBackend:
        """Open a root in the bucket, with further options."""
        return open_storage(f"{self.url}/{path}", **{**self.storage_options, **options})

    @abstractmethod
    def through(self, proxy: Any, **options: Any) -> "Bucket":
        """Return the same bucket where a proxy is, with further options."""

    @abstractmethod
    def patience(self, seconds: float) -> dict[str, Any]:
        """Return the storage options by which a client waits so long for an answer."""

    @abstractmethod
    def uploads(self, prefix: str) -> list[Any]:
        """Return the uploads in parts that are neither complete nor aborted, seen by another client."""
