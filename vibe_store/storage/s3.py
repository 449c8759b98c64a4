"""Objects in an S3 bucket, of Amazon or of anyone who speaks its language, through s3fs."""

import asyncio
import base64
import re
import zlib
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

import aiohttp
from botocore import exceptions as botocore
from botocore.parsers import ResponseParserError

from vibe_store.interfaces import Blob
from vibe_store.storage.calls import AT_ONCE, together
from vibe_store.storage.fsspec_object_store import FsspecObjectStore
from vibe_store.storage.object_store import (
    ChangedError,
    Extent,
    IncompleteError,
    fill_exactly,
    one_line,
    read_exactly,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["S3Storage"]

_Part: TypeAlias = dict[str, Any]

_PART = 8 << 20
_MOST_PARTS = 10_000
_RANGE = 64 << 20
"""Ranges are written to the disk as they come, and go on where they broke off, so long ones cost nothing."""

_BLOCK = 1 << 18
_CONNECTIONS = 4 * AT_ONCE
_MARK = "vibe-store-upload"
"""The metadata by which an object shows from which multipart upload it came."""

_EXTENT = re.compile(r"bytes (?P<start>\d+)-(?P<last>\d+)/(?P<total>\d+)")

_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {
        "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted",
        "PriorRequestNotComplete", "RequestLimitExceeded", "RequestTimeout", "SlowDown", "Throttling",
        "ThrottlingException", "XAmzContentSHA256Mismatch",
    }
)  # fmt: skip
"""Of errors that came with another status, as of two conditional writes that met."""

_PASSING_ERRORS = (
    aiohttp.ClientError,
    botocore.ConnectionError,
    botocore.HTTPClientError,
    botocore.IncompleteReadError,
    ResponseParserError,  # throttled, some stores answer in something that is no XML
    ConnectionError,
    TimeoutError,
)


