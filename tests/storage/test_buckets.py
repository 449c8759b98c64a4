"""What storages on S3 and GCS do beside what every storage does."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vibe_store import load_checkpoint, save_checkpoint
from vibe_store.registry import open_storage


def test_a_bucket_that_does_not_exist_is_named_at_once(bucket: Any) -> None:
    url, options = bucket.url.replace("bucket", "no-such-bucket") + "/run", bucket.storage_options
    calls: list[Callable[[], object]] = [
        lambda: save_checkpoint(url, 1, step=1, storage_options=options),
        lambda: load_checkpoint(url, step=1, storage_options=options),
        lambda: list(open_storage(url, **options).list()),
    ]
    for call in calls:
        with pytest.raises(
            FileNotFoundError, match=r"There is no bucket 'no-such-bucket'.* Create the bucket"
        ):
            call()


def test_creating_an_object_asks_s3_to_refuse_where_there_is_one() -> None:
    pytest.importorskip("s3fs", reason='needs pip install "vibe-store[s3]"')
    conditions: list[str | None] = []

    class Recorder(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            conditions.append(self.headers["If-None-Match"])
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "us-east-1"}
        options = {"key": "any", "secret": "any", "client_kwargs": client}
        storage = open_storage("s3://bucket/run", **options)
        storage.write("replaced", b"1")
        storage.write("created", b"1", overwrite=False)
        server.shutdown()
    assert conditions == [None, "*"]


def test_what_another_client_wrote_is_listed_and_read_at_once(bucket: Any) -> None:
    ours, others = bucket.open("fresh"), bucket.open("fresh")
    assert list(ours.list()) == []
    others.write("step_1/a", b"one")
    assert [blob.key for blob in ours.list("step_")] == ["step_1/a"]
    others.write("step_1/a", b"two!")
    assert [blob.size for blob in ours.list("step_1/")] == [4]
    assert ours.read("step_1/a") == b"two!"
    others.delete(["step_1/a"])
    assert list(ours.list()) == []
