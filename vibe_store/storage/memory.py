"""Objects in the memory of this process, for tests and for trying things out."""

import errno
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vibe_store.interfaces import Blob
from vibe_store.storage.fsspec import FsspecStorage

__all__ = ["MemoryStorage"]

_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# Another thread may have held the lock when this process was forked, and it lives on in the parent only.
os.register_at_fork(after_in_child=_renew_lock)


class MemoryStorage(FsspecStorage):
    """Objects in fsspec's in-process filesystem, which every ``memory://`` URL of a process shares.

    They last as long as the process. A forked child begins with a copy, and neither sees what the other
    writes from then on. One lock makes every method atomic; it does not cover those who use fsspec's
    filesystem directly.

    Args:
        url: ``memory://`` and a path, which may be empty.
        storage_options: those of ``fsspec.implementations.memory.MemoryFileSystem``.
    """

    publishes_whole = True

    def __init__(self, url: str, **storage_options: Any) -> None:
        super().__init__(url, **storage_options)
        self.creates_conditionally = True

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """Yield the objects whose keys begin with ``prefix``, sorted; see :meth:`StorageBackend.list`."""
        with _lock:
            return super().list(prefix)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of one object; see :meth:`StorageBackend.read`."""
        with _lock:
            return super().read(key, start, end)

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        """Store a small object, whole or not at all; see :meth:`StorageBackend.write`.

        Raises:
            NotADirectoryError: a part of the key is an object itself.
            IsADirectoryError: other keys begin with this one and ``"/"``.
        """
        del durable  # every change is, as far as this storage goes
        path = self._path(key)
        names = key.split("/")
        with _lock:
            for parent in ("/".join(names[:count]) for count in range(1, len(names))):
                if self._info(self._path(parent)) is not None:
                    message = f"{parent!r} is an object of {self.url!r}, so there can be none at {key!r}."
                    raise NotADirectoryError(errno.ENOTDIR, message)
            if self._info(path) is not None:
                if not overwrite:
                    raise self._exists(key)
            elif self.fs.isdir(path):
                message = f"There are objects below {key!r} in {self.url!r}, so there can be none at it."
                raise IsADirectoryError(errno.EISDIR, message)
            super().write(key, data)

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        """Store a local file, whole or not at all; see :meth:`StorageBackend.put`."""
        del durable  # every change is, as far as this storage goes
        self.write(key, source.read_bytes())
        if move:
            source.unlink()

    def get(self, key: str, target: Path) -> None:
        """Copy an object to a local file; see :meth:`StorageBackend.get`. Missing parents of it are made."""
        with _lock:
            super().get(key, target)

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        """Remove exactly these objects; see :meth:`StorageBackend.delete`."""
        del durable  # every change is, as far as this storage goes
        with _lock:
            super().delete(keys)

    def _info(self, path: str) -> Mapping[str, Any] | None:
        # The filesystem's own looks through all objects there are, in case some are below this path.
        file = self.fs.store.get(path)
        return None if file is None else {"type": "file", "size": file.size, "created": file.created}

    def _modified(self, info: Mapping[str, Any]) -> float:
        return float(info["created"])  # objects are replaced, never changed
