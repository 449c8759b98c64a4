"""Reading bytes once, front to back, and knowing at their end that they are those that were written."""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Protocol

import xxhash

from vibe_store.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["CHUNK", "Readable", "VerifyingReader"]

CHUNK = 4 << 20
"""Bytes that are hashed and written (or read) at a time: few enough to stay in the cache in between."""

_ASIDE = 2 * CHUNK
"""From so many bytes on, another thread hashes what was read while more is read, in smaller chunks."""
_CHUNK_ASIDE = 1 << 20


class Readable(Protocol):
    """What loading needs of an open file."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer, or the beginning of it; 0 at the end."""


class VerifyingReader(io.RawIOBase):
    """The first ``size`` bytes of a file, to be read once.

    Whatever reaches their end, or the file's, raises :class:`CorruptCheckpointError` if it is not the end of
    what was written. Closing it leaves the file open.

    Args:
        file: the file, open at the beginning of the bytes.
        size: how many there are.
        checksum: their xxh3-128, in hexadecimal.
        where: what to call them in messages.
    """

    def __init__(self, file: Readable, size: int, checksum: str, where: str) -> None:
        super().__init__()
        self._file, self._left, self._checksum, self._where = file, size, checksum, where
        self._hash = xxhash.xxh3_128()
        self._threads: ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")[: self._left]
        if len(view) < _ASIDE:
            filled = self._fill(view, CHUNK, self._hash.update)
        else:
            threads = self._threads = self._threads or ThreadPoolExecutor(1, "vibe-store-hash")
            # One thread does what it is given in order, and is done before the caller has its buffer back.
            hashed: list[Future[None]] = []
            try:
                filled = self._fill(
                    view, _CHUNK_ASIDE, lambda chunk: hashed.append(threads.submit(self._hash.update, chunk))
                )
            finally:
                wait(hashed)
        if self._left == 0 and self._hash.hexdigest() != self._checksum:
            raise CorruptCheckpointError(
                f"{self._where} is damaged: its checksum is {self._hash.hexdigest()}, "
                f"and {self._checksum} was written."
            )
        return filled

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        super().close()

    def _fill(self, view: memoryview, size: int, hash_chunk: Callable[[memoryview], None]) -> int:
        filled = 0
        while filled < len(view):
            chunk = view[filled : filled + size]
            count = self._file.readinto(chunk)
            if not count:
                raise CorruptCheckpointError(f"{self._where} ended {self._left} bytes early.")
            hash_chunk(chunk[:count])
            self._left -= count
            filled += count
        return filled
