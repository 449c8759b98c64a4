"""Objects in a bucket, with as few requests as can be: what the storages on S3 and GCS share."""

import errno
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from vibe_store.interfaces import Blob
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.keys import check_keys, check_prefix, check_range

__all__ = ["ObjectStore"]

_AT_ONCE = 16


class ObjectStore(FsspecStorage):
    """Objects in a bucket that a filesystem of fsspec speaks to.

    The store shows an upload once it is complete, creates an object only if none is there when asked to, and
    lists what was written before. A key may be both an object and the beginning of others.
    """

    publishes_whole: ClassVar[bool | None] = True

    def __init__(self, url: str, **storage_options: Any) -> None:
        super().__init__(url, **storage_options)
        self.creates_conditionally = True

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """Yield the objects whose keys begin with ``prefix``, sorted; see :meth:`StorageBackend.list`.

        This takes one request for each thousand objects.
        """
        check_prefix(prefix)
        with self._about("listing", prefix):
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self._root, prefix=prefix, detail=True, withdirs=False)
            except FileNotFoundError as error:
                bucket = self._root.partition("/")[0]
                raise FileNotFoundError(
                    errno.ENOENT,
                    f"There is no bucket {bucket!r}, or none that these credentials may see, so {self.url!r} "
                    "cannot be opened. Create the bucket, or check the URL and the credentials.",
                ) from error
        return self._blobs(found, prefix)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of one object; see :meth:`StorageBackend.read`."""
        check_range(start, end)
        path = self._path(key)
        if end is not None and end <= start:
            with self._about("reading", key):
                self._size(key)
            return b""
        limits = {} if start == 0 and end is None else {"start": start, "end": end}
        with self._about("reading", key):
            try:
                return bytes(self.fs.cat_file(path, **limits))
            except FileNotFoundError as error:
                raise self._missing(key) from error
            except Exception:
                if limits and self._size(key) <= start:  # which a store refuses to read
                    return b""
                raise

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        """Remove exactly these objects, several at a time; see :meth:`StorageBackend.delete`."""
        del durable  # every change is
        paths = [self._path(key) for key in check_keys(keys)]
        if not paths:
            return

        def remove(path: str) -> None:
            with self._about("removing", self._key(path)), suppress(FileNotFoundError):
                self.fs.rm_file(path)

        # One request each: of many in one, some could fail and none of the filesystems says so.
        with ThreadPoolExecutor(min(_AT_ONCE, len(paths)), thread_name_prefix="vibe_store delete") as threads:
            for _ in threads.map(remove, paths):
                pass

    @contextmanager
    def _about(self, doing: str, key: str) -> Iterator[None]:
        with super()._about(doing, key):
            try:
                yield
            except OSError as error:
                if not (isinstance(error, PermissionError) or str(error).startswith("Forbidden")):
                    raise
                raise PermissionError(
                    errno.EACCES,
                    f"Access was denied while {doing} {key!r} in {self.url!r}. Check the credentials, and "
                    f"what they may do in this bucket. The store said: {error}",
                ) from error
