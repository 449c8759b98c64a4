"""Every promise of StorageBackend, held by every storage."""

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.object_store import ObjectStore

Opener = Callable[[], StorageBackend]

BIG = bytes(range(256)) * 20_000 + b"end"


def keys_of(storage: StorageBackend, prefix: str = "") -> list[str]:
    return [blob.key for blob in storage.list(prefix)]


def run_together(count: int, action: Callable[[int], object]) -> list[object]:
    """Call ``action(i)`` in ``count`` threads that start at once; return what each returned or raised."""
    barrier = threading.Barrier(count)

    def call(index: int) -> object:
        barrier.wait()
        try:
            return action(index)
        except Exception as error:  # noqa: BLE001 - the caller looks at whatever was raised
            return error

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet where they seldom do
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(call, range(count)))
    finally:
        sys.setswitchinterval(interval)


# write and read


def test_what_was_written_is_read(storage: StorageBackend) -> None:
    assert storage.write("a/b/c", b"bytes") is None
    assert storage.read("a/b/c") == b"bytes"


@pytest.mark.parametrize("data", [b"", b"\0", BIG], ids=["empty", "nul", "big"])
def test_bytes_of_any_length_come_back(storage: StorageBackend, data: bytes) -> None:
    storage.write("k", data)
    assert storage.read("k") == data
    assert [(blob.key, blob.size) for blob in storage.list()] == [("k", len(data))]


def test_a_write_replaces_the_whole_object(storage: StorageBackend) -> None:
    storage.write("k", b"something long")
    storage.write("k", b"short")
    assert storage.read("k") == b"short"


def test_creating_an_object_that_exists_is_refused_and_leaves_it(exact_storage: StorageBackend) -> None:
    exact_storage.write("a/k", b"first", overwrite=False)
    with pytest.raises(FileExistsError, match="a/k"):
        exact_storage.write("a/k", b"second", overwrite=False)
    assert exact_storage.read("a/k") == b"first"
    assert keys_of(exact_storage) == ["a/k"]


def test_of_sixteen_threads_that_create_one_key_one_succeeds(exact_opener: Opener) -> None:
    for attempt in range(10):
        key = f"step_{attempt}/manifest.json"
        results = run_together(
            16, lambda index, key=key: exact_opener().write(key, b"%d" % index * 500, overwrite=False)
        )
        winners = [index for index, result in enumerate(results) if result is None]
        assert len(winners) == 1
        assert exact_opener().read(key) == b"%d" % winners[0] * 500
        assert all(isinstance(result, FileExistsError) for result in results if result is not None)


def test_a_reader_never_sees_part_of_an_object_that_is_replaced(opener: Opener) -> None:
    storage = opener()
    versions = {bytes([letter]) * 300_000 for letter in b"abcd"}
    storage.write("k", min(versions))
    stop = threading.Event()

    def write(data: bytes) -> None:
        while not stop.is_set():
            opener().write("k", data)

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, data) for data in sorted(versions)[:2]]
        try:
            seen = {opener().read("k") for _ in range(60)}
            sizes = {blob.size for _ in range(60) for blob in opener().list()}
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    assert seen <= versions
    assert sizes <= {300_000}
    assert keys_of(storage) == ["k"]


def test_the_callers_buffer_is_not_kept(storage: StorageBackend) -> None:
    buffer = bytearray(b"before")
    storage.write("k", buffer)
    buffer[:] = b"after!"
    assert storage.read("k") == b"before"


def test_threads_write_and_delete_in_shared_folders_without_disturbing_each_other(opener: Opener) -> None:
    storage = opener()

    def work(index: int) -> None:
        for turn in range(15):
            key = f"shared/{turn % 3}/{index}"
            storage.write(key, b"%d" % index)
            assert storage.read(key) == b"%d" % index
            storage.delete([key])

    assert run_together(8, work) == [None] * 8
    assert keys_of(storage) == []


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, None, b"0123456789"),
        (0, 4, b"0123"),
        (3, 7, b"3456"),
        (3, None, b"3456789"),
        (3, 3, b""),
        (7, 3, b""),
        (8, 99, b"89"),
        (8, 10**15, b"89"),
        (10, None, b""),
        (99, None, b""),
        (99, 200, b""),
        (0, 0, b""),
    ],
)
def test_a_range_gives_what_there_is_of_it(
    storage: StorageBackend, start: int, end: int | None, expected: bytes
) -> None:
    storage.write("k", b"0123456789")
    assert storage.read("k", start, end) == expected


