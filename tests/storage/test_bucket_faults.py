"""What storages on S3 and GCS do when requests fail, each through a real proxy that makes them fail."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from bucket_checks import BIG, FailureChecks, interrupted, keys_of, uploads_of
from proxy import Fault, run_proxy

from vibe_store import load_checkpoint, save_checkpoint
from vibe_store.errors import CorruptCheckpointError
from vibe_store.registry import open_storage


class TestFailures(FailureChecks):
    @pytest.fixture
    def in_parts(self, s3: Any) -> Any:
        """Google Cloud Storage takes a large file in one upload that goes on where it broke off."""
        return s3


def test_creating_an_object_asks_gcs_to_refuse_where_there_is_one(gcs: Any) -> None:
    with run_proxy(gcs.server) as proxy:
        storage = gcs.through(proxy).open("created")
        storage.write("replaced", b"1")
        storage.write("created", b"1", overwrite=False)
        assert ["ifGenerationMatch=0" in request.query for request in proxy.requests] == [False, True]


def test_ctrl_c_ends_a_put_at_once_and_leaves_nothing(proxy: Any, bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(BIG)
    storage = bucket.through(proxy, **bucket.patience(60.0)).open(os.urandom(4).hex())
    storage.write("old", b"1")
    reached = threading.Event()

    def stall(_: int, request: Any) -> Any:
        if "partNumber=2" in request.query or "upload_id" in request.query:
            reached.set()
            return Fault("silence")
        return None

    proxy.faults = stall
    took = interrupted(reached, lambda: storage.put(tmp_path / "source", "new"))
    assert took < 5  # far from what a silence may take, and less than tidying up may
    proxy.clear()
    assert keys_of(storage) == ["old"]
    if bucket.url.startswith("s3"):
        assert uploads_of(bucket, storage) == []


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


def test_an_upload_to_gcs_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(BIG)
    pytest.importorskip("gcsfs", reason='needs pip install "vibe-store[gcs]"')
    with ThreadingHTTPServer(("127.0.0.1", 0), _Resumable) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        options = {"endpoint_url": url, "token": "anon", "retry_backoff_secs": 0.01}
        open_storage("gs://bucket/run", **options).put(tmp_path / "source", "k")
        server.shutdown()
    last, half = len(BIG) - 1, len(BIG) // 2 // 2**18 * 2**18
    assert _Resumable.asked == [
        f"bytes 0-{last}/{len(BIG)}",
        f"bytes */{len(BIG)}",
        f"bytes {half}-{last}/{len(BIG)}",
    ]
    assert _Resumable.received == BIG


def test_an_upload_to_gcs_that_is_cut_off_is_whole_in_the_end_or_not_there(gcs: Any, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(BIG)
    with run_proxy(gcs.server) as proxy:
        storage = gcs.through(proxy, retry_backoff_secs=0.01, retry_attempts=4).open("cut off")
        proxy.faults = lambda index, _: Fault("cut request") if index == 1 else None
        storage.put(tmp_path / "source", "k")
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
