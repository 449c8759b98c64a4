"""Objects in a bucket of Google Cloud Storage, through gcsfs."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import aiohttp
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError, is_retriable

from vibe_store.interfaces import Blob
from vibe_store.storage.fsspec_object_store import FsspecObjectStore
from vibe_store.storage.object_store import ChangedError, Extent, IncompleteError, read_exactly
from vibe_store.storage.redaction import redact

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["GcsStorage"]

_SMALL = 8 << 20
"""Files below this go up in one request."""

_RANGE = 8 << 20
_BLOCK = 1 << 20
_STUCK_SECS = 60.0
_CONNECT_SECS = 10.0
_EXTENT = re.compile(r"bytes (?P<start>\d+)-(?P<last>\d+)/(?P<total>\d+)")
_RECEIVED = re.compile(r"bytes=0-(?P<last>\d+)")

# gcsfs tries again for half a minute, which cannot be set, and logs a traceback whenever it gives up.
_request = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)


class GcsStorage(FsspecObjectStore):
    """Objects in a bucket of Google Cloud Storage, under ``gs://bucket/path``.

    An object is created only if none is there by ``ifGenerationMatch=0``.

    Files of 8 MiB and more go up in one stream, which goes on where it broke off (a resumable upload). What
    has been received of an upload that fails is shown to nobody, costs nothing, and is gone after a week.

    Without a deadline, a connection may take 10 s and an answer 60 s (``requests_timeout``), as may an upload
    of which nothing is taken.

    Args:
        url: ``gs://`` (or ``gcs://``) and the bucket, perhaps with a path.
        storage_options: those of :class:`~vibe_store.storage.fsspec_object_store.FsspecObjectStore` and of
            ``gcsfs.GCSFileSystem``, such as ``token``, ``project`` and ``requester_pays``; without them,
            credentials are looked for where Google's own clients do.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        # gcsfs itself would wait for ever.
        patience = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECS, sock_read=_STUCK_SECS)
        super().__init__(url, **{"requests_timeout": patience, **storage_options})

    async def _send(self, method: str, path: str, *arguments: str, **options: Any) -> tuple[int, Any, bytes]:
        """Make one request, with what the user's options add; return its status, headers and content."""
        status, headers, _, content = await _request(self.fs, method, path, *arguments, **options)
        return status, headers, content

    def _is_transient(self, error: BaseException) -> bool:
        if isinstance(error, aiohttp.ClientSSLError):
            return False
        return is_retriable(error) or isinstance(error, ConnectionError | TimeoutError)

    async def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Blob], str | None]:
        try:
            _, _, content = await self._send(
                "GET",
                "b/{}/o",
                self._bucket,
                prefix=prefix,
                maxResults=1000,
                pageToken=token,
                fields="items(name,size,updated,generation),nextPageToken",
            )
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        answer = json.loads(content)
        blobs = [
            self._blob(
                found["name"],
                int(found["size"]),
                datetime.fromisoformat(found["updated"]).timestamp(),
                str(found["generation"]),
            )
            for found in answer.get("items", [])
        ]
        return blobs, answer.get("nextPageToken") or None

    async def _fetch(
        self,
        name: str,
        start: int,
        end: int | None,
        version: str | None,
        take: Callable[["ReadableBuffer"], None],
    ) -> Extent:
        whole = start == 0 and end is None
        part = {} if whole else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        try:
            _, headers, content = await self._send(
                "GET", "b/{}/o/{}", self._bucket, name, alt="media", generation=version, headers=part
            )
        except HttpError as error:
            if int(error.code or 0) == 416:
                return Extent(start, None)
            raise
        except FileNotFoundError as error:
            if version is not None:
                raise ChangedError(name) from error
            raise
        total = len(content)
        if not whole:
            extent = _EXTENT.fullmatch(headers.get("Content-Range", ""))
            if extent is None or (int(extent["start"]), int(extent["last"]) + 1 - start) != (start, total):
                raise IncompleteError(
                    f"The bytes from {start} on were asked for, but {total} bytes came, with "
                    f"{headers.get('Content-Range')!r} for where they belong."
                )
            total = int(extent["total"])
        if content:
            take(content)
        return Extent(total, headers.get("X-Goog-Generation"))

    async def _look(self, name: str) -> None:
        await self._send("GET", "b/{}/o/{}", self._bucket, name, fields="size")

    async def _store(self, name: str, data: bytes, *, create: bool) -> None:
        boundary = uuid4().hex
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
            f"{json.dumps({'name': name})}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        _, _, content = await self._begin(
            uploadType="multipart",
            ifGenerationMatch="0" if create else None,
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=b"".join((head.encode(), data, f"\r\n--{boundary}--".encode())),
        )
        _check_size(json.loads(content), len(data))

    async def _begin(self, **options: Any) -> tuple[int, Any, bytes]:
        """Make the first request of an upload, which may be the only one."""
        place = f"{self.fs.base.removesuffix('storage/v1/')}upload/storage/v1/b/{{}}/o"
        try:
            return await self._send("POST", place, self._bucket, **options)
        except FileNotFoundError as error:
            raise self._no_bucket() from error

    async def _upload(self, name: str, descriptor: int, size: int) -> None:
        async with self._calls.slot_for(size):
            if size < _SMALL:
                data = await asyncio.to_thread(read_exactly, descriptor, 0, size)
                await self._calls.request(lambda: self._store(name, data, create=False), size=size)
            else:
                upload = _Upload(self, name, descriptor, size)
                await self._calls.request(upload.go_on, size=size)

    async def _remove(self, name: str) -> None:
        await self._send("DELETE", "b/{}/o/{}", self._bucket, name)

    def _range_size(self, total: int) -> int:
        del total  # each range is held in memory
        return _RANGE


