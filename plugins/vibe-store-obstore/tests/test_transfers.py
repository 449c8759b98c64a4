"""How many requests the storages make and how much memory they take, and what they list."""

import itertools
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vibe_store.storage.calls import AT_ONCE

pytestmark = pytest.mark.proof

MB = 1 << 20
BIG = random.Random(1).randbytes(16 * MB + 5)


@pytest.fixture
def open_root(bucket: Any) -> Callable[[], Any]:
    opener: Callable[[], Any] = bucket.opener()
    return opener


@pytest.fixture
def storage(bucket: Any, proxy: Any, open_root: Callable[[], Any]) -> Any:
    path = open_root().url.removeprefix(f"{bucket.url}/")
    return bucket.through(proxy, retry_backoff_secs=0.01).open(path)


# listing


def test_a_list_takes_one_request_for_each_thousand_objects_and_only_when_they_are_asked_for(
    storage: Any, proxy: Any, bucket: Any, open_root: Callable[[], Any]
) -> None:
    keys = sorted(f"{number:x}/é" for number in range(1001))
    direct = open_root()
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


def test_a_list_is_sorted_where_the_store_sorts_otherwise(open_root: Callable[[], Any]) -> None:
    storage = open_root()
    for key in ("😀", "\ufffd"):  # which Azurite lists in this order, that of UTF-16
        storage.write(key, b"")
    assert [blob.key for blob in storage.list()] == ["\ufffd", "😀"]


def test_a_name_that_obstore_cannot_list_is_told(bucket: Any, open_root: Callable[[], Any]) -> None:
    storage = open_root()
    storage.write("k", b"1")
    bucket.raw_set(f"{storage.url.removeprefix(f'{bucket.url}/')}/a//b", b"1")
    with pytest.raises(OSError, match="a//b"):
        list(storage.list())


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


def test_s3_removes_a_thousand_objects_in_one_request(s3: Any, proxies: Any) -> None:
    with proxies.proxy(s3.server) as proxy:
        storage = s3.through(proxy).opener()()
        for number in range(3):
            storage.write(f"{number}", b"")
        proxy.clear()
        storage.delete(f"{number}" for number in range(1000))
        assert [request.method for request in proxy.requests] == ["POST"]
        assert list(storage.list()) == []


def test_creating_an_object_asks_the_store_to_refuse_where_there_is_one(
    storage: Any, proxy: Any, bucket: Any
) -> None:
    storage.write("replaced", b"1")
    storage.write("created", b"1", overwrite=False)
    header = "x-goog-if-generation-match" if bucket.url.startswith("gs") else "if-none-match"
    asked = [{name.lower(): value for name, value in each.headers.items()} for each in proxy.requests]
    assert [each.get(header) for each in asked] == [None, "0" if bucket.url.startswith("gs") else "*"]


def test_all_transfers_of_a_storage_together_are_so_many_at_once(
    storage: Any, proxy: Any, tmp_path: Path
) -> None:
    for number in range(12):
        (tmp_path / f"{number}").write_bytes(bytes(MB))  # smaller ones are not counted
    (tmp_path / "big").write_bytes(bytes(20 * 8 * MB))
    proxy.latency_secs = 0.05
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda number: storage.put(tmp_path / f"{number}", f"{number}"), range(12)))
    small, proxy.requests = proxy.requests, []
    storage.put(tmp_path / "big", "big")
    for puts in (small, [request for request in proxy.requests if request.size > MB]):
        most = max(sum(other.start <= each.start < other.end for other in puts) for each in puts)
        assert 1 < most <= AT_ONCE


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory")
@pytest.mark.parametrize("way", ["put", "get"])
def test_a_transfer_holds_no_more_than_a_part_for_each_request_in_memory(
    bucket: Any, open_root: Callable[[], Any], tmp_path: Path, way: str
) -> None:
    size = 24 * AT_ONCE * MB
    (tmp_path / "small").write_bytes(b"small")
    with (tmp_path / "big").open("wb") as file:
        file.truncate(size)
    storage = open_root()
    if way == "get":
        storage.put(tmp_path / "big", "big")
    what = json.dumps([storage.url, bucket.storage_options, way, str(tmp_path)])
    ran = subprocess.run([sys.executable, "-c", MEASURE, what], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 2 * AT_ONCE * 8 * MB + 48 * MB < size
    if way == "put":
        assert [blob.size for blob in storage.list("big")] == [size]


def test_an_object_that_is_replaced_while_it_is_fetched_comes_whole(
    storage: Any, proxy: Any, open_root: Callable[[], Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(BIG)
    storage.put(source, "k")
    newer = bytes(reversed(BIG))
    source.write_bytes(newer)
    other = open_root()
    proxy.clear()

    def replace(index: int, _: object) -> None:
        if index == 1:
            other.put(source, "k")

    proxy.faults = replace
    storage.get("k", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == newer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_of_two_processes_that_create_one_key_one_succeeds(bucket: Any, open_root: Callable[[], Any]) -> None:
    storage = open_root()
    program = textwrap.dedent("""
        import json, sys
        from vibe_store import open_storage
        url, options, index = json.loads(sys.argv[1])
        storage = open_storage(url, **options)
        list(storage.list())
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(30):
            try:
                storage.write(f"{number}/k", str(index).encode(), overwrite=False)
                print(number)
            except FileExistsError:
                pass
    """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, json.dumps([storage.url, bucket.storage_options, index])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    won = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(int(number) for numbers in won for number in numbers) == list(range(30))
    for index, numbers in enumerate(won):
        assert {storage.read(f"{number}/k") for number in numbers} <= {b"%d" % index}


def test_a_process_that_ends_right_after_a_request_ends_well(s3: Any) -> None:
    program = textwrap.dedent("""
        import json, sys
        from vibe_store import open_storage
        url, options = json.loads(sys.argv[1])
        open_storage(url, **options).write("k", b"1")
    """)
    arguments = [sys.executable, "-c", program, json.dumps([f"{s3.url}/ending", s3.storage_options])]

    def status(_: int) -> int:
        return subprocess.run(arguments, check=False).returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(status, range(32))) == [0] * 32
