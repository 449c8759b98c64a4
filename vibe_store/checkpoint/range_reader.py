"""Reading an object of a storage from its start to its end, with the next parts of it on their way."""

import io
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING

from vibe_store.deadline import until
from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import StorageBackend

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["RangeReader"]

_SMALLEST_PART = 8 << 20
_LARGEST_PART = 32 << 20
_PARTS = 8
"""Into how many parts an object is divided, as far as their sizes allow: each costs the store some work."""

_AHEAD = 4


class RangeReader(io.RawIOBase):
    """The bytes of one object; no more than a few parts of it are in memory at a time.

    Args:
        storage: where the object is.
        key: its key.
        size: how many bytes it should have; :class:`CorruptCheckpointError` is raised where there are more.
            None reads to the end, wherever that is, one part after another.

    Attributes:
        missing: the error that said that there is no such object, once one did.
    """

    def __init__(self, storage: StorageBackend, key: str, size: int | None) -> None:
        super().__init__()
        self.missing: FileNotFoundError | None = None
        self._storage, self._key = storage, key
        self._end = None if size is None else size + 1
        self._length = max(_SMALLEST_PART, min(-(-(size or 0) // _PARTS), _LARGEST_PART))
        ahead = 1 if size is None else min(_AHEAD, storage.concurrency)
        self._cancel = threading.Event()
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="vibe_store read")
        self._coming: deque[tuple[int, Future[bytes]]] = deque()
        self._next, self._ended = 0, False
        self._part = memoryview(b"")
        for _ in range(ahead):
            self._ask()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        if not self._part and not self._ended and self._coming:
            self._take()
        count = min(len(view), len(self._part))
        view[:count] = self._part[:count]
        self._part = self._part[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            # What is still on its way nobody wants; after Ctrl-C, say, nobody should have to wait for it.
            self._cancel.set()
            self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _ask(self) -> None:
        """Have the next part read, if there should be one."""
        length = self._length if self._end is None else min(self._length, self._end - self._next)
        if length > 0:
            start, self._next = self._next, self._next + length
            read = partial(self._storage.read, self._key, start, self._next)
            with until(self._cancel):
                self._coming.append((length, self._threads.submit(copy_context().run, read)))

    def _take(self) -> None:
        length, coming = self._coming.popleft()
        try:
            data = coming.result()
        except FileNotFoundError as error:
            self.missing = error
            raise
        self._part = memoryview(data)
        self._ended = len(data) < length
        if not self._ended:
            self._ask()
        if not (self._ended or self._coming) and self._end is not None:
            raise CorruptCheckpointError(
                f"{self._storage.url}/{self._key} has more than the {self._end - 1} bytes that were written."
            )
