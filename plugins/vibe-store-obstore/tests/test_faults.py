"""What the storages do when requests fail, each through a real proxy that makes them fail."""

import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store import open_storage
from vibe_store.deadline import within
from vibe_store.interfaces import StorageBackend

pytestmark = pytest.mark.proof

MB = 1 << 20
BIG = random.Random(0).randbytes(16 * MB + 1)
"""More than goes up in one request, and comes down in one."""


def patience(seconds: float) -> dict[str, Any]:
    return {"client_options": {"allow_http": True, "read_timeout": f"{int(seconds * 1000)}ms"}}


@pytest.fixture
def storage(bucket: Any, proxy: Any) -> StorageBackend:
    seconds = 1.5 if bucket.url.startswith("az") else 0.5  # Azurite takes its time
    opened: StorageBackend = bucket.through(proxy, retry_backoff_secs=0.01, **patience(seconds)).opener()()
    return opened


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(BIG)
    return file


def keys_of(storage: StorageBackend) -> list[str]:
    return [blob.key for blob in storage.list()]


def methods_of(proxy: Any) -> list[str]:
    return [request.method for request in proxy.requests]


# every operation, with every fault once


def create(storage: StorageBackend) -> None:
    with suppress(FileExistsError):  # what this very call created, when the answer to it was lost
        storage.write("created", b"new", overwrite=False)
    assert storage.read("created") == b"new"