@pytest.mark.parametrize(("start", "end"), [(-1, None), (0, -1)])
def test_a_range_that_counts_from_the_end_is_refused(
    storage: StorageBackend, start: int, end: int | None
) -> None:
    storage.write("k", b"0123456789")
    with pytest.raises(InvalidValueError, match="-1"):
        storage.read("k", start, end)


@pytest.mark.parametrize("window", [(), (1,), (0, 1), (2, 1)])
def test_reading_what_is_not_there_is_file_not_found(
    storage: StorageBackend, window: tuple[int, ...]
) -> None:
    with pytest.raises(FileNotFoundError, match="a/b"):
        storage.read("a/b", *window)
    storage.write("a", b"an object")
    with pytest.raises(FileNotFoundError, match="a/b"):
        storage.read("a/b", *window)


def test_a_folder_of_keys_is_no_object(storage: StorageBackend, tmp_path: Path) -> None:
    storage.write("a/b", b"x")
    with pytest.raises(FileNotFoundError, match="'a'"):
        storage.read("a")
    with pytest.raises(FileNotFoundError, match="'a'"):
        storage.get("a", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    storage.delete(["a"])
    assert keys_of(storage) == ["a/b"]


@pytest.mark.parametrize("exact_opener", ["local", "memory"], indirect=True)
def test_where_keys_are_paths_an_object_and_objects_below_it_cannot_both_be(
    exact_storage: StorageBackend,
) -> None:
    exact_storage.write("a/b", b"1")
    for overwrite in (True, False):
        with pytest.raises(NotADirectoryError, match="a/b/c"):
            exact_storage.write("a/b/c", b"2", overwrite=overwrite)
    with pytest.raises(IsADirectoryError, match="'a'"):
        exact_storage.write("a", b"3")
    assert keys_of(exact_storage) == ["a/b"]


# list


def test_nothing_is_there_before_the_first_write(opener: Opener, tmp_path: Path) -> None:
    assert keys_of(opener()) == []
    assert keys_of(opener(), "a/b") == []
    opener().delete(["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_is_text_and_not_a_folder(storage: StorageBackend) -> None:
    every = ["step_1/state", "step_10/manifest", "step_10/state", "step_2/state", "steps"]
    for key in every:
        storage.write(key, b"")
    assert keys_of(storage) == every
    assert keys_of(storage, "step_1") == every[:3]
    assert keys_of(storage, "step_1/") == every[:1]
    assert keys_of(storage, "step_10/state") == ["step_10/state"]
    assert keys_of(storage, "step_10/state/") == []
    assert keys_of(storage, "step") == every
    assert keys_of(storage, "x") == []
    assert keys_of(storage, "..") == []


def test_a_list_is_sorted_by_the_whole_key(storage: StorageBackend) -> None:
    every = ["a!b", "a-b/c", "a.b", "a/b", "a/b.c", "a/c/d", "a0", "B", "a b", "é", "aé/x", "日本/🦆"]
    for key in every:
        storage.write(key, b"")
    assert keys_of(storage) == sorted(every)
    assert keys_of(storage, "a") == sorted(key for key in every if key.startswith("a"))


def test_a_list_shows_size_and_time(storage: StorageBackend) -> None:
    before = time.time()
    storage.write("a/k", b"12345")
    (blob,) = storage.list()
    assert (blob.key, blob.size) == ("a/k", 5)
    assert before - 2 <= blob.modified <= time.time() + 2


def test_a_list_is_never_stale(opener: Opener) -> None:
    reader, writer = opener(), opener()
    assert keys_of(reader) == []
    writer.write("a/1", b"1")
    assert [(blob.key, blob.size) for blob in reader.list("a")] == [("a/1", 1)]
    writer.write("a/1", b"123")
    writer.write("a/2", b"")
    assert [(blob.key, blob.size) for blob in reader.list("a")] == [("a/1", 3), ("a/2", 0)]
    writer.delete(["a/1"])
    assert keys_of(reader, "a") == ["a/2"]
    with pytest.raises(FileNotFoundError):
        reader.read("a/1")


def test_a_list_that_is_being_read_stands_deletion(storage: StorageBackend) -> None:
    for number in range(20):
        storage.write(f"{number % 4}/{number}", b"")
    for blob in storage.list():
        storage.delete([blob.key])
    assert keys_of(storage) == []


# delete


def test_only_the_named_objects_are_removed(storage: StorageBackend) -> None:
    for key in ["a", "a.b", "ab", "b/a", "b/ab", "b/a.b/c"]:
        storage.write(key, b"")
    storage.delete(["a", "b/a"])
    assert keys_of(storage) == ["a.b", "ab", "b/a.b/c", "b/ab"]


def test_deleting_what_is_not_there_is_no_error(storage: StorageBackend) -> None:
    storage.write("a/b", b"")
    storage.delete(["a/c", "x/y", "a/b/c", "a/b", "a/b"])
    storage.delete(["a/b"])
    storage.delete([])
    assert keys_of(storage) == []


def test_the_keys_to_delete_may_come_from_a_list_of_the_same_storage(storage: StorageBackend) -> None:
    storage.write("a/b", b"")
    storage.write("a/c/d", b"")
    storage.delete(blob.key for blob in storage.list("a/"))
    assert keys_of(storage) == []


def test_one_bad_key_removes_nothing(storage: StorageBackend) -> None:
    storage.write("a", b"")
    with pytest.raises(InvalidValueError, match=r"\.\./a"):
        storage.delete(["a", "../a"])
    with pytest.raises(InvalidValueError, match="not one str"):
        storage.delete("a")
    assert keys_of(storage) == ["a"]


# put and get


@pytest.mark.parametrize("data", [b"", BIG], ids=["empty", "big"])
@pytest.mark.parametrize("move", [False, True])
def test_a_file_goes_in_and_comes_out(
    storage: StorageBackend, tmp_path: Path, data: bytes, move: bool
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    storage.put(source, "a/k", move=move)
    assert source.exists() is not move
    assert storage.read("a/k") == data
    storage.get("a/k", target)
    assert target.read_bytes() == data
    assert keys_of(storage) == ["a/k"]


@pytest.mark.parametrize("move", [False, True])
def test_a_put_replaces_the_object_and_keeps_its_own_bytes(
    storage: StorageBackend, tmp_path: Path, move: bool
) -> None:
    source = tmp_path / "source"
    storage.write("k", b"a longer object than before")
    source.write_bytes(b"new")
    storage.put(source, "k", move=move)
    source.write_bytes(b"changed afterwards")
    assert storage.read("k") == b"new"


def test_putting_a_file_that_is_not_there_names_it_and_changes_nothing(
    storage: StorageBackend, tmp_path: Path
) -> None:
    storage.write("k", b"old")
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        storage.put(tmp_path / "no-such-file", "k")
    assert storage.read("k") == b"old"


def test_a_get_replaces_the_target_and_leaves_nothing_else(storage: StorageBackend, tmp_path: Path) -> None:
    target = tmp_path / "made" / "target"
    storage.write("k", b"one")
    storage.get("k", target)
    storage.write("k", b"2")
    storage.get("k", target)
    assert target.read_bytes() == b"2"
    assert list(target.parent.iterdir()) == [target]


def test_a_get_of_what_is_not_there_leaves_the_target(storage: StorageBackend, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    with pytest.raises(FileNotFoundError, match="'k'"):
        storage.get("k", target)
    assert target.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_threads_that_get_one_object_each_get_it_whole(storage: StorageBackend, tmp_path: Path) -> None:
    storage.write("k", BIG)
    assert run_together(6, lambda index: storage.get("k", tmp_path / f"{index}")) == [None] * 6
    assert {(tmp_path / f"{index}").read_bytes() for index in range(6)} == {BIG}


# keys


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "..", "../a", "a/../../b", ".", "a\\b", "a\0", "C:/a", f"{TEMPORARY_PREFIX}1"],
)
def test_no_method_takes_what_is_no_key(storage: StorageBackend, tmp_path: Path, key: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    calls: list[Callable[[], object]] = [
        lambda: storage.read(key),
        lambda: storage.write(key, b""),
        lambda: storage.put(source, key, move=True),
        lambda: storage.get(key, source),
        lambda: storage.delete([key]),
    ]
    for call in calls:
        with pytest.raises(InvalidValueError):
            call()
    assert source.read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(InvalidValueError):
        storage.list("../")


@pytest.mark.parametrize(
    "key", ["日本/🦆 é.eqx", "e\u0301", "\u00e9", " a ", "a'b\"c", "%2e%2e/x", "*", "[a]?", "~", "#a"]
)
def test_a_key_is_taken_as_it_is(storage: StorageBackend, tmp_path: Path, key: str) -> None:
    storage.write(key, b"1")
    storage.write("other", b"")
    assert keys_of(storage) == sorted([key, "other"])
    assert keys_of(storage, key) == [key]
    assert storage.read(key) == b"1"
    (tmp_path / "source").write_bytes(b"22")
    storage.put(tmp_path / "source", key)
    storage.get(key, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"22"
    storage.delete([key])
    assert keys_of(storage) == ["other"]


@pytest.mark.parametrize("opener", ["local", "memory", "fsspec"], indirect=True)
def test_the_url_opens_the_same_storage_again(storage: StorageBackend) -> None:
    storage.write("a", b"1")
    assert type(storage)(storage.url).read("a") == b"1"
    assert storage.url in repr(storage)


# a model


NAMES = st.sampled_from(["a", "a.b", "ab", "step_1", "step_10", "é"])
KEYS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), KEYS, st.binary(max_size=20)),
    st.tuples(st.just("create"), KEYS, st.binary(max_size=20)),
    st.tuples(st.just("put"), KEYS, st.binary(max_size=20)),
    st.tuples(st.just("move"), KEYS, st.binary(max_size=20)),
    st.tuples(st.just("delete"), st.lists(KEYS, max_size=3), st.none()),
    st.tuples(st.just("list"), KEYS | st.just("") | st.just("step_"), st.none()),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, max_size=25))
def test_any_sequence_of_calls_does_what_a_dictionary_would(
    exact_opener: Opener, tmp_path: Path, operations: list[tuple[str, object, object]]
) -> None:
    storage = exact_opener()
    are_paths = not isinstance(storage, ObjectStore)
    storage.delete(keys_of(storage))
    model: dict[str, bytes] = {}
    source = tmp_path / "source"
    for name, subject, data in operations:
        if name == "delete":
            storage.delete(subject)
            for key in subject:
                model.pop(key, None)
        elif name == "list":
            expected = sorted(key for key in model if key.startswith(subject))
            assert keys_of(storage, subject) == expected
        else:
            key: str = subject
            collides = any(
                other == key or (are_paths and f"{max(key, other)}/".startswith(f"{min(key, other)}/"))
                for other in model
            )
            source.write_bytes(data)
            try:
                if name in {"put", "move"}:
                    storage.put(source, key, move=name == "move")
                else:
                    storage.write(key, data, overwrite=name == "write")
            except FileExistsError:
                assert name == "create"
                assert collides
            except (IsADirectoryError, NotADirectoryError):
                assert collides
                assert key not in model
            else:
                assert key in model or not collides
                model[key] = data
    assert {blob.key: storage.read(blob.key) for blob in storage.list()} == model
    assert [blob.size for blob in storage.list()] == [len(model[key]) for key in sorted(model)]


# what only some can


def test_of_four_processes_that_create_one_key_one_succeeds(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from vibe_store.storage.local import LocalStorage
        storage = LocalStorage(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(50):
            try:
                storage.write(f"{number}/k", sys.argv[2].encode(), overwrite=False)
                print(number)
            except FileExistsError:
                pass
    """)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "root"), str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    won = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(int(number) for numbers in won for number in numbers) == list(range(50))
    for index, numbers in enumerate(won):
        assert {(tmp_path / "root" / number / "k").read_text() for number in numbers} <= {str(index)}


def test_a_storage_that_cannot_create_conditionally_says_so_once_and_looks_first(tmp_path: Path) -> None:
    storage = FsspecStorage(f"file://{tmp_path}")
    assert not storage.creates_conditionally
    with pytest.warns(VibeStoreWarning, match="one writer at a time"):
        storage.write("k", b"1", overwrite=False)
    with pytest.raises(FileExistsError, match="'k'"):
        storage.write("k", b"2", overwrite=False)
    assert storage.read("k") == b"1"