class _Upload:
    """A resumable upload; see https://cloud.google.com/storage/docs/performing-resumable-uploads."""

    def __init__(self, storage: GcsStorage, name: str, descriptor: int, size: int) -> None:
        self._storage = storage
        self._name = name
        self._descriptor = descriptor
        self._size = size
        self._session: str | None = None
        self._secrets: Sequence[str] = ()  # whoever knows them can write the object
        self._broken = False

    async def go_on(self) -> None:
        """Bring the upload to its end, from where the attempt before this one broke off."""
        try:
            await self._go_on()
        except Exception as error:
            self._broken = True
            redact(error, self._secrets)
            raise

    async def _go_on(self) -> None:
        start: int | None = 0
        if self._session is None:
            self._session = await self._start()
        elif self._broken:
            start = await self._received(self._session)
        while start is not None:
            start = await self._put(self._session, start)

    async def _start(self) -> str:
        _, headers, _ = await self._storage._begin(
            uploadType="resumable",
            name=self._name,
            json={"name": self._name},
            headers={"X-Upload-Content-Type": "application/octet-stream"},
        )
        session = str(headers["Location"])
        self._secrets = (session, *parse_qs(urlsplit(session).query).get("upload_id", ()))
        return session

    async def _put(self, session: str, start: int) -> int | None:
        """Send what is left; return from where to go on, or None at the end."""
        async with asyncio.timeout(_STUCK_SECS) as limit:
            return await self._ask(
                session,
                {
                    "Content-Range": f"bytes {start}-{self._size - 1}/{self._size}",
                    "Content-Length": str(self._size - start),
                },
                _Blocks(self._descriptor, start, self._size, limit),
            )

    async def _received(self, session: str) -> int | None:
        """Ask how much arrived; None for all of it."""
        nothing = {"Content-Range": f"bytes */{self._size}", "Content-Length": "0"}
        return await self._ask(session, nothing, b"")

    async def _ask(self, session: str, headers: dict[str, str], data: Any) -> int | None:
        try:
            status, answer, content = await self._storage._send("PUT", session, headers=headers, data=data)
        except (FileNotFoundError, HttpError) as error:
            if isinstance(error, HttpError) and int(error.code or 0) != 410:
                raise
            self._session = None
            raise IncompleteError("The store has forgotten an upload, which begins anew.") from error
        if status == 308:
            received = _RECEIVED.fullmatch(answer.get("Range", ""))
            return 0 if received is None else int(received["last"]) + 1
        self._session = None  # which ends with the object, be it right or not
        _check_size(json.loads(content), self._size)
        return None


class _Blocks:
    """A part of an open file, read as a client sends it; each block that it takes gives it more time."""

    def __init__(self, descriptor: int, start: int, end: int, limit: asyncio.Timeout) -> None:
        self._descriptor = descriptor
        self._start = start
        self._end = end
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(self._start, self._end, _BLOCK):
            self._limit.reschedule(asyncio.get_running_loop().time() + _STUCK_SECS)
            end = min(start + _BLOCK, self._end)
            yield await asyncio.to_thread(read_exactly, self._descriptor, start, end)


def _check_size(stored: dict[str, Any], size: int) -> None:
    if int(stored["size"]) != size:
        raise IncompleteError(f"{size} bytes were sent, but the store says that it has {stored['size']}.")