def put_small(storage: StorageBackend, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    storage.put(tmp_path / "small", "small")
    assert storage.read("small") == b"small"


def get_big(storage: StorageBackend, tmp_path: Path) -> None:
    (tmp_path / "target").unlink(missing_ok=True)
    storage.get("big", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == BIG


def write(storage: StorageBackend) -> None:
    storage.write("written", b"bytes")
    assert storage.read("written") == b"bytes"


def read(storage: StorageBackend) -> None:
    assert storage.read("written", 1, 3) == b"yt"


def delete(storage: StorageBackend) -> None:
    storage.delete(["written", "missing"])
    assert "written" not in keys_of(storage)


def listed(storage: StorageBackend) -> None:
    assert keys_of(storage) == ["big", "written"]


OPERATIONS: dict[str, Callable[[StorageBackend, Path], object]] = {
    "list": lambda storage, _: listed(storage),
    "read": lambda storage, _: read(storage),
    "write": lambda storage, _: write(storage),
    "create": lambda storage, _: create(storage),
    "put small": put_small,
    "put big": lambda storage, tmp_path: storage.put(tmp_path / "source", "big"),
    "get": get_big,
    "delete": lambda storage, _: delete(storage),
    "delete one": lambda storage, _: storage.delete(["written"]),
}

FAULTS = [
    ("status", 503),
    ("status", 429),
    ("reset", 0),
    ("reset after", 0),
    ("silence after", 0),
    ("cut request", 0),
    ("cut answer", 0),
]


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
            # Each distinct request once: a multipart upload has several kinds of them.
            kinds = [word in request.query for word in ("partNumber", "uploadId", "comp=block&", "blocklist")]
            what = f"{request.method} {kinds}"
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


def test_two_conditional_writes_that_meet_on_s3_are_tried_again(s3: Any, proxies: ModuleType) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = s3.through(proxy, retry_backoff_secs=0.01).opener()()
        proxy.faults = lambda index, _: proxies.Fault("status", 409) if index == 0 else None
        storage.write("k", b"1", overwrite=False)
        assert methods_of(proxy) == ["PUT", "PUT"]
        assert [request.headers.get("if-none-match") for request in proxy.requests] == ["*", "*"]


# what does not pass


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [(403, PermissionError, "Access was denied"), (400, OSError, "was refused, and would be again")],
)
@pytest.mark.parametrize("name", ["list", "read", "write", "put big", "delete one"])
@pytest.mark.usefixtures("source")
def test_a_refusal_fails_at_once_with_a_sentence(
    storage: StorageBackend,
    proxies: ModuleType,
    proxy: Any,
    tmp_path: Path,
    name: str,
    status: int,
    error: type[OSError],
    says: str,
) -> None:
    proxy.faults = lambda *_: proxies.Fault("status", status)
    with pytest.raises(error, match=says) as caught:
        OPERATIONS[name](storage, tmp_path)
    tried = [(request.method, request.path, request.query) for request in proxy.requests]
    assert len(tried) == len(set(tried))
    assert storage.url in str(caught.value)
    assert "This is what the test asked for." in str(caught.value)
    assert "Debug source" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1")
    scheme = bucket.url.partition("://")[0]
    storage = open_storage(f"{scheme}://nobody-made-it/run", **bucket.storage_options)
    for call in (
        lambda: list(storage.list()),
        lambda: storage.read("k"),
        lambda: storage.write("k", b""),
        lambda: storage.put(tmp_path / "source", "k"),
    ):
        with pytest.raises(FileNotFoundError, match="There is no bucket 'nobody-made-it'"):
            call()


def test_a_store_that_never_recovers_ends_in_a_sentence_after_all_attempts(
    bucket: Any, proxies: ModuleType, proxy: Any, source: Path
) -> None:
    storage = bucket.through(proxy, retry_attempts=3, retry_backoff_secs=0.01).open("down")
    proxy.faults = lambda *_: proxies.Fault("status", 503)
    with pytest.raises(ConnectionError, match=r"Writing 'k' in '.*/down' failed 3 times in a row.*503"):
        storage.write("k", b"1")
    assert len(proxy.requests) == 3
    with pytest.raises(ConnectionError, match=r"Writing 'big' in '.*/down' failed 3 times in a row.*503"):
        storage.put(source, "big")
    proxy.clear()
    storage.write("k", b"1")
    assert storage.read("k") == b"1"


def test_a_server_that_is_not_there_is_told_with_the_reason(bucket: Any) -> None:
    options = {**bucket.storage_options, bucket.endpoint: "http://127.0.0.1:9"}
    storage = open_storage(f"{bucket.url}/run", **options, retry_attempts=2, retry_backoff_secs=0.01)
    with pytest.raises(ConnectionError, match=r"failed 2 times in a row.*Connection refused"):
        storage.read("k")


# the deadline, and Ctrl-C


def test_a_store_that_takes_and_never_answers_ends_at_the_deadline(
    bucket: Any, proxies: ModuleType, proxy: Any, source: Path
) -> None:
    storage = bucket.through(proxy).open("black hole")
    proxy.faults = lambda *_: proxies.Fault("silence")
    for call in (
        lambda: storage.write("k", b"1"),
        lambda: storage.put(source, "k"),
        lambda: list(storage.list()),
        lambda: storage.get("k", source),
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
    options = {"retry_attempts": 2, "retry_backoff_secs": 0.01, **patience(0.2)}
    storage = bucket.through(proxy, **options).open("silent")
    proxy.faults = lambda *_: proxies.Fault("silence")
    with pytest.raises(ConnectionError, match="failed 2 times"):
        storage.read("k")


def interrupted(reached: threading.Event, call: Callable[[], object]) -> float:
    """Make a call, which Ctrl-C ends once something was reached; return how long that took.

    The system may give the signal to any thread, so it is given to one that does not wait for the call.
    """
    began = 0.0

    def interrupt() -> None:
        nonlocal began
        reached.wait(30)
        began = time.monotonic()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    interrupter.join()
    return time.monotonic() - began


def test_ctrl_c_ends_a_get_at_once_and_leaves_nothing(
    bucket: Any, proxies: ModuleType, proxy: Any, source: Path, tmp_path: Path
) -> None:
    storage = bucket.through(proxy, **patience(60.0)).opener()()
    storage.put(source, "old")
    folder = tmp_path / "folder"
    folder.mkdir()
    proxy.clear()
    reached = threading.Event()

    def stall(index: int, _: Any) -> Any:
        if index == 0:
            return None
        reached.set()
        return proxies.Fault("silence")

    proxy.faults = stall
    took = interrupted(reached, lambda: storage.get("old", folder / "target"))
    assert took < 5
    assert list(folder.iterdir()) == []


def test_ctrl_c_ends_a_put_aborts_the_upload_and_shows_nobody_a_part(
    bucket: Any, proxy: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(20 * 8 * MB)
    storage = bucket.through(proxy).opener()()
    storage.write("old", b"1")
    proxy.clear()
    reached, released = threading.Event(), threading.Event()

    def hold(_: int, request: Any) -> None:
        if request.method == "PUT":
            threading.Timer(1.0, released.set).start()  # when the interruption has long been seen
            reached.set()
            released.wait(30)

    proxy.faults = hold
    took = interrupted(reached, lambda: storage.put(source, "new"))
    assert took < 10
    assert keys_of(storage) == ["old"]
    left = bucket.uploads(storage.url.removeprefix(f"{bucket.url}/"))
    assert left is None or left == []


def test_an_upload_that_cannot_be_aborted_in_time_is_told_in_the_log(
    s3: Any, proxies: ModuleType, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = s3.through(proxy, **patience(60.0)).opener()()
        proxy.faults = lambda _, request: proxies.Fault("silence") if "partNumber" in request.query else None
        with caplog.at_level(logging.WARNING), within(0.5), pytest.raises(TimeoutError, match="deadline"):
            storage.put(source, "k")
    assert "An unfinished upload of" in caplog.text
    assert keys_of(s3.open(storage.url.removeprefix(f"{s3.url}/"))) == []


# multipart uploads


@pytest.mark.parametrize("what", ["partNumber=2", "complete"])
def test_an_upload_that_fails_is_aborted(
    bucket: Any, proxies: ModuleType, proxy: Any, source: Path, what: str
) -> None:
    storage = bucket.through(proxy, retry_attempts=2, retry_backoff_secs=0.01).opener()()

    def refuse(_: int, request: Any) -> Any:
        last = (request.method == "POST" and "uploadId" in request.query) or "blocklist" in request.query
        failing = last if what == "complete" else what in request.query or "comp=block&" in request.query
        return proxies.Fault("status", 503) if failing else None

    proxy.faults = refuse
    with pytest.raises(ConnectionError, match="503"):
        storage.put(source, "k")
    path = storage.url.removeprefix(f"{bucket.url}/")
    left = bucket.uploads(path)
    assert left is None or left == []
    assert keys_of(bucket.open(path)) == []


def test_an_upload_of_a_file_that_becomes_shorter_is_aborted(bucket: Any, proxy: Any, source: Path) -> None:
    os.truncate(source, 20 * 8 * MB)  # more parts than are under way at once
    storage = bucket.through(proxy).opener()()

    def shorten(index: int, _: Any) -> None:
        if index == 0:
            os.truncate(source, MB)

    proxy.faults = shorten
    with pytest.raises(OSError, match="became shorter"):
        storage.put(source, "k")
    path = storage.url.removeprefix(f"{bucket.url}/")
    left = bucket.uploads(path)
    assert left is None or left == []
    assert keys_of(bucket.open(path)) == []


def test_a_completed_upload_whose_answer_was_lost_is_taken_for_done(
    bucket: Any, proxies: ModuleType, proxy: Any, source: Path
) -> None:
    storage = bucket.through(proxy, retry_backoff_secs=0.01).opener()()
    lost: list[Any] = []

    def lose(_: int, request: Any) -> Any:
        last = (request.method == "POST" and "uploadId" in request.query) or "blocklist" in request.query
        if not last:
            return None
        lost.append(request)
        if len(lost) == 1:
            return proxies.Fault("reset after")
        # Amazon forgets an upload in the end; moto does not.
        return proxies.Fault("status", 404, "NoSuchUpload") if bucket.url.startswith("s3") else None

    proxy.faults = lose
    storage.put(source, "k")
    assert len(lost) == 2
    assert storage.read("k") == BIG


def test_an_upload_that_is_forgotten_is_not_taken_for_what_was_there_before(
    s3: Any, proxies: ModuleType, source: Path
) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = s3.through(proxy, retry_attempts=2, retry_backoff_secs=0.01).opener()()
        storage.put(source, "k")
        proxy.faults = lambda _, request: (
            proxies.Fault("status", 404, "NoSuchUpload")
            if request.method == "POST" and "uploadId" in request.query
            else None
        )
        with pytest.raises(OSError, match="NoSuchUpload"):
            storage.put(source, "k")


# answers that no other server gives


@contextmanager
def answering(status: int, headers: dict[str, str], body: Callable[[str], bytes]) -> Iterator[str]:
    """Run a server that answers every request so; ``body`` is told the path and the query."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = body(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 - the server looks for this name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def texts_of(error: BaseException | None) -> str:
    shown = ""
    while error is not None:
        shown += f"{error} {error!r} {getattr(error, '__notes__', [])}"
        error = error.__cause__ or error.__context__
    return shown


def test_a_signature_from_the_environment_that_the_server_quotes_is_in_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", "sv=2024-11-04&sig=hidden%2Fsignature")
    with answering(403, {}, lambda path: f"<Error><Message>{path}</Message></Error>".encode()) as url:
        options: dict[str, Any] = {"endpoint": f"{url}/account", "client_options": {"allow_http": True}}
        storage = open_storage("az+obstore://container/run", account_name="account", **options)
        with pytest.raises(PermissionError, match="Access was denied while reading 'k'") as caught:
            storage.read("k")
    shown = texts_of(caught.value) + repr(storage)
    assert "***</Message>" in shown  # so it was quoted
    assert "hidden" not in shown


def test_a_part_that_is_shorter_than_it_should_be_is_never_taken_for_whole(tmp_path: Path) -> None:
    headers = {
        "Content-Range": "bytes 0-4/10",
        "ETag": '"1"',
        "Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT",
    }
    with answering(206, headers, lambda _: b"01234") as url:
        options = {"endpoint": url, "access_key_id": "a", "secret_access_key": "b", **patience(30.0)}
        storage = open_storage("s3+obstore://bucket", **options)
        with pytest.raises(OSError, match=r"Requested 0\.\.10, got 0\.\.5"):
            storage.get("k", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        ("SlowDown", None, ""),
        ("AccessDenied", PermissionError, "Access was denied while removing 'a, b'"),
        ("Other", OSError, r"Removing 'a, b' in 's3\+obstore://bucket' was refused, .*Other"),
    ],
)
def test_one_of_several_objects_that_is_not_removed_is_tried_again_or_told(
    code: str, error: type[OSError] | None, says: str
) -> None:
    failed = f"<Error><Key>b</Key><Code>{code}</Code><Message>a text</Message></Error>"
    answers = iter([f"<DeleteResult><Deleted><Key>a</Key></Deleted>{failed}</DeleteResult>"])
    whole = "<DeleteResult><Deleted><Key>a</Key></Deleted><Deleted><Key>b</Key></Deleted></DeleteResult>"
    with answering(200, {}, lambda _: next(answers, whole).encode()) as url:
        options = {"endpoint": url, "access_key_id": "a", "secret_access_key": "b", **patience(30.0)}
        storage = open_storage("s3+obstore://bucket", **options, retry_backoff_secs=0.01)
        with pytest.raises(error, match=says) if error else nullcontext():
            storage.delete(["a", "b"])
    assert next(answers, None) is None
