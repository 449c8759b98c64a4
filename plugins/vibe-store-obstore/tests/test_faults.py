"""What the storages do when requests fail, each through a real proxy that makes them fail."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bucket_checks import BIG, FailureChecks, interrupted, keys_of, uploads_of
from proxy import Fault, run_proxy

from vibe_store import open_storage
from vibe_store.deadline import within

pytestmark = pytest.mark.proof

MB = 1 << 20
PATIENT = {"client_options": {"allow_http": True, "read_timeout": "30s"}}


class TestFailures(FailureChecks):
    pass


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source"
    file.write_bytes(BIG)
    return file


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
    assert uploads_of(bucket, storage) == []


def test_an_upload_that_cannot_be_aborted_in_time_is_told_in_the_log(
    s3: Any, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with run_proxy(s3.server) as proxy:
        storage = s3.through(proxy, **s3.patience(60.0)).opener()()
        proxy.faults = lambda _, request: Fault("silence") if "partNumber" in request.query else None
        with caplog.at_level(logging.WARNING), within(0.5), pytest.raises(TimeoutError, match="deadline"):
            storage.put(source, "k")
    assert "An unfinished upload of" in caplog.text
    assert keys_of(s3.open(storage.url.removeprefix(f"{s3.url}/"))) == []


def test_an_upload_that_is_forgotten_is_not_taken_for_what_was_there_before(s3: Any, source: Path) -> None:
    with run_proxy(s3.server) as proxy:
        storage = s3.through(proxy, retry_attempts=2, retry_backoff_secs=0.01).opener()()
        storage.put(source, "k")
        proxy.faults = lambda _, request: (
            Fault("status", 404, "NoSuchUpload")
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
        options = {"endpoint": url, "access_key_id": "a", "secret_access_key": "b", **PATIENT}
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
        options = {"endpoint": url, "access_key_id": "a", "secret_access_key": "b", **PATIENT}
        storage = open_storage("s3+obstore://bucket", **options, retry_backoff_secs=0.01)
        with pytest.raises(error, match=says) if error else nullcontext():
            storage.delete(["a", "b"])
    assert next(answers, None) is None
