"""What storages on S3 and GCS do when requests fail, each through a real proxy that makes them fail."""

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from vibe_store import load_checkpoint, save_checkpoint
from vibe_store.deadline import within
from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import StorageBackend
from vibe_store.registry import open_storage

MB = 1 << 20
BIG = random.Random(0).randbytes(16 * MB + 1)
"""More than goes up in one request to S3, and comes down in one from anywhere."""


def kind_of(bucket: Any) -> str:
    return "s3" if bucket.url.startswith("s3") else "gcs"


@pytest.fixture
def storage(proxies: ModuleType, proxy: Any, bucket: Any, tmp_path: Path) -> StorageBackend:
    options = {"retry_backoff_secs": 0.01, **proxies.patience(bucket, 0.4)}
    opened: StorageBackend = proxies.proxied(bucket, proxy, **options).open(
        tmp_path.name + os.urandom(4).hex()
    )
    return opened


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(BIG)
    return file


def keys_of(storage: StorageBackend) -> list[str]:
    return [blob.key for blob in storage.list()]


def sent(proxy: Any) -> list[str]:
    return [request.method for request in proxy.requests]


def uploads_of(bucket: Any, storage: StorageBackend) -> list[Any]:
    """The multipart uploads to a storage that are neither completed nor aborted, seen by another client."""
    client = bucket.boto3_client()
    prefix = storage.url.removeprefix(f"{bucket.url}/")
    return list(client.list_multipart_uploads(Bucket="bucket", Prefix=prefix).get("Uploads", []))


# every operation, with every fault once


def create(storage: StorageBackend) -> None:
    with suppress(FileExistsError):  # what this very call created, when the answer to it was lost
        storage.write("created", b"new", overwrite=False)
    assert storage.read("created") == b"new"


