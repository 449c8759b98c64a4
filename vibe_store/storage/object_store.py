"""Objects in a bucket, with as few requests as can be: what every storage on an object store shares."""

import asyncio
import errno
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from vibe_store.durable_files import discarded, open_temporary
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.storage.about import about, exists, missing
from vibe_store.storage.calls import AT_ONCE, Calls, GaveUpError, together
from vibe_store.storage.keys import check_key, check_keys, check_prefix, check_range, is_key

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "RETRY_ATTEMPTS",
    "RETRY_BACKOFF_SECS",
    "ChangedError",
    "Extent",
    "IncompleteError",
    "ObjectStore",
    "fill_exactly",
    "one_line",
    "read_exactly",
]

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")

RETRY_ATTEMPTS = 8
"""How often a request is tried, unless the user says otherwise."""

RETRY_BACKOFF_SECS = 0.5
"""How long to wait at most before the second attempt; this doubles each time."""

_BLOCK = 1 << 20
_FIRST = 8 << 20
"""How much of an object the first request for it asks for."""

_SPEAKING = (ConnectionError, FileExistsError, FileNotFoundError, TimeoutError)
"""What says by its type alone what was wrong; any other error with a cause is a client's."""

_GET_ATTEMPTS = 3
"""How often a download begins anew because the object was replaced under it."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What a store says of an object when it sends a part of it: how long it is, and which version of it."""

    total: int
    version: str | None


class IncompleteError(ConnectionError):
    """A store sent other bytes than it was asked for, and may do better when asked again."""


class ChangedError(Exception):
    """An object was replaced or removed between two requests for it."""


