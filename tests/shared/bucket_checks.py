"""What every storage on an object store owes its users when requests fail, and what its transfers may cost.

A test module subclasses the two classes. It needs the fixtures ``bucket`` and ``s3``, each a
:class:`bucket.Bucket`, and ``proxy``, a proxy of ``proxy.py`` in front of the server of ``bucket``.
"""

import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bucket import Bucket
from proxy import Fault, Proxy, Request, run_proxy

from vibe_store.deadline import within
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.calls import AT_ONCE

MB = 1 << 20
BIG = random.Random(0).randbytes(16 * MB + 1)
"""More than goes up in one request to most stores, and comes down in one from any."""

_PART = 8 * MB


def keys_of(storage: StorageBackend) -> list[str]:
    return [blob.key for blob in storage.list()]


def uploads_of(bucket: Bucket, storage: StorageBackend) -> list[Any]:
    return bucket.uploads(storage.url.removeprefix(f"{bucket.url}/"))


def methods_of(proxy: Proxy) -> list[str]:
    return [request.method for request in proxy.requests]


def completes(request: Request) -> bool:
    """Whether a request is the last of an upload in parts."""
    return (request.method == "POST" and "uploadId" in request.query) or "blocklist" in request.query


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


class _Checks:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """A local file with the bytes ``BIG``."""
        file = tmp_path / "source"
        file.write_bytes(BIG)
        return file

    @pytest.fixture
    def root(self) -> str:
        """The path of a root that is empty."""
        return f"{os.urandom(8).hex()}/root"

    @pytest.fixture
    def in_parts(self, bucket: Bucket) -> Bucket:
        """A bucket to which a large file goes up in parts. Override it where some kinds do otherwise."""
        return bucket


def _create(storage: StorageBackend, _: Path) -> None:
    with suppress(FileExistsError):  # what this very call created, when the answer to it was lost
        storage.write("created", b"new", overwrite=False)
    assert storage.read("created") == b"new"


