"""How many requests storages on S3 and GCS make, in which order, and how many at once."""

import itertools
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.deadline import remaining, within
from vibe_store.errors import InvalidValueError
from vibe_store.registry import open_storage
from vibe_store.storage.calls import AT_ONCE

MB = 1 << 20
BIG = random.Random(1).randbytes(16 * MB + 5)


@pytest.fixture
def root() -> str:
    return os.urandom(8).hex()


@pytest.fixture
def storage(proxies: ModuleType, proxy: Any, bucket: Any, root: str) -> Any:
    return proxies.proxied(bucket, proxy, retry_backoff_secs=0.01).open(root)


# listing


@pytest.mark.proof
def test_a_list_takes_one_request_for_each_thousand_objects_and_only_when_they_are_asked_for(
    storage: Any, proxy: Any, bucket: Any, root: str
) -> None:
    keys = sorted(f"{number:x}/é" for number in range(1001))
    direct = bucket.open(root)
    for key in keys:
        direct.write(key, b"")
    listing = storage.list()
    assert proxy.requests == []
    assert next(listing).key == keys[0]
    assert len(proxy.requests) == 1
    assert [blob.key for blob in itertools.islice(listing, 999)] == keys[1:1000]
    assert len(proxy.requests) == 1
    assert [blob.key for blob in listing] == keys[1000:]
    assert len(proxy.requests) == 2


def test_no_cache_of_the_filesystem_is_filled(storage: Any, tmp_path: Path) -> None:
    storage.write("a/b", b"1")
    list(storage.list())
    storage.read("a/b")
    storage.get("a/b", tmp_path / "target")
    assert len(storage.fs.dircache) == 0


def test_the_marker_of_a_folder_is_no_object(s3: Any, root: str) -> None:
    client = s3.boto3_client()
    for key in ("", "folder/"):
        client.put_object(Bucket="bucket", Key=f"{root}/{key}")
    storage = s3.open(root)
    storage.write("folder/k", b"1")
    assert [blob.key for blob in storage.list()] == ["folder/k"]


def test_a_list_says_when_other_bytes_were_written(storage: Any) -> None:
    versions = set()
    for data in (b"1", b"2", b"3"):
        storage.write("k", data)
        (blob,) = storage.list()
        (again,) = storage.list()
        assert blob.version == again.version
        versions.add(blob.version)
    assert len(versions) == 3
    assert None not in versions


# how many requests


def test_small_objects_take_one_request_each_way(storage: Any, proxy: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("calculation", "checked"), [({}, True), ({"request_checksum_calculation": "when_required"}, False)]
)
def test_a_large_object_is_checked_by_the_store_unless_the_options_say_otherwise(
    s3: Any, root: str, tmp_path: Path, calculation: dict[str, str], checked: bool
) -> None:
    (tmp_path / "file").write_bytes(BIG)
    options = {**s3.storage_options, "config_kwargs": calculation}
    open_storage(f"{s3.url}/{root}", **options).put(tmp_path / "file", "big")
    about = s3.boto3_client().head_object(Bucket="bucket", Key=f"{root}/big", ChecksumMode="ENABLED")
    assert ("ChecksumCRC32" in about) is checked


