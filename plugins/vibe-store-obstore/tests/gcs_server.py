"""A server of the XML API of Google Cloud Storage, as far as the Rust object store speaks it, and strict.

fake-gcs-server, which vibe_store's own storage is tested with, refuses uploads by XML. This one follows
https://cloud.google.com/storage/docs/xml-api, and refuses whatever header or parameter it does not know, so
that nothing is passed over that Google would act on.
"""

import hashlib
import itertools
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

TOKEN = uuid.uuid4().hex
_MOST_KEYS = 1000
_SMALLEST_PART = 5 << 20
_HEADERS = {
    "accept", "authorization", "connection", "content-length", "content-type", "host", "if-match", "range",
    "user-agent", "x-goog-if-generation-match",
}  # fmt: skip
_LIST = {"continuation-token", "list-type", "max-keys", "prefix", "start-after"}
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Stored:
    """An object."""

    data: bytes
    generation: int
    etag: str
    modified: float
    metadata: dict[str, str]


@dataclass
class Upload:
    """A multipart upload that is neither completed nor aborted."""

    name: str
    metadata: dict[str, str]
    parts: dict[int, tuple[str, bytes]] = field(default_factory=dict)


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class Bucket:
    """What a bucket holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, Upload] = {}
        self._generations = itertools.count(time.time_ns() // 1000)

    def set(self, name: str, data: bytes, metadata: dict[str, str], etag: str | None = None) -> Stored:
        """Store an object; the caller holds the lock."""
        etag = etag or f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        self.objects[name] = Stored(data, next(self._generations), etag, time.time(), metadata)
        return self.objects[name]


class GcsServer:
    """A running server.

    Attributes:
        url: its URL.
        buckets: by name.
    """

    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        handler = type("Handler", (_Handler,), {"buckets": self.buckets})
        self.http = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128})(
            ("127.0.0.1", 0), handler
        )
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def gcs_server() -> Iterator[GcsServer]:
    """Run a server on a free port of this machine."""
    server = GcsServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # so that an answer goes out in one piece
    buckets: dict[str, Bucket]

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client went away
            self.close_connection = True
            return
        path, _, query = self.path.partition("?")
        bucket, _, name = path.removeprefix("/").partition("/")
        try:
            self._check_headers()
            asked = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
            self._carry_out(unquote(bucket), unquote(name, errors="strict"), asked, body)
        except RefusalError as refusal:
            code, message = escape(refusal.code), escape(refusal.message)
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            self._answer(refusal.status, text.encode())

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the server looks for these names

    def _check_headers(self) -> None:
        for header in map(str.lower, self.headers):
            if header not in _HEADERS and not header.startswith("x-goog-meta-"):
                raise RefusalError(400, "InvalidArgument", f"the header {header}")
        if self.command in {"POST", "PUT"} and "Content-Length" not in self.headers:
            raise RefusalError(411, "MissingContentLength")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(403, "AccessDenied", "Access denied.")

    def _carry_out(self, bucket_name: str, name: str, asked: dict[str, str], body: bytes) -> None:
        bucket = self.buckets.get(bucket_name)
        if bucket is None:
            raise RefusalError(404, "NoSuchBucket", "The specified bucket does not exist.")
        what = (self.command, frozenset(asked))
        with bucket.lock:
            if not name and self.command == "GET" and asked.get("list-type") == "2" and asked.keys() <= _LIST:
                self._list(bucket, asked)
            elif not name:
                raise RefusalError(400, "InvalidArgument", f"{what} of a bucket")
            elif what == ("PUT", frozenset()):
                self._put(bucket, name, body)
            elif what in {("GET", frozenset()), ("HEAD", frozenset())}:
                self._get(bucket, name)
            elif what == ("DELETE", frozenset()):
                if bucket.objects.pop(name, None) is None:
                    raise RefusalError(404, "NoSuchKey", "The specified key does not exist.")
                self._answer(204)
            elif what == ("POST", frozenset({"uploads"})):
                identity = f"upload-{next(bucket._generations)}"
                bucket.uploads[identity] = Upload(name, self._metadata())
                self._answer_xml(
                    "InitiateMultipartUploadResult",
                    {"Bucket": bucket_name, "Key": name, "UploadId": identity},
                )
            else:
                self._multipart(bucket, name, asked, body)

    def _multipart(self, bucket: Bucket, name: str, asked: dict[str, str], body: bytes) -> None:
        upload = bucket.uploads.get(asked.get("uploadId", ""))
        if upload is None or upload.name != name:
            raise RefusalError(404, "NoSuchUpload", "The requested upload was not found.")
        what = (self.command, frozenset(asked))
        if what == ("PUT", frozenset({"uploadId", "partNumber"})):
            etag = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
            upload.parts[int(asked["partNumber"])] = (etag, body)
            self._answer(200, b"", {"ETag": etag})
        elif what == ("DELETE", frozenset({"uploadId"})):
            del bucket.uploads[asked["uploadId"]]
            self._answer(204)
        elif what == ("POST", frozenset({"uploadId"})):
            data = _joined(upload, body)
            del bucket.uploads[asked["uploadId"]]
            etag = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}-{len(upload.parts)}"'
            stored = bucket.set(name, data, upload.metadata, etag)
            self._answer_xml(
                "CompleteMultipartUploadResult",
                {"Key": name, "ETag": etag},
                {"x-goog-generation": str(stored.generation)},
            )
        else:
            raise RefusalError(400, "InvalidArgument", str(what))

    def _put(self, bucket: Bucket, name: str, body: bytes) -> None:
        wanted = self.headers.get("x-goog-if-generation-match")
        found = bucket.objects.get(name)
        if wanted is not None and int(wanted) != (found.generation if found else 0):
            raise RefusalError(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
        stored = bucket.set(name, body, self._metadata())
        self._answer(200, b"", {"ETag": stored.etag, "x-goog-generation": str(stored.generation)})

    def _get(self, bucket: Bucket, name: str) -> None:
        found = bucket.objects.get(name)
        if found is None:
            raise RefusalError(404, "NoSuchKey", "The specified key does not exist.")
        if self.headers.get("If-Match", found.etag) != found.etag:
            raise RefusalError(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
        headers = {
            "ETag": found.etag,
            "Last-Modified": formatdate(found.modified, usegmt=True),
            "x-goog-generation": str(found.generation),
            **found.metadata,
        }
        status, data = 200, found.data
        if "Range" in self.headers:
            asked = _RANGE.fullmatch(self.headers["Range"])
            if asked is None:
                raise RefusalError(400, "InvalidArgument", self.headers["Range"])
            start, last = int(asked[1]), int(asked[2] or len(data) - 1)
            if start >= len(data):
                raise RefusalError(416, "InvalidRange", "The requested range cannot be satisfied.")
            last = min(last, len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
            status, data = 206, data[start : last + 1]
        self._answer(status, data, headers)

    def _list(self, bucket: Bucket, asked: dict[str, str]) -> None:
        after = asked.get("continuation-token", asked.get("start-after", ""))
        most = min(int(asked.get("max-keys", _MOST_KEYS)), _MOST_KEYS)
        names = [
            name
            for name in sorted(bucket.objects, key=str.encode)
            if name.startswith(asked.get("prefix", "")) and name.encode() > after.encode()
        ]
        rows = "".join(_row(name, bucket.objects[name]) for name in names[:most])
        more = len(names) > most
        token = f"<NextContinuationToken>{escape(names[most - 1])}</NextContinuationToken>" if more else ""
        text = (
            "<?xml version='1.0' encoding='UTF-8'?><ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}</ListBucketResult>"
        )
        self._answer(200, text.encode(), {"Content-Type": "application/xml; charset=UTF-8"})

    def _metadata(self) -> dict[str, str]:
        return {
            name: value for name, value in self.headers.items() if name.lower().startswith("x-goog-meta-")
        }

    def _answer_xml(self, kind: str, fields: dict[str, str], headers: dict[str, str] | None = None) -> None:
        inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())
        self._answer(200, f"<?xml version='1.0' encoding='UTF-8'?><{kind}>{inner}</{kind}>".encode(), headers)

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _row(name: str, stored: Stored) -> str:
    modified = datetime.fromtimestamp(stored.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return (
        f"<Contents><Key>{escape(name)}</Key><Generation>{stored.generation}</Generation>"
        f"<LastModified>{modified}</LastModified><ETag>{escape(stored.etag)}</ETag>"
        f"<Size>{len(stored.data)}</Size></Contents>"
    )


def _joined(upload: Upload, body: bytes) -> bytes:
    """The bytes of the parts that a request to complete an upload names."""
    rows: list[tuple[int, str]] = []
    for part in ElementTree.fromstring(body):  # noqa: S314 - what the plugin sends
        fields: dict[str, Any] = {field.tag.rpartition("}")[2]: field.text for field in part}
        rows.append((int(fields["PartNumber"]), fields["ETag"]))
    if not rows or [number for number, _ in rows] != sorted({number for number, _ in rows}):
        raise RefusalError(400, "InvalidPartOrder")
    for number, etag in rows:
        if upload.parts.get(number, ("", b""))[0] != etag:
            raise RefusalError(400, "InvalidPart", f"part {number} with {etag}")
        if number != rows[-1][0] and len(upload.parts[number][1]) < _SMALLEST_PART:
            raise RefusalError(400, "EntityTooSmall")
    return b"".join(upload.parts[number][1] for number, _ in rows)
