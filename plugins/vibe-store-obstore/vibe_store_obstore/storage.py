"""Objects in buckets of S3, Google Cloud Storage and Azure, through the Rust object store."""

import asyncio
import errno
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Blob
from vibe_store.storage.calls import AT_ONCE, check_retries, together
from vibe_store.storage.keys import check_key, check_url
from vibe_store.storage.object_store import (
    RETRY_ATTEMPTS,
    RETRY_BACKOFF_SECS,
    ChangedError,
    Extent,
    ObjectStore,
    read_exactly,
)
from vibe_store.storage.redaction import redact, secrets_of, without_credentials
from vibe_store_obstore.event_loop import event_loop
from vibe_store_obstore.requests import RequestError, answer_of
from vibe_store_obstore.uploads import Parts

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

__all__ = ["AzureObstore", "GcsObstore", "S3Obstore"]

_PART = 8 << 20
_MOST_PARTS = 10_000
_RANGE = 8 << 20
_PAGE = 1000
_UPLOADS = 3
"""How often a large file is begun anew, beside what obstore itself tries again."""

_MARK = "vibestoreupload"
"""The metadata by which an object shows from which upload it came; Azure takes letters only."""

_DOCUMENTATION = "https://developmentseed.org/obstore/latest/api/store"
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]*")
_TIMEOUTS: Mapping[str, str] = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "120s"}
_LONGEST_WAIT = timedelta(seconds=20)
_LONGEST_RETRIES = timedelta(minutes=15)

_OF_RETRIES: Mapping[str, frozenset[str]] = {
    "retry_config": frozenset({"backoff", "max_retries", "retry_timeout"}),
    "retry_config['backoff']": frozenset({"base", "init_backoff", "max_backoff"}),
}
_OF_THE_ENVIRONMENT = re.compile(r"(AWS|AZURE|GOOGLE)_\w*(KEY|SAS|SECRET|TOKEN)\w*", re.IGNORECASE)
"""The variables from which obstore takes what nobody else should see."""

_Store = S3Store | GCSStore | AzureStore