MEASURE = """
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


@pytest.mark.proof
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory")
@pytest.mark.parametrize("way", ["put", "get"])
def test_a_transfer_holds_no_more_than_a_part_for_each_request_in_memory(
    bucket: Any, root: str, tmp_path: Path, way: str
) -> None:
    size = 20 * AT_ONCE * MB
    (tmp_path / "small").write_bytes(b"small")
    with (tmp_path / "big").open("wb") as file:
        file.truncate(size)
    if way == "get":
        bucket.open(root).put(tmp_path / "big", "big")
    what = json.dumps([f"{bucket.url}/{root}", bucket.storage_options, way, str(tmp_path)])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, what], check=True, capture_output=True, text=True
    )
    assert int(ran.stdout) < AT_ONCE * 8 * MB + 48 * MB < size


def test_all_transfers_of_a_storage_together_are_so_many_at_once(
    storage: Any, proxy: Any, tmp_path: Path
) -> None:
    for number in range(12):
        (tmp_path / f"{number}").write_bytes(bytes(MB))  # smaller ones are not counted
    storage.list()
    proxy.latency_secs = 0.05
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda number: storage.put(tmp_path / f"{number}", f"{number}"), range(12)))
    puts = proxy.requests
    most = max(sum(other.start <= each.start < other.end for other in puts) for each in puts)
    assert 1 < most <= AT_ONCE


def test_an_object_that_is_replaced_while_it_is_fetched_comes_whole(
    storage: Any, proxy: Any, bucket: Any, root: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(BIG)
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
    proxies: ModuleType, proxy: Any, bucket: Any, root: str, tmp_path: Path
) -> None:
    storage = proxies.proxied(bucket, proxy, retry_attempts=2, retry_backoff_secs=0.01).open(root)
    storage.write("k", b"0123456789")
    proxy.faults = lambda *_: proxies.Fault("cut answer")
    for call in (lambda: storage.get("k", tmp_path / "target"), lambda: storage.read("k")):
        with pytest.raises(ConnectionError, match="failed 2 times"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_read_goes_to_the_store_every_time(storage: Any, bucket: Any, root: str) -> None:
    other = bucket.open(root)
    for data in (b"1", b"22", b"333"):
        other.write("k", data)
        assert storage.read("k") == data
        assert storage.read("k", 0, 9) == data
    other.delete(["k"])
    with pytest.raises(FileNotFoundError):
        storage.read("k", 5, 5)


# options


def test_the_users_own_retries_and_timeouts_win(s3: Any, gcs: Any) -> None:
    config = {"retries": {"max_attempts": 7}, "read_timeout": 99}
    storage: Any = open_storage("s3://bucket/run", **{**s3.storage_options, "config_kwargs": config})
    assert storage.fs.config_kwargs["retries"] == {"max_attempts": 7}
    assert storage.fs.config_kwargs["read_timeout"] == 99
    storage = open_storage("gs://bucket/run", **{**gcs.storage_options, "requests_timeout": 99})
    assert storage.fs.requests_timeout == 99


@pytest.mark.parametrize("options", [{"retry_attempts": 0}, {"retry_backoff_secs": -1}])
def test_retries_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    pytest.importorskip("s3fs", reason='needs pip install "vibe-store[s3]"')
    with pytest.raises(InvalidValueError, match="retry_"):
        open_storage("s3://bucket/run", **options)


def test_the_session_of_an_upload_is_in_no_error_and_no_log(
    gcs: Any, proxies: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "source").write_bytes(BIG)
    with proxies.proxy(gcs.server) as proxy:
        storage = proxies.proxied(gcs, proxy, retry_attempts=2, retry_backoff_secs=0.01).open("secret")
        proxy.faults = lambda index, _: proxies.Fault("status", 403) if index else None
        with caplog.at_level(logging.INFO), pytest.raises(PermissionError, match="Forbidden: ") as caught:
            storage.put(tmp_path / "source", "k")
        session = proxy.requests[1].query.rpartition("upload_id=")[2]
    shown, error = caplog.text, caught.value
    while error is not None:
        shown += f"{error} {error!r} {json.dumps(getattr(error, '__notes__', []))}"
        error = error.__cause__ or error.__context__
    assert session
    assert session not in shown


# the deadline


def test_the_earlier_of_two_deadlines_holds() -> None:
    assert remaining() is None
    with within(100):
        with within(1):
            assert 0 < (remaining() or 0) <= 1
            with within(50):
                assert 0 < (remaining() or 0) <= 1
        assert 90 < (remaining() or 0) <= 100
    assert remaining() is None


def test_a_deadline_that_has_passed_leaves_nothing() -> None:
    with within(-1):
        assert remaining() == 0