def put_small(storage: StorageBackend, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    storage.put(tmp_path / "small", "small")
    assert storage.read("small") == b"small"


def put_big(storage: StorageBackend, tmp_path: Path) -> None:
    storage.put(tmp_path / "source", "big")


def get_big(storage: StorageBackend, tmp_path: Path) -> None:
    (tmp_path / "target").unlink(missing_ok=True)
    storage.get("big", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == BIG


def write(storage: StorageBackend) -> None:
    storage.write("written", b"bytes")
    assert storage.read("written") == b"bytes"


def delete(storage: StorageBackend) -> None:
    storage.delete(["written"])
    assert "written" not in keys_of(storage)


OPERATIONS: dict[str, Callable[[StorageBackend, Path], object]] = {
    "list": lambda storage, _: keys_of(storage) == ["big", "written"] or pytest.fail("a wrong list"),
    "read": lambda storage, _: storage.read("written", 1, 3) == b"yt" or pytest.fail("wrong bytes"),
    "write": lambda storage, _: write(storage),
    "create": lambda storage, _: create(storage),
    "put small": put_small,
    "put big": put_big,
    "get": get_big,
    "delete": lambda storage, _: delete(storage),
}

FAULTS = [
    ("status", 503),
    ("status", 500),
    ("status", 502),
    ("status", 429),
    ("reset", 0),
    ("reset after", 0),
    ("silence", 0),
    ("silence after", 0),
    ("cut request", 0),
    ("cut answer", 0),
]


@pytest.mark.proof
@pytest.mark.parametrize(("how", "status"), FAULTS, ids=[f"{how} {status or ''}" for how, status in FAULTS])
def test_whatever_request_fails_once_every_operation_succeeds_and_its_bytes_are_right(
    storage: StorageBackend,
    proxies: ModuleType,
    proxy: Any,
    source: Path,
    tmp_path: Path,
    how: str,
    status: int,
) -> None:
    storage.put(source, "big")
    for name, operation in OPERATIONS.items():
        storage.delete(["created", "small"])
        storage.write("written", b"bytes")
        failed: list[str] = []

        def fail_once(_: int, request: Any, failed: list[str] = failed) -> Any:
            # Each distinct request once: a multipart upload has four kinds of them.
            what = f"{request.method} {'partNumber' in request.query} {'uploadId' in request.query}"
            if what in failed or (how == "cut request" and not request.size):
                return None
            failed.append(what)
            return proxies.Fault(how, status)

        proxy.faults = fail_once
        operation(storage, tmp_path)
        assert failed or how == "cut request", name
        proxy.clear()
        if name == "put big":
            get_big(storage, tmp_path)


def test_two_conditional_writes_that_meet_are_tried_again(s3: Any, proxies: ModuleType) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = proxies.proxied(s3, proxy, retry_backoff_secs=0.01).open("conflict")
        storage.delete(["k"])
        proxy.clear()
        proxy.faults = lambda index, _: proxies.Fault("status", 409) if index == 0 else None
        storage.write("k", b"1", overwrite=False)
        assert sent(proxy) == ["PUT", "PUT"]
        assert [request.headers.get("If-None-Match") for request in proxy.requests] == ["*", "*"]


def test_creating_an_object_asks_gcs_to_refuse_where_there_is_one(gcs: Any, proxies: ModuleType) -> None:
    with proxies.proxy(gcs.server) as proxy:
        storage = proxies.proxied(gcs, proxy).open("created")
        storage.write("replaced", b"1")
        storage.write("created", b"1", overwrite=False)
        assert ["ifGenerationMatch=0" in request.query for request in proxy.requests] == [False, True]


# what does not pass


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [(403, PermissionError, "Access was denied"), (400, OSError, "was refused, and would be again")],
)
@pytest.mark.parametrize("name", ["list", "read", "write", "put big"])
@pytest.mark.usefixtures("source")
def test_a_refusal_fails_at_once_with_a_sentence(
    storage: StorageBackend,
    proxies: ModuleType,
    proxy: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    status: int,
    error: type[OSError],
    says: str,
) -> None:
    storage.list()
    proxy.faults = lambda *_: proxies.Fault("status", status)
    with caplog.at_level(logging.WARNING), pytest.raises(error, match=says) as caught:
        OPERATIONS[name](storage, tmp_path)
    assert len(proxy.requests) == 1
    assert storage.url in str(caught.value)
    assert caplog.records == []  # and no traceback of a client


def test_a_store_that_never_recovers_ends_in_a_sentence_after_all_attempts(
    bucket: Any, proxies: ModuleType, proxy: Any
) -> None:
    options = {"retry_attempts": 3, "retry_backoff_secs": 0.01}
    storage = proxies.proxied(bucket, proxy, **options).open("down")
    proxy.faults = lambda *_: proxies.Fault("status", 503)
    with pytest.raises(ConnectionError, match=r"Writing 'k' in '.*/down' failed 3 times in a row"):
        storage.write("k", b"1")
    assert len(proxy.requests) == 3
    proxy.clear()
    storage.write("k", b"1")
    assert storage.read("k") == b"1"


# the deadline, and Ctrl-C


def test_a_store_that_takes_and_never_answers_ends_at_the_deadline(
    bucket: Any, proxies: ModuleType, proxy: Any, source: Path
) -> None:
    storage = proxies.proxied(bucket, proxy).open("black hole")
    proxy.faults = lambda *_: proxies.Fault("silence")
    for call in (
        lambda: storage.write("k", b"1"),
        lambda: storage.put(source, "k"),
        lambda: list(storage.list()),
    ):
        began = time.monotonic()
        with within(0.5), pytest.raises(TimeoutError, match="was not done by the deadline"):
            call()
        assert 0.4 < time.monotonic() - began < 5


def test_nothing_is_sent_after_the_deadline(storage: StorageBackend, proxy: Any) -> None:
    with within(0), pytest.raises(TimeoutError, match="by the deadline, after 0 failed attempts"):
        storage.read("k")
    assert proxy.requests == []


def test_without_a_deadline_a_request_that_gets_no_answer_ends_too(
    bucket: Any, proxies: ModuleType, proxy: Any
) -> None:
    options = {"retry_attempts": 2, "retry_backoff_secs": 0.01, **proxies.patience(bucket, 0.2)}
    storage = proxies.proxied(bucket, proxy, **options).open("silent")
    proxy.faults = lambda *_: proxies.Fault("silence")
    with pytest.raises(ConnectionError, match="failed 2 times"):
        storage.read("k")


@pytest.mark.parametrize("way", ["put", "get"])
def test_ctrl_c_ends_a_transfer_at_once_and_leaves_nothing(
    proxies: ModuleType,
    proxy: Any,
    bucket: Any,
    source: Path,
    tmp_path: Path,
    way: str,
) -> None:
    storage = proxies.proxied(bucket, proxy, **proxies.patience(bucket, 60.0)).open(os.urandom(4).hex())
    storage.put(source, "old")
    folder = tmp_path / "folder"
    folder.mkdir()
    proxy.clear()
    reached = threading.Event()

    def stall(_: int, request: Any) -> Any:
        if (
            "partNumber=2" in request.query
            or "upload_id" in request.query
            or (way == "get" and request.index)
        ):
            reached.set()
            return proxies.Fault("silence")
        return None

    proxy.faults = stall

    began = 0.0

    def interrupt() -> None:
        nonlocal began
        reached.wait(10)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        storage.put(source, "new") if way == "put" else storage.get("old", folder / "target")
    interrupter.join()
    assert time.monotonic() - began < 5  # far from what a silence may take, and less than tidying up may
    proxy.clear()
    assert keys_of(storage) == ["old"]
    assert list(folder.iterdir()) == []
    if kind_of(bucket) == "s3":
        assert uploads_of(bucket, storage) == []


# multipart uploads


@pytest.mark.parametrize("what", ["partNumber=2", "complete"])
def test_an_upload_that_fails_is_aborted(s3: Any, proxies: ModuleType, source: Path, what: str) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = proxies.proxied(s3, proxy, retry_attempts=2, retry_backoff_secs=0.01).open(
            f"aborted {what}"
        )

        def refuse(_: int, request: Any) -> Any:
            last = request.method == "POST" and "uploadId" in request.query
            return (
                proxies.Fault("status", 503)
                if what in request.query or (what == "complete" and last)
                else None
            )

        proxy.faults = refuse
        with pytest.raises(ConnectionError, match="2 times"):
            storage.put(source, "k")
        assert sent(proxy)[-1] == "DELETE"
    assert uploads_of(s3, storage) == []
    assert keys_of(s3.open(f"aborted {what}")) == []


def test_an_upload_of_a_file_that_becomes_shorter_is_aborted(
    s3: Any, proxies: ModuleType, source: Path
) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = proxies.proxied(s3, proxy).open("shorter")

        def shorten(_: int, request: Any) -> None:
            if "uploads" in request.query:
                os.truncate(source, MB)

        proxy.faults = shorten
        with pytest.raises(OSError, match="became shorter"):
            storage.put(source, "k")
    assert uploads_of(s3, storage) == []
    assert keys_of(s3.open("shorter")) == []


def test_a_completed_upload_whose_answer_was_lost_is_taken_for_done_and_not_aborted(
    s3: Any, proxies: ModuleType, source: Path
) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = proxies.proxied(s3, proxy, retry_backoff_secs=0.01).open("lost answer")
        lost: list[Any] = []

        def lose(_: int, request: Any) -> Any:
            if request.method != "POST" or "uploadId" not in request.query:
                return None
            lost.append(request)
            # Amazon forgets an upload in the end; moto does not.
            return proxies.Fault("status", 404, "NoSuchUpload") if lost[1:] else proxies.Fault("reset after")

        proxy.faults = lose
        storage.put(source, "k")
        assert len(lost) == 2
        assert "DELETE" not in sent(proxy)
    assert s3.open("lost answer").read("k") == BIG


class _Resumable(BaseHTTPRequestHandler):
    """A session as Google describes it. (fake-gcs-server takes the question how much arrived for the end.)"""

    protocol_version = "HTTP/1.1"
    received = b""
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        place = f"http://127.0.0.1:{self.server.server_address[1]}/session?upload_id=secret-id"
        self._answer(200, {"Location": place}, b"{}")

    def do_PUT(self) -> None:
        kind, size = type(self), int(self.headers["Content-Length"])
        kind.asked.append(self.headers["Content-Range"])
        if len(kind.asked) == 1:
            kind.received = self.rfile.read(size // 2 // 2**18 * 2**18)  # which is what Google keeps
            self.connection.close()
            self.rfile.close()
            self.close_connection = True
        elif size == 0:
            self._answer(308, {"Range": f"bytes=0-{len(kind.received) - 1}"}, b"")
        else:
            kind.received += self.rfile.read(size)
            self._answer(200, {}, b'{"size": "%d"}' % len(kind.received))

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_an_upload_to_gcs_goes_on_where_it_broke_off(source: Path) -> None:
    pytest.importorskip("gcsfs", reason='needs pip install "vibe-store[gcs]"')
    with ThreadingHTTPServer(("127.0.0.1", 0), _Resumable) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = {"endpoint_url": url, "token": "anon", "retry_backoff_secs": 0.01}
        open_storage("gs://bucket/run", **options).put(source, "k")
        server.shutdown()
    last, half = len(BIG) - 1, len(BIG) // 2 // 2**18 * 2**18
    assert _Resumable.asked == [
        f"bytes 0-{last}/{len(BIG)}",
        f"bytes */{len(BIG)}",
        f"bytes {half}-{last}/{len(BIG)}",
    ]
    assert _Resumable.received == BIG


def test_an_upload_to_gcs_that_is_cut_off_is_whole_in_the_end_or_not_there(
    gcs: Any, proxies: ModuleType, source: Path
) -> None:
    with proxies.proxy(gcs.server) as proxy:
        storage = proxies.proxied(gcs, proxy, retry_backoff_secs=0.01, retry_attempts=4).open("cut off")
        proxy.faults = lambda index, _: proxies.Fault("cut request") if index == 1 else None
        storage.put(source, "k")
    assert gcs.open("cut off").read("k") == BIG


# what is at rest


def test_wrong_bytes_in_the_bucket_are_found_when_they_are_loaded(bucket: Any) -> None:
    url, options = f"{bucket.url}/rotten", dict(bucket.storage_options)
    save_checkpoint(url, {"a": 1.5}, step=1, storage_options=options)
    storage = open_storage(url, **options)
    (state,) = [blob.key for blob in storage.list() if ".eqx" in blob.key]
    data = bytearray(storage.read(state))
    data[len(data) // 2] ^= 1
    storage.write(state, bytes(data))  # which moto would take with a wrong checksum too
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(url, {"a": 0.0}, step=1, storage_options=options)