class S3Storage(FsspecObjectStore):
    """Objects in an S3 bucket, under ``s3://bucket/path``.

    An object is created only if none is there by ``If-None-Match: *``, which Amazon, Cloudflare R2, MinIO and
    Ceph honour. Of a store that ignores it, two writers that create one step at the same moment may both
    believe that they did.

    Files of 16 MiB and more go up in parts of 8 MiB (longer ones above 80 GB). An upload that fails is
    aborted; what a killed process had uploaded stays, unseen and paid for, until a rule of the bucket
    (``AbortIncompleteMultipartUpload``) removes it.

    Without a deadline, a connection may take 5 s and an answer 15 s (s3fs's ``connect_timeout`` and
    ``read_timeout``, in ``config_kwargs``), and a request as a whole 60 s and the time that its bytes take at
    128 KiB a second.

    Args:
        url: ``s3://`` and the bucket, perhaps with a path.
        storage_options: those of :class:`~vibe_store.storage.fsspec_object_store.FsspecObjectStore` and of
            ``s3fs.S3FileSystem``, such as ``key``, ``secret``, ``token``, ``profile``, ``endpoint_url`` and
            ``requester_pays``; without them, credentials and region are looked for where boto3 does.
            ``config_kwargs={"retries": ...}`` adds botocore's own retries to ours.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        ours = {"retries": {"total_max_attempts": 1}, "max_pool_connections": _CONNECTIONS}
        config = {**ours, **(storage_options.pop("config_kwargs", None) or {})}
        super().__init__(url, config_kwargs=config, **storage_options)
        self.fs.retries = 1  # those of s3fs itself

    async def _call(self, method: str, **arguments: Any) -> Any:
        """Make one request; s3fs adds what the user's options ask for, and makes OSErrors of refusals."""
        try:
            return await self.fs._call_s3(method, Bucket=self._bucket, **arguments)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._no_bucket() from error
            raise

    def _is_transient(self, error: BaseException) -> bool:
        if isinstance(error, botocore.SSLError):
            return False
        refusal = _refusal(error)
        if refusal is None:
            return isinstance(error, _PASSING_ERRORS)
        status = refusal.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUSES or _code(error) in _PASSING_CODES

    def _said(self, error: BaseException) -> str:
        refusal = _refusal(error)
        if refusal is None:
            return super()._said(error)
        answer = refusal.get("Error", {})
        status = refusal.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return f"{answer.get('Code')} ({status}): {one_line(str(answer.get('Message')))}"

    async def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Blob], str | None]:
        after = {} if token is None else {"ContinuationToken": token}
        answer = await self._call("list_objects_v2", Prefix=prefix, **after)
        blobs = [
            self._blob(
                found["Key"], found["Size"], found["LastModified"].timestamp(), found["ETag"].strip('"')
            )
            for found in answer.get("Contents", [])
        ]
        return blobs, answer["NextContinuationToken"] if answer.get("IsTruncated") else None

    async def _fetch(
        self,
        name: str,
        start: int,
        end: int | None,
        version: str | None,
        take: Callable[["ReadableBuffer"], None],
    ) -> Extent:
        whole = start == 0 and end is None
        arguments = {} if whole else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        if version is not None:
            arguments["IfMatch"] = version
        try:
            answer = await self._call("get_object", Key=name, **arguments)
        except OSError as error:
            if _code(error) in {"InvalidRange", "416"}:
                return Extent(start, None)
            if version is not None and _code(error) in {"PreconditionFailed", "412", "NoSuchKey"}:
                raise ChangedError(name) from error
            raise
        count = 0
        async with answer["Body"] as body:
            total, expected = _extent(answer, start, whole=whole)
            async for block in body.iter_chunks(_BLOCK):
                count += len(block)
                if count > expected:
                    break
                take(block)
        if count != expected:
            raise IncompleteError(f"{expected} bytes were announced, but {count} came.")
        return Extent(total, answer.get("ETag"))

    async def _look(self, name: str) -> None:
        await self._call("head_object", Key=name)

    async def _store(self, name: str, data: bytes, *, create: bool) -> None:
        condition = {"IfNoneMatch": "*"} if create else {}
        try:
            await self._call("put_object", Key=name, Body=BytesIO(data), **condition)
        except OSError as error:
            if create and _code(error) in {"PreconditionFailed", "412"}:
                raise FileExistsError(name) from error
            raise

    async def _upload(self, name: str, descriptor: int, size: int) -> None:
        if size < 2 * _PART:
            async with self._calls.slot_for(size):
                data = await asyncio.to_thread(read_exactly, descriptor, 0, size)
                await self._calls.request(lambda: self._store(name, data, create=False), size=size)
            return
        mark = uuid4().hex
        metadata = {**self.fs.s3_additional_kwargs.get("Metadata", {}), _MARK: mark}
        # What botocore does of itself with whole objects, unless the user's options leave it out.
        config = (await self.fs.set_session()).meta.config
        checked = config.request_checksum_calculation == "when_supported"
        algorithm = {"ChecksumAlgorithm": "CRC32"} if checked else {}
        upload = await self._calls.request(
            lambda: self._call("create_multipart_upload", Key=name, Metadata=metadata, **algorithm)
        )
        one = {"Key": name, "UploadId": upload["UploadId"]}
        try:
            parts = await self._upload_parts(one, descriptor, size, checked=checked)
            await self._calls.request(lambda: self._complete(one, parts, mark))
        except BaseException:
            await self._calls.tidy(
                lambda: self._call("abort_multipart_upload", **one),
                f"An unfinished upload of {name!r} may be left in {self.url!r}: it could not be aborted.",
            )
            raise

    async def _upload_parts(
        self, one: dict[str, str], descriptor: int, size: int, *, checked: bool
    ) -> Sequence[_Part]:
        length = max(_PART, -(-size // _MOST_PARTS))

        async def send(number: int, body: BytesIO, checksum: dict[str, str]) -> _Part:
            body.seek(0)
            part: _Part = await self._call("upload_part", PartNumber=number, Body=body, **checksum, **one)
            return part

        # Memory that is used for part after part: freed and taken anew each time, it would pile up.
        spare: list[BytesIO] = []

        async def upload(start: int) -> _Part:
            number, end = start // length + 1, min(start + length, size)
            async with self._calls.slots:
                body = spare.pop() if spare and end - start == length else BytesIO(bytes(end - start))
                checksum = await asyncio.to_thread(_fill, body, descriptor, start)
                given = {"ChecksumCRC32": checksum} if checked else {}
                part = await self._calls.request(lambda: send(number, body, given), size=end - start)
                if end - start == length:
                    spare.append(body)
            # A store that was given checksums of the parts wants them again.
            checksums = {key: value for key, value in part.items() if key.startswith("Checksum")}
            checksums.pop("ChecksumType", None)
            return {"PartNumber": number, "ETag": part["ETag"], **checksums}

        return await together(upload(start) for start in range(0, size, length))

    async def _complete(self, one: dict[str, str], parts: Sequence[_Part], mark: str) -> None:
        try:
            await self._call("complete_multipart_upload", MultipartUpload={"Parts": list(parts)}, **one)
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload":
                raise
            # An attempt before this may have completed it, and its answer was lost.
            found = await self._call("head_object", Key=one["Key"])
            if found.get("Metadata", {}).get(_MARK) != mark:
                raise

    async def _remove(self, name: str) -> None:
        await self._call("delete_object", Key=name)

    def _range_size(self, total: int) -> int:
        return max(_RANGE, -(-total // AT_ONCE))


def _fill(body: BytesIO, descriptor: int, start: int) -> str:
    """Fill a body, whose length stays what it is, with bytes of a file; return their CRC32 in base64."""
    with body.getbuffer() as buffer:
        fill_exactly(buffer, descriptor, start)
        return base64.b64encode(zlib.crc32(buffer).to_bytes(4, "big")).decode()


def _extent(answer: dict[str, Any], start: int, *, whole: bool) -> tuple[int, int]:
    """How long an object is, and how many bytes of it an answer announces."""
    length = int(answer["ContentLength"])
    if whole:
        return length, length
    extent = _EXTENT.fullmatch(answer.get("ContentRange", ""))
    if extent is None or int(extent["start"]) != start or int(extent["last"]) + 1 - start != length:
        raise IncompleteError(
            f"The bytes from {start} on were asked for, but the answer is {length} bytes long and says "
            f"{answer.get('ContentRange')!r} of where they belong."
        )
    return int(extent["total"]), length


def _refusal(error: BaseException) -> dict[str, Any] | None:
    """What a store answered that refused a request; None where an error is of another kind."""
    for each in (error, error.__cause__):
        if isinstance(each, botocore.ClientError):
            return dict(each.response)
    return None


def _code(error: BaseException) -> str | None:
    refusal = _refusal(error)
    return None if refusal is None else refusal.get("Error", {}).get("Code")