class ObjectStore(StorageBackend):
    """Objects in a bucket, through any client that speaks to it with ``asyncio``.

    A subclass knows the client. It implements the methods below that are abstract, each of which makes one
    request (:meth:`_upload` as many as a large file takes), and says which errors may pass. This class does
    the rest. Their underscore keeps them from the users of a storage, not from the authors of one, who may
    also use ``_calls`` to try requests again, ``_blob`` for the records of a listing, and ``_no_bucket`` for
    the error that there is no bucket.

    The store shows an upload once it is complete, creates an object only if none is there when asked to, and
    lists what was written before, in order. A key may be both an object and the beginning of others.

    What may pass (throttling, errors of the server, connections that break, answers that stay out or are cut
    off) is tried again, with growing, random waits, until the deadline of
    :func:`~vibe_store.deadline.within`. Of one storage at most :data:`~vibe_store.storage.calls.AT_ONCE`
    transfers run at once.

    Args:
        url: the bucket, perhaps with a path, as it may be shown.
        bucket: the name of the bucket.
        folder: the path in the bucket; ``""`` for its root.
        loop: returns the event loop on which the client's coroutines run, in a thread of its own.
        secrets: texts that errors must not show, see :func:`~vibe_store.storage.redaction.secrets_of`.
        retry_attempts: how often a request is tried.
        retry_backoff_secs: how long to wait at most before the second attempt; this doubles each time.

    Raises:
        InvalidValueError: there is no bucket, or a number cannot be.
    """

    concurrency = 2 * AT_ONCE

    def __init__(
        self,
        url: str,
        *,
        bucket: str,
        folder: str,
        loop: Callable[[], asyncio.AbstractEventLoop],
        secrets: Iterable[str] = (),
        retry_attempts: int = RETRY_ATTEMPTS,
        retry_backoff_secs: float = RETRY_BACKOFF_SECS,
    ) -> None:
        if not bucket:
            scheme = url.partition("://")[0]
            raise InvalidValueError(f"{url!r} names no bucket. Write it as '{scheme}://bucket/path'.")
        self.url = url
        self._bucket = bucket
        self._folder = f"{folder}/" if folder else ""
        self._secrets = tuple(secrets)
        self._calls = Calls(
            loop,
            attempts=retry_attempts,
            backoff_secs=retry_backoff_secs,
            is_transient=self._is_transient,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """Yield the objects whose keys begin with ``prefix``, sorted; see :meth:`StorageBackend.list`.

        Each thousand objects take a request, made when the first of them is asked for.
        """
        check_prefix(prefix)
        return self._pages(prefix)

    def _pages(self, prefix: str) -> Iterator[Blob]:
        token, last = None, ""
        while True:
            with self._about("listing", prefix):
                blobs, token = self._calls.run(
                    lambda token=token: self._calls.request(  # type: ignore[misc]  # mypy knows no default
                        lambda: self._page(self._folder + prefix, token)
                    )
                )
            for blob in blobs:
                if is_key(blob.key):  # and no folder marker, whose name ends in "/"
                    if blob.key < last:
                        raise OSError(
                            errno.EIO,
                            f"The store lists {self.url!r} in no order, as S3 does of a directory bucket: "
                            f"{blob.key!r} after {last!r}. Use a general-purpose bucket.",
                        )
                    last = blob.key
                    yield blob
            if token is None:
                return

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of one object; see :meth:`StorageBackend.read`."""
        check_range(start, end)
        name = self._name(key)
        with self._about("reading", key), self._looking_for(key):
            if end is not None and end <= start:
                self._calls.run(lambda: self._calls.request(lambda: self._look(name)))
                return b""
            return self._calls.run(lambda: self._read(name, start, end))[0]

    async def _read(self, name: str, start: int, end: int | None) -> tuple[bytes, Extent]:
        blocks: list[ReadableBuffer] = []

        async def send() -> Extent:
            blocks.clear()
            return await self._fetch(name, start, end, None, blocks.append)

        extent = await self._calls.request(send, size=_FIRST if end is None else end - start)
        return bytes(blocks[0]) if len(blocks) == 1 else b"".join(blocks), extent

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        """Store a small object in one request, whole or not at all; see :meth:`StorageBackend.write`.

        With ``overwrite=False``, ``FileExistsError`` may also mean that this very call created the object and
        that the store's answer was lost; whoever must know reads the object.
        """
        del durable  # every change is
        name, content = self._name(key), bytes(data)
        with self._about("writing", key):
            try:
                self._calls.run(
                    lambda: self._calls.request(
                        lambda: self._store(name, content, create=not overwrite), size=len(content)
                    )
                )
            except FileExistsError as error:
                raise exists(key, self.url) from error

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        """Store a local file of any size; see :meth:`StorageBackend.put`."""
        del durable  # every change is
        name = self._name(key)
        with self._about("writing", key):
            if not source.is_file():
                raise FileNotFoundError(errno.ENOENT, f"There is no file '{source}' to store as {key!r}.")
            with source.open("rb") as file:
                descriptor = file.fileno()
                size = os.fstat(descriptor).st_size
                self._calls.run(lambda: self._upload(name, descriptor, size))
            if move:
                source.unlink(missing_ok=True)

    def get(self, key: str, target: Path) -> None:
        """Copy an object to a local file; see :meth:`StorageBackend.get`. Missing parents of it are made.

        An object of more than 8 MiB comes in several parts at once, all of one version of it.
        """
        name = self._name(key)
        with self._about("reading", key), self._looking_for(key):
            for attempt in range(1, _GET_ATTEMPTS + 1):
                first, extent = self._calls.run(lambda: self._read(name, 0, _FIRST))
                target.parent.mkdir(parents=True, exist_ok=True)
                with discarded(*open_temporary(target.parent)) as (file, temporary):
                    try:
                        self._fill(file, first, name, extent)
                    except ChangedError as error:
                        if attempt == _GET_ATTEMPTS:
                            raise IncompleteError(
                                errno.EBUSY,
                                f"The object {key!r} in {self.url!r} was replaced again and again while it "
                                "was read. Try again when nobody writes to it.",
                            ) from error
                        continue
                    temporary.replace(target)
                    return

    def _fill(self, file: BinaryIO, first: bytes, name: str, extent: Extent) -> None:
        """Fill a file with an object, of which the first part is there already."""
        descriptor = file.fileno()
        os.truncate(descriptor, extent.total)
        write_exactly(descriptor, first, 0)
        rest = range(len(first), extent.total, self._range_size(extent.total - len(first)))

        async def fetch_part(start: int, end: int) -> None:
            def take(block: "ReadableBuffer") -> None:
                nonlocal start
                write_exactly(descriptor, block, start)
                start += memoryview(block).nbytes

            async def send() -> None:  # which goes on where the attempt before it ended
                if start < end:
                    await self._fetch(name, start, end, extent.version, take)

            async with self._calls.slots:
                await self._calls.request(send, size=end - start)

        if rest:
            self._calls.run(
                lambda: together(fetch_part(start, min(start + rest.step, rest.stop)) for start in rest)
            )

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        """Remove exactly these objects, several at a time; see :meth:`StorageBackend.delete`."""
        del durable  # every change is
        names = {self._name(key): key for key in check_keys(keys)}
        if names:
            with self._about("removing", ", ".join(names.values())):
                self._calls.run(lambda: self._remove_all(tuple(names)))

    @abstractmethod
    def _is_transient(self, error: BaseException) -> bool:
        """Whether what a request raised may pass."""

    @abstractmethod
    async def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Blob], str | None]:
        """Return up to a thousand objects, sorted, and what asks for the next ones; None after the last."""

    @abstractmethod
    async def _fetch(
        self,
        name: str,
        start: int,
        end: int | None,
        version: str | None,
        take: Callable[["ReadableBuffer"], None],
    ) -> Extent:
        """Pass on the bytes of a part of an object, in order; nothing where it begins at the end or past it.

        Raises:
            FileNotFoundError: there is no such object.
            ChangedError: the object is no longer of this version.
            IncompleteError: not all bytes came that should.
        """

    @abstractmethod
    async def _look(self, name: str) -> None:
        """Raise FileNotFoundError unless there is such an object."""

    @abstractmethod
    async def _store(self, name: str, data: bytes, *, create: bool) -> None:
        """Store an object in one request; FileExistsError where it is to be created and one is there."""

    @abstractmethod
    async def _upload(self, name: str, descriptor: int, size: int) -> None:
        """Store an open file of any size."""

    @abstractmethod
    async def _remove(self, name: str) -> None:
        """Remove an object, or raise FileNotFoundError."""

    async def _remove_all(self, names: Sequence[str]) -> None:
        """Remove objects, as far as they are there: several at a time, each in a request of its own."""
        few = asyncio.Semaphore(self.concurrency)

        async def remove(name: str) -> None:
            async with few:
                with suppress(FileNotFoundError):
                    await self._calls.request(lambda: self._remove(name))

        await together(remove(name) for name in names)

    @abstractmethod
    def _range_size(self, total: int) -> int:
        """How many bytes to ask for at once of so many."""

    def _name(self, key: str) -> str:
        return self._folder + check_key(key)

    def _blob(self, name: str, size: int, modified: float, version: str | None) -> Blob:
        return Blob(name.removeprefix(self._folder), size, modified, version)

    @contextmanager
    def _looking_for(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise (error if self.url in str(error) else missing(key, self.url)) from error.__cause__

    def _no_bucket(self) -> FileNotFoundError:
        return FileNotFoundError(
            errno.ENOENT,
            f"There is no bucket {self._bucket!r}, or none that these credentials may see, so {self.url!r} "
            "cannot be opened. Create the bucket, or check the URL and the credentials.",
        )

    @contextmanager
    def _about(self, doing: str, key: str) -> Iterator[None]:
        with about(doing, key, self.url, self._secrets):
            try:
                yield
            except GaveUpError as error:
                raise self._gave_up(error, doing, key) from error.__cause__
            except InvalidValueError:
                raise
            except Exception as error:
                if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
                    raise PermissionError(
                        errno.EACCES,
                        f"Access was denied while {doing} {key!r} in {self.url!r}. Check the credentials, "
                        f"and what they may do in this bucket. The store said: {self._said(error)}.",
                    ) from error
                if isinstance(error, OSError) and (isinstance(error, _SPEAKING) or error.__cause__ is None):
                    raise
                raise OSError(
                    errno.EIO,
                    f"{doing.capitalize()} {key!r} in {self.url!r} was refused, and would be again: "
                    f"{self._said(error)}.",
                ) from error

    def _said(self, error: BaseException) -> str:
        """What went wrong, in one line without a full stop: in its own words where it has some."""
        text = one_line(_ERRNO.sub("", str(error)))
        name = type(error).__name__
        return (text if name in text else f"{name}: {text}") if text else name

    def _gave_up(self, error: GaveUpError, doing: str, key: str) -> OSError:
        last = "" if error.__cause__ is None else f", the last time so: {self._said(error.__cause__)}"
        if error.in_time:
            often = "" if error.attempts == 1 else f" {error.attempts} times in a row"
            return ConnectionError(
                errno.ECONNABORTED,
                f"{doing.capitalize()} {key!r} in {self.url!r} failed{often}{last}. "
                "Check the store and the network, and try again.",
            )
        return TimeoutError(
            errno.ETIMEDOUT,
            f"{doing.capitalize()} {key!r} in {self.url!r} was not done by the deadline, after "
            f"{error.attempts} failed attempts{last}. Check the store and the network, or allow more time.",
        )


def one_line(text: str) -> str:
    """Return a text of somebody else's in one line and without a full stop, to go on after it."""
    return " ".join(text.split()).rstrip(".")


def read_exactly(descriptor: int, start: int, end: int) -> bytes:
    """Return a part of an open file.

    Raises:
        OSError: the file has become shorter.
    """
    data = os.pread(descriptor, end - start, start)
    if len(data) < end - start:
        buffer = bytearray(end - start)
        fill_exactly(memoryview(buffer), descriptor, start)
        return bytes(buffer)
    return data


def fill_exactly(buffer: memoryview, descriptor: int, start: int) -> None:
    """Fill a buffer from a place in an open file.

    Raises:
        OSError: the file has become shorter.
    """
    while buffer:
        data = os.pread(descriptor, min(len(buffer), _BLOCK), start)
        if not data:
            raise OSError(errno.EIO, "The file became shorter while it was being stored. Store it again.")
        buffer[: len(data)] = data
        buffer, start = buffer[len(data) :], start + len(data)


def write_exactly(descriptor: int, data: "ReadableBuffer", start: int) -> None:
    """Write to a place in an open file."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written
