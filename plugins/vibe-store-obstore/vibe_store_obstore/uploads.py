"""The parts of a large file, as the Rust object store asks for them."""

from collections.abc import Iterator

from vibe_store.storage.object_store import read_exactly

__all__ = ["Parts", "StoppedError"]


class StoppedError(Exception):
    """An upload was stopped; obstore aborts it when the parts raise this."""


class Parts:
    """Iterates over the parts of an open file; a thread of the Rust object store does so.

    Args:
        descriptor: the file's.
        size: how many bytes it has.
        length: how many a part has, except the last.
    """

    def __init__(self, descriptor: int, size: int, length: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._length = length
        self._start = 0
        self._stopped = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._stopped:
            raise StoppedError
        start = self._start
        if start >= self._size:
            raise StopIteration
        self._start = min(start + self._length, self._size)
        return read_exactly(self._descriptor, start, self._start)

    def stop(self) -> None:
        """Let no more parts come."""
        self._stopped = True