class Obstore(ObjectStore):
    """Objects in a bucket, through the Rust object store.

    Files of 16 MiB and more go up in parts of 8 MiB (longer ones above 80 GB), eight at once, one file after
    another; obstore tries each part again. An upload that fails is aborted. One that is interrupted is
    aborted too, as long as it has parts that were not begun; after that, and where the process is killed,
    what has been uploaded stays, unseen and paid for, until a rule of the bucket removes it.

    Without a deadline, a connection may take 5 s, an answer 30 s (obstore's ``connect_timeout`` and
    ``read_timeout``, in ``client_options``), and a request as a whole 120 s (``timeout``).

    Args:
        url: the scheme and the bucket, perhaps with a path.
        retry_attempts: how often a request is tried.
        retry_backoff_secs: how long to wait at most before the second attempt; this doubles each time.
        client_options: those of the HTTP client, see ``obstore.store.ClientConfig``.
        retry_config: obstore's own retries, on top of ours, see ``obstore.store.RetryConfig``.
        credential_provider: returns credentials; ``obstore.auth`` has some.
        config: the configuration of the store, by name; obstore takes what is not given from the environment.

    Raises:
        InvalidValueError: the URL names no bucket, or obstore does not take an option.
    """

    store_class: ClassVar[Callable[..., _Store]]
    options_at: ClassVar[str]
    """Where obstore documents the configuration."""

    lists_in_order: ClassVar[bool] = True
    """Whether the store lists objects in the order of their names."""

    def __init__(
        self,
        url: str,
        *,
        retry_attempts: int = RETRY_ATTEMPTS,
        retry_backoff_secs: float = RETRY_BACKOFF_SECS,
        client_options: "ClientConfig | None" = None,
        retry_config: "RetryConfig | None" = None,
        credential_provider: Callable[[], Any] | None = None,
        **config: Any,
    ) -> None:
        bucket, folder = _bucket_and_folder(url)
        secrets = _secrets_of(url, config, client_options or {})
        given = {
            **config,
            "client_options": {**_TIMEOUTS, **(client_options or {})},
            "credential_provider": credential_provider,
        }
        check_retries(retry_attempts, retry_backoff_secs)
        _check_retries(url, retry_config)
        with_retries = {
            "max_retries": retry_attempts - 1,
            "retry_timeout": _LONGEST_RETRIES,
            "backoff": {
                "init_backoff": timedelta(seconds=retry_backoff_secs),
                "max_backoff": max(_LONGEST_WAIT, timedelta(seconds=retry_backoff_secs)),
                "base": 2,
            },
        }
        super().__init__(
            url.rstrip("/"),
            bucket=bucket,
            folder=folder,
            loop=event_loop,
            secrets=secrets,
            retry_attempts=retry_attempts,
            retry_backoff_secs=retry_backoff_secs,
        )
        self._client = self._open(retry_config or {"max_retries": 0}, given)
        # The parts of an upload are obstore's own affair, and so is trying them again.
        self._uploader = self._open(retry_config or with_retries, given)
        self._retry_attempts = retry_attempts
        self._turn = asyncio.Semaphore(1)

    def _open(self, retry_config: Any, given: Mapping[str, Any]) -> _Store:
        try:
            return type(self).store_class(self._bucket, retry_config=retry_config, **given)
        except (BaseError, TypeError, ValueError) as error:
            redact(error, self._secrets)
            text = " ".join(str(error).partition("\n\n")[0].split())
            raise InvalidValueError(
                f"{self.url!r} cannot be opened with the options {sorted(given)}: {text} "
                f"Those that there are stand in {self.options_at}."
            ) from error

    async def _ask(self, request: Awaitable[Any]) -> Any:
        try:
            return await answer_of(request)
        except RequestError as error:
            if error.no_bucket:
                raise self._no_bucket() from error
            raise

    def _is_transient(self, error: BaseException) -> bool:
        if isinstance(error, RequestError):
            return error.passes
        return isinstance(error, ConnectionError | TimeoutError)

    async def _page(self, prefix: str, token: str | None) -> tuple[Sequence[Blob], str | None]:
        folder, _, beginning = prefix.rpartition("/")
        after = token or (_before(prefix) if beginning else None)
        pages = obstore.list(self._client, folder or None, offset=after, chunk_size=_PAGE)
        found = await self._ask(_first_of(pages) if self.lists_in_order else pages.collect_async())
        blobs = [
            self._blob(each["path"], each["size"], each["last_modified"].timestamp(), _version_of(each))
            for each in found
            if each["path"].startswith(prefix)
        ]
        if not self.lists_in_order:
            return sorted(blobs, key=lambda blob: blob.key), None
        last = found[-1]["path"] if len(found) == _PAGE else None
        past = last is not None and last > prefix and not last.startswith(prefix)
        return blobs, None if past else last

    async def _fetch(
        self,
        name: str,
        start: int,
        end: int | None,
        version: str | None,
        take: "Callable[[ReadableBuffer], None]",
    ) -> Extent:
        options: GetOptions = {}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        if version is not None:
            options["if_match"] = version
        try:
            answer = await self._ask(obstore.get_async(self._client, name, options=options))
            content = await self._ask(answer.bytes_async())
        except RequestError as error:
            if error.past_end:
                return Extent(start, None)
            if version is not None and (error.changed or error.missing):
                raise ChangedError(name) from error
            raise _as_missing(error) from error.__cause__
        # obstore has made sure that these are all the bytes that there are of the range.
        if len(content):
            take(content)
        return Extent(int(answer.meta["size"]), answer.meta["e_tag"])

    async def _look(self, name: str) -> None:
        try:
            await self._ask(obstore.head_async(self._client, name))
        except RequestError as error:
            raise _as_missing(error) from error.__cause__

    async def _store(self, name: str, data: bytes, *, create: bool) -> None:
        mode: Any = "create" if create else "overwrite"
        try:
            await self._ask(obstore.put_async(self._client, name, data, mode=mode, use_multipart=False))
        except RequestError as error:
            if create and error.exists:
                raise FileExistsError(name) from error
            raise

    async def _upload(self, name: str, descriptor: int, size: int) -> None:
        if size < 2 * _PART:
            async with self._calls.slot_for(size):
                data = await asyncio.to_thread(read_exactly, descriptor, 0, size)
                await self._calls.request(lambda: self._store(name, data, create=False), size=size)
            return
        async with self._turn:
            await self._calls.request(
                lambda: self._upload_parts(name, descriptor, size),
                size=size,
                attempts=min(_UPLOADS, self._retry_attempts),
            )

    async def _upload_parts(self, name: str, descriptor: int, size: int) -> None:
        mark, length = uuid4().hex, max(_PART, -(-size // _MOST_PARTS))
        parts = Parts(descriptor, size, length)
        upload = asyncio.ensure_future(
            obstore.put_async(
                self._uploader,
                name,
                parts,
                attributes={_MARK: mark},
                use_multipart=True,
                chunk_size=length,
                max_concurrency=AT_ONCE,
            )
        )
        try:
            await self._ask(asyncio.shield(upload))
        except RequestError as error:
            # An attempt before the last may have completed it, and its answer was lost.
            if not (error.forgotten and await self._came_from(name, mark)):
                raise
        except BaseException:
            parts.stop()
            await self._calls.tidy(
                lambda: _end_of(upload),
                f"An unfinished upload of {name!r} may be left in {self.url!r}: it could not be aborted.",
            )
            raise

    async def _came_from(self, name: str, mark: str) -> bool:
        """Whether an object is that of this upload."""
        try:
            found = await self._ask(obstore.get_async(self._client, name, options={"head": True}))
        except RequestError as error:
            if error.missing:
                return False
            raise
        return bool(found.attributes.get(_MARK) == mark)

    async def _remove(self, name: str) -> None:
        try:
            await self._ask(obstore.delete_async(self._client, name))
        except RequestError as error:
            raise _as_missing(error) from error.__cause__

    def _range_size(self, total: int) -> int:
        del total  # each range is held in memory
        return _RANGE


class S3Obstore(Obstore):
    """Objects in an S3 bucket, of Amazon or whoever speaks its language: ``s3+obstore://bucket/path``.

    An object is created only if none is there by ``If-None-Match: *``. A request removes up to a thousand
    objects; for a store that has no such requests there is the option ``disable_bulk_delete=True``.

    Options are those of :class:`Obstore` and of ``obstore.store.S3Config``, such as ``access_key_id``,
    ``secret_access_key``, ``region`` and ``endpoint``.
    """

    store_class = S3Store
    options_at = f"{_DOCUMENTATION}/aws/#obstore.store.S3Config"

    async def _remove_all(self, names: Sequence[str]) -> None:
        async def remove(some: Sequence[str]) -> None:
            try:
                await self._calls.request(lambda: self._ask(obstore.delete_async(self._client, some)))
            except RequestError as error:
                if not error.missing:
                    raise
                await super(S3Obstore, self)._remove_all(some)

        await together(remove(names[start : start + _PAGE]) for start in range(0, len(names), _PAGE))


class GcsObstore(Obstore):
    """Objects in a bucket of Google Cloud Storage: ``gs+obstore://bucket/path``.

    An object is created only if none is there by ``x-goog-if-generation-match: 0``.

    Options are those of :class:`Obstore` and of ``obstore.store.GCSConfig``, such as ``service_account`` and
    ``bearer_token``.
    """

    store_class = GCSStore
    options_at = f"{_DOCUMENTATION}/gcs/#obstore.store.GCSConfig"


class AzureObstore(Obstore):
    """Blobs in a container of Azure: ``az+obstore://container/path``, and ``account_name`` as an option.

    A blob is created only if none is there by ``If-None-Match: *``. A listing is complete before its first
    blob comes, as an account with a hierarchical namespace lists in an order of its own.

    Options are those of :class:`Obstore` and of ``obstore.store.AzureConfig``, such as ``account_name`` and
    ``account_key``.
    """

    store_class = AzureStore
    options_at = f"{_DOCUMENTATION}/azure/#obstore.store.AzureConfig"
    lists_in_order = False


def _bucket_and_folder(url: str) -> tuple[str, str]:
    bucket, _, folder = check_url(url).partition("://")[2].partition("/")
    if bucket and not _BUCKET.fullmatch(bucket):
        shown = re.sub(r"(:/+)[^/]*@", r"\1***@", without_credentials(url))
        raise InvalidValueError(
            f"{shown!r} cannot be opened: what follows '://' must be the name of a bucket or container. "
            "Give credentials, account and endpoint as storage options."
        )
    folder = folder.rstrip("/")
    return bucket, check_key(folder) if folder else ""


def _check_retries(url: str, retry_config: Any) -> None:
    """Refuse what obstore would pass over silently."""
    given = {
        "retry_config": retry_config or {},
        "retry_config['backoff']": (retry_config or {}).get("backoff", {}),
    }
    for place, options in given.items():
        for name in options:
            if name not in _OF_RETRIES[place]:
                raise InvalidValueError(
                    f"{without_credentials(url)!r} cannot be opened: {place} has no {name!r}. It takes "
                    f"{', '.join(sorted(_OF_RETRIES[place]))}."
                )


def _secrets_of(url: str, config: Mapping[str, Any], client_options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what errors must not show: of the options, and of the environment, where obstore looks too."""
    environment = [value for name, value in os.environ.items() if _OF_THE_ENVIRONMENT.fullmatch(name)]
    signatures = [text for text in (*environment, str(config.get("sas_key", ""))) if "sig=" in text]
    options = {
        # URLs under a name that says so.
        **{"endpoint" if name == "base_url" else name: value for name, value in config.items()},
        "host": client_options.get("proxy_url", ""),
        "headers": client_options.get("default_headers", {}),
        "environment": environment,
        # Of a shared access signature of Azure each part stands in the URL of each request.
        "signatures": [pair.partition("=")[2] for text in signatures for pair in text.split("&")],
    }
    return secrets_of(url, options)


def _before(prefix: str) -> str | None:
    """Return a name before every other that begins so, from which a listing can start; None for the first."""
    previous = chr(ord(prefix[-1]) - 1)
    return f"{prefix[:-1]}{previous}" if previous.isprintable() and previous != "/" else None


async def _first_of(pages: "AsyncIterator[Sequence[ObjectMeta]]") -> "Sequence[ObjectMeta]":
    async for page in pages:
        return page
    return ()


def _version_of(meta: "ObjectMeta") -> str | None:
    version = meta["version"] or meta["e_tag"]
    return None if version is None else version.strip('"')


def _as_missing(error: RequestError) -> Exception:
    return FileNotFoundError(errno.ENOENT, str(error)) if error.missing else error


async def _end_of(upload: asyncio.Future[Any]) -> None:
    """Wait for an upload, whatever comes of it; without the time for that, drop it."""
    try:
        await asyncio.wait({upload})
    finally:
        if not upload.cancel() and not upload.cancelled():
            upload.exception()  # or asyncio complains that nobody looked
