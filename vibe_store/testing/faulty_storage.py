"""A storage that fails on demand, to see what a checkpoint survives: for the tests of plugins and our own."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vibe_store.interfaces import Blob, StorageBackend

__all__ = ["EXIT_STATUS", "Call", "Fault", "FaultyStorage"]

EXIT_STATUS = 86
"""The exit status of a process that a :class:`Fault` ended."""

Method = Literal["list", "read", "get", "write", "put", "delete", "sweep"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call to a storage.

    Attributes:
        method: the method's name.
        keys: the keys that it was given; the prefix, for ``list``.
        index: how many calls that change something came before it; None for one that only reads.
    """

    method: Method
    keys: tuple[str, ...]
    index: int | None


def _io_error() -> BaseException:
    return OSError(errno.EIO, "injected fault")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and at which calls.

    Attributes:
        when: the index of a call that changes something, or a predicate that is asked about every call.
        how: "before" the call is carried out; "after" it was; "cut", when half of it was (half the bytes
            stored, half the keys deleted; a call that cannot be halved is not carried out); or "delay", which
            only waits for ``seconds`` and lets the call be carried out.
        error: makes the exception to raise; None ends the process instead, by ``os._exit(EXIT_STATUS)``, so
            that neither ``finally`` nor ``atexit`` runs, as with ``kill -9``.
        seconds: how long to wait before anything else happens.
    """

    when: int | Callable[[Call], bool]
    how: Literal["before", "after", "cut", "delay"] = "before"
    error: Callable[[], BaseException] | None = _io_error
    seconds: float = 0.0

    def meets(self, call: Call) -> bool:
        """Whether this is one of the calls that go wrong."""
        return self.when(call) if callable(self.when) else self.when == call.index

    def strike(self) -> None:
        """Raise, or end the process."""
        if self.error is None:
            os._exit(EXIT_STATUS)
        raise self.error()


class FaultyStorage(StorageBackend):
    """Passes every call on to another storage, and fails where a :class:`Fault` says so.

    ``local_path`` is passed on too, so what goes to a local disk past the storage (files being staged) does
    not fail here, and a local storage stays one.

    Attributes:
        calls: every call that changed something or was to, in order.
        faults: what goes wrong; the first that meets a call counts. It may be replaced at any time.
    """

    def __init__(self, inner: StorageBackend, *faults: Fault) -> None:
        self.inner, self.url, self.concurrency = inner, inner.url, inner.concurrency
        self.calls: list[Call] = []
        self.faults = faults
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FaultyStorage({self.inner!r})"

    def list(self, prefix: str = "") -> Iterator[Blob]:
        with self._reading("list", prefix):
            return iter(tuple(self.inner.list(prefix)))

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        with self._reading("read", key):
            return self.inner.read(key, start, end)

    def get(self, key: str, target: Path) -> None:
        with self._reading("get", key):
            self.inner.get(key, target)

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        def store(part: bytes) -> None:
            self.inner.write(key, part, overwrite=overwrite, durable=durable)

        self._change("write", (key,), lambda: store(data), lambda: store(data[: len(data) // 2]))

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        def half() -> None:
            with tempfile.NamedTemporaryFile(prefix="vibe_store-") as part:
                part.write(source.read_bytes()[: source.stat().st_size // 2])
                part.flush()
                self.inner.put(Path(part.name), key)

        def whole() -> None:
            self.inner.put(source, key, move=move, durable=durable)

        self._change("put", (key,), whole, half)

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        doomed = tuple(keys)
        self._change(
            "delete",
            doomed,
            lambda: self.inner.delete(doomed, durable=durable),
            lambda: self.inner.delete(doomed[: len(doomed) // 2], durable=durable),
        )

    def sweep(self) -> None:
        self._change("sweep", (), self.inner.sweep, lambda: None)

    def local_path(self, key: str) -> Path | None:
        return self.inner.local_path(key)

    def _met(self, call: Call) -> Fault | None:
        return next((fault for fault in self.faults if fault.meets(call)), None)

    @contextmanager
    def _reading(self, method: Method, key: str) -> Iterator[None]:
        fault = self._met(Call(method, (key,), None))
        if fault is not None:
            time.sleep(fault.seconds)
        if fault is not None and fault.how in {"before", "cut"}:
            fault.strike()
        yield
        if fault is not None and fault.how == "after":
            fault.strike()

    def _change(
        self, method: Method, keys: tuple[str, ...], act: Callable[[], None], half: Callable[[], None]
    ) -> None:
        with self._lock:
            call = Call(method, keys, len(self.calls))
            self.calls.append(call)
        fault = self._met(call)
        if fault is None:
            act()
            return
        time.sleep(fault.seconds)
        if fault.how == "cut":
            half()
        elif fault.how != "before":
            act()
        if fault.how != "delay":
            fault.strike()
