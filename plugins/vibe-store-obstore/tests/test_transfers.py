"""How many requests the storages make and how much memory they take, and what they list."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from bucket_checks import TransferChecks
from proxy import run_proxy

pytestmark = pytest.mark.proof


class TestTransfers(TransferChecks):
    copies_of_a_part = 2  # one of them the client's own


@pytest.fixture
def open_root(bucket: Any) -> Callable[[], Any]:
    opener: Callable[[], Any] = bucket.opener()
    return opener


@pytest.fixture
def storage(bucket: Any, proxy: Any, open_root: Callable[[], Any]) -> Any:
    path = open_root().url.removeprefix(f"{bucket.url}/")
    return bucket.through(proxy, retry_backoff_secs=0.01).open(path)


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


def test_s3_removes_a_thousand_objects_in_one_request(s3: Any) -> None:
    with run_proxy(s3.server) as proxy:
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