def _put_small(storage: StorageBackend, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    storage.put(tmp_path / "small", "small")
    assert storage.read("small") == b"small"


def _put_big(storage: StorageBackend, tmp_path: Path) -> None:
    storage.put(tmp_path / "source", "big")


def _get_big(storage: StorageBackend, tmp_path: Path) -> None:
    (tmp_path / "target").unlink(missing_ok=True)
    storage.get("big", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == BIG


def _write(storage: StorageBackend, _: Path) -> None:
    storage.write("written", b"bytes")
    assert storage.read("written") == b"bytes"


def _read(storage: StorageBackend, _: Path) -> None:
    assert storage.read("written", 1, 3) == b"yt"


def _delete(storage: StorageBackend, _: Path) -> None:
    storage.delete(["written", "missing"])
    assert "written" not in keys_of(storage)


def _delete_one(storage: StorageBackend, _: Path) -> None:
    storage.delete(["written"])


def _list(storage: StorageBackend, _: Path) -> None:
    assert keys_of(storage) == ["big", "written"]


OPERATIONS: dict[str, Callable[[StorageBackend, Path], None]] = {
    "list": _list,
    "read": _read,
    "write": _write,
    "create": _create,
    "put small": _put_small,
    "put big": _put_big,
    "get": _get_big,
    "delete": _delete,
    "delete one": _delete_one,
}

FAULTS = [
    Fault("status", 503),
    Fault("status", 500),
    Fault("status", 502),
    Fault("status", 429),
    Fault("reset"),
    Fault("reset after"),
    Fault("silence"),
    Fault("silence after"),
    Fault("cut request"),
    Fault("cut answer"),
]


def _name(fault: Fault) -> str:
    return f"{fault.how} {fault.status}" if fault.how == "status" else fault.how


class FailureChecks(_Checks):
    """What a storage does when requests fail, each through a real proxy that makes them fail."""

    @pytest.fixture
    def storage(self, bucket: Bucket, proxy: Proxy, root: str) -> StorageBackend:
        """A storage through the proxy, which is tried again at once and not long waited for."""
        options = {"retry_backoff_secs": 0.01, **bucket.patience(bucket.answers_within_secs)}
        return bucket.through(proxy, **options).open(root)

    @pytest.mark.proof
    @pytest.mark.parametrize("fault", FAULTS, ids=_name)
    def test_whatever_request_fails_once_every_operation_succeeds_and_its_bytes_are_right(
        self, storage: StorageBackend, proxy: Proxy, source: Path, tmp_path: Path, fault: Fault
    ) -> None:
        storage.put(source, "big")
        for name, operation in OPERATIONS.items():
            storage.delete(["created", "small"])
            storage.write("written", b"bytes")
            failed: list[str] = []

            def fail_once(_: int, request: Request, failed: list[str] = failed) -> Fault | None:
                # Each distinct request once: an upload in parts has several kinds of them.
                words = ("partNumber", "uploadId", "comp=block&", "blocklist")
                what = f"{request.method} {[word in request.query for word in words]}"
                if what in failed or (fault.how == "cut request" and not request.size):
                    return None
                failed.append(what)
                return fault

            proxy.faults = fail_once
            operation(storage, tmp_path)
            assert failed or fault.how == "cut request", name
            proxy.clear()
            if name == "put big":
                _get_big(storage, tmp_path)

    def test_two_conditional_writes_that_meet_on_s3_are_tried_again(self, s3: Bucket, root: str) -> None:
        with run_proxy(s3.server) as proxy:
            storage = s3.through(proxy, retry_backoff_secs=0.01).open(root)
            storage.delete(["k"])  # whatever a client asks first
            proxy.clear()
            proxy.faults = lambda index, _: Fault("status", 409) if index == 0 else None
            storage.write("k", b"1", overwrite=False)
            assert methods_of(proxy) == ["PUT", "PUT"]
            headers = [{name.lower(): text for name, text in each.headers.items()} for each in proxy.requests]
            assert [each.get("if-none-match") for each in headers] == ["*", "*"]

    # What does not pass.

    @pytest.mark.parametrize(
        ("status", "error", "says"),
        [(403, PermissionError, "Access was denied"), (400, OSError, "was refused, and would be again")],
    )
    @pytest.mark.parametrize("name", ["list", "read", "write", "put big", "delete one"])
    @pytest.mark.usefixtures("source")
    def test_a_refusal_fails_at_once_with_a_sentence(
        self,
        storage: StorageBackend,
        proxy: Proxy,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        name: str,
        status: int,
        error: type[OSError],
        says: str,
    ) -> None:
        proxy.faults = lambda *_: Fault("status", status)
        with caplog.at_level(logging.WARNING), pytest.raises(error, match=says) as caught:
            OPERATIONS[name](storage, tmp_path)
        tried = [(request.method, request.path, request.query) for request in proxy.requests]
        assert len(tried) == len(set(tried))
        assert storage.url in str(caught.value)
        assert "This is what the test asked for." in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caplog.records == []  # and no traceback of a client

    def test_a_store_that_never_recovers_ends_in_a_sentence_after_all_attempts(
        self, bucket: Bucket, proxy: Proxy, root: str, source: Path
    ) -> None:
        storage = bucket.through(proxy, retry_attempts=3, retry_backoff_secs=0.01).open(root)
        proxy.faults = lambda *_: Fault("status", 503)
        with pytest.raises(ConnectionError, match=r"Writing 'k' in '.*/root' failed 3 times in a row.*503"):
            storage.write("k", b"1")
        assert len(proxy.requests) == 3
        with pytest.raises(ConnectionError, match=r"Writing 'big' in '.*/root' failed 3 times in a row.*503"):
            storage.put(source, "big")
        proxy.clear()
        storage.write("k", b"1")
        assert storage.read("k") == b"1"

    def test_a_server_that_is_not_there_is_told_with_the_reason(self, bucket: Bucket) -> None:
        nowhere = SimpleNamespace(url="http://127.0.0.1:9")
        storage = bucket.through(nowhere, retry_attempts=2, retry_backoff_secs=0.01).open("root")
        with pytest.raises(ConnectionError, match=r"failed 2 times in a row.*127\.0\.0\.1:9"):
            storage.read("k")

    # The deadline, and Ctrl-C.

    def test_a_store_that_takes_and_never_answers_ends_at_the_deadline(
        self, bucket: Bucket, proxy: Proxy, root: str, source: Path
    ) -> None:
        storage = bucket.through(proxy).open(root)
        proxy.faults = lambda *_: Fault("silence")
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

    def test_nothing_is_sent_after_the_deadline(self, storage: StorageBackend, proxy: Proxy) -> None:
        with within(0), pytest.raises(TimeoutError, match="by the deadline, after 0 failed attempts"):
            storage.read("k")
        assert proxy.requests == []

    def test_without_a_deadline_a_request_that_gets_no_answer_ends_too(
        self, bucket: Bucket, proxy: Proxy, root: str
    ) -> None:
        options = {"retry_attempts": 2, "retry_backoff_secs": 0.01, **bucket.patience(0.2)}
        storage = bucket.through(proxy, **options).open(root)
        proxy.faults = lambda *_: Fault("silence")
        with pytest.raises(ConnectionError, match="failed 2 times"):
            storage.read("k")

    def test_ctrl_c_ends_a_get_at_once_and_leaves_nothing(
        self, bucket: Bucket, proxy: Proxy, root: str, source: Path, tmp_path: Path
    ) -> None:
        storage = bucket.through(proxy, **bucket.patience(60.0)).open(root)
        storage.put(source, "old")
        folder = tmp_path / "folder"
        folder.mkdir()
        proxy.clear()
        reached = threading.Event()

        def stall(index: int, _: Request) -> Fault | None:
            if index == 0:
                return None
            reached.set()
            return Fault("silence")

        proxy.faults = stall
        took = interrupted(reached, lambda: storage.get("old", folder / "target"))
        assert took < 5
        assert list(folder.iterdir()) == []

    # Uploads in parts.

    @pytest.mark.parametrize("what", ["second part", "completion"])
    def test_an_upload_that_fails_is_aborted(
        self, in_parts: Bucket, root: str, source: Path, what: str
    ) -> None:
        def refuse(_: int, request: Request) -> Fault | None:
            part = "partNumber=2" in request.query or "comp=block&" in request.query
            return Fault("status", 503) if (completes(request) if what == "completion" else part) else None

        with run_proxy(in_parts.server) as proxy:
            proxy.faults = refuse
            options = {"retry_attempts": 2, "retry_backoff_secs": 0.01}
            with pytest.raises(ConnectionError, match=r"2 times.*503"):
                in_parts.through(proxy, **options).open(root).put(source, "k")
        direct = in_parts.open(root)
        assert uploads_of(in_parts, direct) == []
        assert keys_of(direct) == []

    def test_an_upload_of_a_file_that_becomes_shorter_is_aborted(
        self, in_parts: Bucket, root: str, source: Path
    ) -> None:
        os.truncate(source, 20 * _PART)  # more parts than are under way at once

        def shorten(index: int, _: Request) -> None:
            if index == 0:
                os.truncate(source, MB)

        with run_proxy(in_parts.server) as proxy:
            proxy.faults = shorten
            with pytest.raises(OSError, match="became shorter"):
                in_parts.through(proxy).open(root).put(source, "k")
        direct = in_parts.open(root)
        assert uploads_of(in_parts, direct) == []
        assert keys_of(direct) == []

    def test_a_completed_upload_whose_answer_was_lost_is_taken_for_done(
        self, in_parts: Bucket, root: str, source: Path
    ) -> None:
        lost: list[Request] = []

        def lose(_: int, request: Request) -> Fault | None:
            if not completes(request):
                return None
            lost.append(request)
            if len(lost) == 1:
                return Fault("reset after")
            # Amazon forgets an upload in the end; moto does not.
            return Fault("status", 404, "NoSuchUpload") if in_parts.url.startswith("s3") else None

        with run_proxy(in_parts.server) as proxy:
            proxy.faults = lose
            in_parts.through(proxy, retry_backoff_secs=0.01).open(root).put(source, "k")
        assert len(lost) == 2
        assert in_parts.open(root).read("k") == BIG


_MEASURE = """
import json, sys
from pathlib import Path
from vibe_store.registry import open_storage

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

url, options, way, folder = json.loads(sys.argv[1])
storage, folder = open_storage(url, **options), Path(folder)
storage.put(folder / "small", "small")
storage.get("small", folder / "target")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = resident("VmRSS")
storage.put(folder / "big", "big") if way == "put" else storage.get("big", folder / "target")
print(resident("VmHWM") - before)
"""


class TransferChecks(_Checks):
    """How many requests a storage makes, in which order and how many at once, and what memory they take."""

    copies_of_a_part: int = 1
    """How often the client holds the bytes of a part that is under way."""

    @pytest.fixture
    def storage(self, bucket: Bucket, proxy: Proxy, root: str) -> StorageBackend:
        """A storage through the proxy."""
        return bucket.through(proxy, retry_backoff_secs=0.01).open(root)

    @pytest.mark.proof
    def test_a_list_takes_one_request_for_each_thousand_objects_and_only_when_they_are_asked_for(
        self, storage: StorageBackend, proxy: Proxy, bucket: Bucket, root: str
    ) -> None:
        keys = sorted(f"{number:x}/é" for number in range(1001))
        direct = bucket.open(root)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda key: direct.write(key, b""), keys))
        listing = storage.list()
        assert proxy.requests == []
        assert next(listing).key == keys[0]
        assert len(proxy.requests) == 1
        assert [blob.key for blob in itertools.islice(listing, 999)] == keys[1:1000]
        assert len(proxy.requests) == 1
        assert [blob.key for blob in listing] == keys[1000:]
        assert len(proxy.requests) == (1 if bucket.url.startswith("az") else 2)  # Azure gives 5000 at once
        proxy.clear()
        assert [blob.key for blob in storage.list("3e8")] == ["3e8/é"]
        assert [blob.key for blob in storage.list("ff")] == ["ff/é"]
        assert len(proxy.requests) == 2  # which begin close to what is asked for

    def test_a_list_says_when_other_bytes_were_written(self, storage: StorageBackend) -> None:
        versions = set()
        for data in (b"1", b"2", b"3"):
            storage.write("k", data)
            (blob,) = storage.list()
            (again,) = storage.list()
            assert blob.version == again.version
            versions.add(blob.version)
        assert len(versions) == 3
        assert None not in versions

    def test_small_objects_take_one_request_each_way(
        self, storage: StorageBackend, proxy: Proxy, tmp_path: Path
    ) -> None:
        (tmp_path / "source").write_bytes(b"small")
        calls: list[Callable[[], object]] = [
            lambda: storage.put(tmp_path / "source", "k"),
            lambda: storage.get("k", tmp_path / "target"),
            lambda: storage.read("k"),
            lambda: storage.read("k", 1, 3),
            lambda: storage.write("k", b"1"),
            lambda: storage.write("new", b"1", overwrite=False),
            lambda: storage.delete(["k"]),
        ]
        for call in calls:
            proxy.clear()
            call()
            assert len(proxy.requests) == 1
        assert (tmp_path / "target").read_bytes() == b"small"

    def test_a_read_from_far_on_to_an_end_that_is_not_said_has_its_time_too(
        self, storage: StorageBackend
    ) -> None:
        storage.write("k", b"1")
        assert storage.read("k", 1 << 30) == b""

    def test_transfers_of_many_files_are_so_many_at_once(
        self, storage: StorageBackend, proxy: Proxy, tmp_path: Path
    ) -> None:
        for number in range(12):
            (tmp_path / f"{number}").write_bytes(bytes(MB))  # smaller ones are not counted
        proxy.latency_secs = 0.05
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda number: storage.put(tmp_path / f"{number}", f"{number}"), range(12)))
        assert 1 < _most_at_once(proxy.requests) <= AT_ONCE

    def test_the_parts_of_one_file_are_so_many_at_once(
        self, in_parts: Bucket, root: str, tmp_path: Path
    ) -> None:
        with (tmp_path / "big").open("wb") as file:
            file.truncate(20 * _PART)
        with run_proxy(in_parts.server) as proxy:
            proxy.latency_secs = 0.05
            in_parts.through(proxy).open(root).put(tmp_path / "big", "big")
            parts = [request for request in proxy.requests if request.size > MB]
        assert 1 < _most_at_once(parts) <= AT_ONCE

    @pytest.mark.proof
    @pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory"
    )
    @pytest.mark.parametrize("way", ["put", "get"])
    def test_a_transfer_holds_no_more_than_a_part_for_each_request_in_memory(
        self, bucket: Bucket, root: str, tmp_path: Path, way: str
    ) -> None:
        most = self.copies_of_a_part * AT_ONCE * _PART + 48 * MB
        size = most + 64 * MB
        (tmp_path / "small").write_bytes(b"small")
        with (tmp_path / "big").open("wb") as file:
            file.truncate(size)
        storage = bucket.open(root)
        if way == "get":
            storage.put(tmp_path / "big", "big")
        what = json.dumps([storage.url, bucket.storage_options, way, str(tmp_path)])
        command = [sys.executable, "-W", "ignore", "-c", _MEASURE, what]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert int(ran.stdout) < most
        if way == "put":
            assert [blob.size for blob in storage.list("big")] == [size]

    def test_an_object_that_is_replaced_while_it_is_fetched_comes_whole(
        self, storage: StorageBackend, proxy: Proxy, bucket: Bucket, root: str, source: Path, tmp_path: Path
    ) -> None:
        storage.put(source, "k")
        newer = bytes(reversed(BIG))
        source.write_bytes(newer)
        other = bucket.open(root)
        proxy.clear()

        def replace(index: int, _: object) -> None:
            if index == 1:
                other.put(source, "k")

        proxy.faults = replace
        storage.get("k", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == newer
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]

    def test_a_download_that_always_ends_early_is_never_taken_for_whole(
        self, bucket: Bucket, proxy: Proxy, root: str, tmp_path: Path
    ) -> None:
        storage = bucket.through(proxy, retry_attempts=2, retry_backoff_secs=0.01).open(root)
        storage.write("k", b"0123456789")
        proxy.faults = lambda *_: Fault("cut answer")
        for call in (lambda: storage.get("k", tmp_path / "target"), lambda: storage.read("k")):
            with pytest.raises(ConnectionError, match="failed 2 times"):
                call()
        assert list(tmp_path.iterdir()) == []


def _most_at_once(requests: list[Request]) -> int:
    return max(sum(other.start <= each.start < (other.end or 0) for other in requests) for each in requests)
