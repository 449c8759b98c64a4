"""Copies arrays in memory: the large ones in other threads, while the caller goes on."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np

from vibe_store.serializers.tree import NDArray

__all__ = ["Copier"]

_LARGE = 8 << 20
_MOST_THREADS = 3


class Copier:
    """A block at whose end every array that was given to it is copied."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._large: list[tuple[Future[None], NDArray, NDArray]] = []

    def copy(self, array: NDArray, spare: Any) -> NDArray:
        """Return an array in C order that has the data of ``array`` when the block ends.

        Args:
            array: what to copy; it must not change before then.
            spare: anything; where it is an array of the same shape and dtype, it becomes the copy.
        """
        target = spare if _fits(spare, array) else np.empty(array.shape, array.dtype)
        if array.nbytes < _LARGE:
            np.copyto(target, array)
            return target
        if self._pool is None:
            threads = min(_MOST_THREADS, max(1, (os.cpu_count() or 1) - 1))
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vibe_store copy")
        self._large.append((self._pool.submit(np.copyto, target, array), target, array))
        return target

    def __enter__(self) -> "Copier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        try:
            for copying, target, array in reversed(self._large):
                if copying.cancel():  # no thread has come to it yet
                    np.copyto(target, array)
                else:
                    copying.result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._large.clear()


def _fits(spare: Any, array: NDArray) -> bool:
    return (
        isinstance(spare, np.ndarray)
        and spare.shape == array.shape
        and spare.dtype == array.dtype
        and bool(spare.flags.c_contiguous)
        and bool(spare.flags.writeable)
    )
