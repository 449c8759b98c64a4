"""StorageContract: every promise of StorageBackend, as tests that the author of a storage subclasses."""

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.interfaces import StorageBackend
from vibe_store.testing.promise import promised_by
from vibe_store.testing.threads import at_once, switching_often

__all__ = ["StorageContract", "StorageRoot"]

_BIG = bytes(range(256)) * 20_000 + b"end"
_CLOCK_MAY_DIFFER_BY_SECS = 60.0

_NO_KEYS = [
    "", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../../b", "a/./b", "a\\b", "..\\a", "a\0", "a\nb",
    "C:/a", f"{TEMPORARY_PREFIX}1",
]  # fmt: skip
_ODD_KEYS = [
    "日本/🦆 é.eqx", "e\u0301", "\u00e9", " a ", "a'b\"c", "%2e%2e/x", "a%20b", "*", "[a]?", "~", "#a",
    "a+b&c=d", "...", ".a", "A",
]  # fmt: skip
_RANGES: dict[tuple[int, int | None], bytes] = {
    (0, None): b"0123456789",
    (0, 4): b"0123",
    (3, 7): b"3456",
    (3, None): b"3456789",
    (9, 10): b"9",
    (3, 3): b"",
    (7, 3): b"",
    (8, 99): b"89",
    (8, 10**15): b"89",
    (10, None): b"",
    (99, None): b"",
    (99, 200): b"",
    (0, 0): b"",
}

_NAMES = st.sampled_from(["a", "a.b", "ab", "step_1", "step_10", "é"])
_KEYS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_OPERATIONS = st.one_of(
    *(st.tuples(st.just(how), _KEYS, st.binary(max_size=20)) for how in ("write", "create", "put", "move")),
    st.tuples(st.just("delete"), st.lists(_KEYS, max_size=3), st.just(b"")),
    st.tuples(st.just("list"), _KEYS | st.just("") | st.just("step_"), st.just(b"")),
)


@dataclass(frozen=True, slots=True)
class StorageRoot:
    """An empty root: how the storage under test opens it, and a back door to its objects.

    Attributes:
        open: opens the storage at this root, the same one each time.
        raw_set: stores an object, by its key and its bytes, without the storage under test: with the
            provider's own client, say.
        raw_get: returns the bytes of an object by its key, or None where there is none, likewise.
        creates_conditionally: whether ``write(overwrite=False)`` is sure to have one winner. A storage that
            cannot promise that looks first, and issues a ``VibeStoreWarning`` that it does.
        secrets: texts that no ``repr`` and no URL may show.
    """

    open: Callable[[], StorageBackend]
    raw_set: Callable[[str, bytes], object]
    raw_get: Callable[[str], bytes | None]
    creates_conditionally: bool = True
    secrets: tuple[str, ...] = ()


class StorageContract:
    """Every promise of :class:`~vibe_store.interfaces.StorageBackend`. Subclass it and override ``root``::

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def root(self, tmp_path):
            folder = tmp_path / "root"
            return StorageRoot(
                open=lambda: MyStorage(str(folder)), raw_set=..., raw_get=...
            )
    """

    @pytest.fixture
    def root(self) -> StorageRoot:
        """A new, empty root for each test. Override this."""
        raise NotImplementedError(f"{type(self).__name__} has to override the fixture 'root'.")

    @pytest.fixture
    def storage(self, root: StorageRoot) -> StorageBackend:
        """The storage under test, open."""
        return root.open()

    # --- The root.

    @promised_by("StorageBackend")
    def test_an_empty_root_holds_nothing(self, root: StorageRoot, tmp_path: Path) -> None:
        """A root to which nobody wrote yet can be listed, read and deleted from, and holds nothing."""
        assert _keys(root.open()) == []
        assert _keys(root.open(), "a/b") == []
        root.open().delete(["a"])
        with pytest.raises(FileNotFoundError):
            root.open().read("a")
        with pytest.raises(FileNotFoundError):
            root.open().get("a", tmp_path / "target")

    @promised_by("StorageBackend.url", "StorageBackend.concurrency")
    def test_a_storage_says_what_its_root_is(self, root: StorageRoot) -> None:
        """``url`` is text, the same each time the root is opened, and ``concurrency`` is at least 1."""
        one, other = root.open(), root.open()
        assert isinstance(one.url, str)
        assert one.url
        assert one.url == other.url
        assert one.concurrency >= 1

    @promised_by("StorageBackend")
    def test_no_secret_is_shown(self, root: StorageRoot) -> None:
        """Neither ``repr`` nor ``url`` shows a secret."""
        storage = root.open()
        shown = f"{storage!r} {storage.url}"
        assert [secret for secret in root.secrets if secret in shown] == []

    # --- The back door: what is stored is what everybody else sees, too.

    @promised_by("StorageBackend.write", "StorageBackend.put")
    def test_what_was_stored_is_at_its_key(self, root: StorageRoot, tmp_path: Path) -> None:
        """``write`` and ``put`` store these bytes, and nothing else, as the object of this key."""
        storage = root.open()
        storage.write("a/b.c", b"bytes")
        (tmp_path / "source").write_bytes(b"more bytes")
        storage.put(tmp_path / "source", "a/é")
        assert root.raw_get("a/b.c") == b"bytes"
        assert root.raw_get("a/é") == b"more bytes"
        storage.delete(["a/é"])
        assert root.raw_get("a/é") is None
        assert root.raw_get("a/b.c") == b"bytes"

    @promised_by("StorageBackend.list", "StorageBackend.read")
    def test_what_others_stored_is_seen_at_once(self, root: StorageRoot, tmp_path: Path) -> None:
        """What another program stored is listed and read at once, though this storage has looked before."""
        storage = root.open()
        assert _keys(storage) == []
        with pytest.raises(FileNotFoundError):
            storage.read("a/k")
        root.raw_set("a/k", b"theirs")
        assert [(blob.key, blob.size) for blob in storage.list("a/")] == [("a/k", 6)]
        assert storage.read("a/k") == b"theirs"
        root.raw_set("a/k", b"theirs, changed")
        assert [(blob.key, blob.size) for blob in storage.list()] == [("a/k", 15)]
        assert storage.read("a/k") == b"theirs, changed"
        assert storage.read("a/k", 8) == b"changed"
        storage.get("a/k", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == b"theirs, changed"

    @promised_by("StorageBackend.write")
    def test_what_others_stored_is_not_created_again(self, root: StorageRoot) -> None:
        """``write(overwrite=False)`` finds an object that another program stored, and leaves it."""
        storage = root.open()
        with _looking_first(root):
            storage.write("other", b"", overwrite=False)
            root.raw_set("a/k", b"theirs")
            with pytest.raises(FileExistsError):
                storage.write("a/k", b"ours", overwrite=False)
        assert root.raw_get("a/k") == b"theirs"

    @promised_by("StorageBackend.delete")
    def test_what_others_stored_is_deleted(self, root: StorageRoot) -> None:
        """``delete`` removes an object that another program stored, and no other."""
        root.raw_set("a/k", b"theirs")
        root.raw_set("a/kk", b"theirs too")
        root.open().delete(["a/k"])
        assert root.raw_get("a/k") is None
        assert root.raw_get("a/kk") == b"theirs too"

    # --- write and read.

    @promised_by("StorageBackend.write", "StorageBackend.read")
    def test_what_was_written_is_read(self, storage: StorageBackend) -> None:
        """``read`` returns the bytes that ``write`` stored."""
        storage.write("a/b/c", b"bytes")
        assert storage.read("a/b/c") == b"bytes"
        assert type(storage.read("a/b/c")) is bytes

    @pytest.mark.parametrize("data", [b"", b"\0", _BIG], ids=["empty", "nul", "big"])
    @promised_by("StorageBackend.write", "StorageBackend.list")
    def test_bytes_of_any_length_come_back(self, storage: StorageBackend, data: bytes) -> None:
        """An object may have any length, 0 as well, and is listed with it."""
        storage.write("k", data)
        assert storage.read("k") == data
        assert [(blob.key, blob.size) for blob in storage.list()] == [("k", len(data))]

    @promised_by("StorageBackend.write")
    def test_a_write_replaces_the_whole_object(self, storage: StorageBackend) -> None:
        """An object that is written again holds the new bytes only."""
        storage.write("k", b"something long")
        storage.write("k", b"short")
        assert storage.read("k") == b"short"
        assert _keys(storage) == ["k"]

    @promised_by("StorageBackend.write")
    def test_the_callers_buffer_is_not_kept(self, storage: StorageBackend) -> None:
        """What the caller does with its buffer after ``write`` does not change the object."""
        buffer = bytearray(b"before")
        storage.write("k", cast(bytes, buffer))
        buffer[:] = b"after!"
        assert storage.read("k") == b"before"

    @promised_by("StorageBackend.write")
    def test_creating_an_object_that_exists_is_refused_and_leaves_it(
        self, root: StorageRoot, storage: StorageBackend
    ) -> None:
        """``write(overwrite=False)`` raises FileExistsError, which names the key, where the object exists."""
        with _looking_first(root):
            storage.write("a/k", b"first", overwrite=False)
            with pytest.raises(FileExistsError, match="a/k"):
                storage.write("a/k", b"second", overwrite=False)
        assert storage.read("a/k") == b"first"
        assert _keys(storage) == ["a/k"]

    @promised_by("StorageBackend.write")
    def test_of_several_threads_that_create_one_key_one_succeeds(self, root: StorageRoot) -> None:
        """Of several writers that create one key at the same moment, exactly one succeeds."""
        _needs_conditional_creation(root)
        storages = [root.open() for _ in range(12)]
        for attempt in range(_turns(storages[0], 30, 3)):
            key = f"step_{attempt}/manifest.json"

            def create(index: int, key: str = key) -> None:
                storages[index].write(key, b"%d" % index * 500, overwrite=False)

            results = at_once(len(storages), create)
            winners = [index for index, result in enumerate(results) if result is None]
            assert len(winners) == 1
            assert storages[0].read(key) == b"%d" % winners[0] * 500
            assert {type(result) for result in results if result is not None} == {FileExistsError}

    @promised_by("StorageBackend.write")
    def test_a_storage_that_cannot_create_conditionally_says_so(self, root: StorageRoot) -> None:
        """A storage that cannot promise one winner issues a VibeStoreWarning; no other does."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            root.open().write("k", b"1", overwrite=False)
        said = [str(warning.message) for warning in caught if issubclass(warning.category, VibeStoreWarning)]
        assert bool(said) is not root.creates_conditionally, said

    @promised_by("StorageBackend.write", "StorageBackend.put")
    def test_a_reader_never_sees_part_of_an_object_that_is_replaced(
        self, root: StorageRoot, tmp_path: Path
    ) -> None:
        """An object is stored whole or not at all: whoever reads meanwhile sees the old bytes or the new."""
        versions = [bytes([letter]) * 300_000 for letter in b"abc"]
        storage, stop, stored = root.open(), Event(), {"written": 0, "put": 0}
        storage.write("k", versions[0])
        (tmp_path / "source").write_bytes(versions[2])

        def write() -> None:
            while not stop.is_set():
                root.open().write("k", versions[1])
                stored["written"] += 1

        def put() -> None:
            while not stop.is_set():
                root.open().put(tmp_path / "source", "k")
                stored["put"] += 1

        turns, seen, sizes = _turns(storage, 40, 15), set[bytes | None](), set[int]()
        with switching_often(), ThreadPoolExecutor(2) as pool:
            writers = [pool.submit(write), pool.submit(put)]
            try:
                while (turns > 0 or min(stored.values()) < 5) and not any(each.done() for each in writers):
                    seen |= {root.open().read("k"), root.raw_get("k")}
                    sizes |= {blob.size for blob in root.open().list()}
                    turns -= 1
            finally:
                stop.set()
            for writer in writers:
                writer.result()
        assert {data and (data[:1], data[-1:], len(data)) for data in seen} <= {
            (data[:1], data[-1:], len(data)) for data in versions
        }
        assert seen <= {*versions}
        assert sizes <= {300_000}
        assert _keys(storage) == ["k"]

    @promised_by("StorageBackend")
    def test_threads_do_not_disturb_each_other(self, storage: StorageBackend) -> None:
        """Every method may be called from any thread, on objects beside each other, too."""
        turns = _turns(storage, 15, 4)

        def work(index: int) -> None:
            for turn in range(turns):
                key = f"shared/{turn % 3}/{index}"
                storage.write(key, b"%d" % index)
                assert storage.read(key) == b"%d" % index
                storage.delete([key])

        assert at_once(8, work) == [None] * 8
        assert _keys(storage) == []

    @promised_by("StorageBackend.read")
    def test_a_range_gives_what_there_is_of_it(self, storage: StorageBackend) -> None:
        """``read(key, start, end)`` returns the bytes from ``start`` up to ``end`` that there are."""
        storage.write("k", b"0123456789")
        assert {window: storage.read("k", *window) for window in _RANGES} == _RANGES

    @promised_by("StorageBackend.read")
    def test_a_range_that_counts_from_the_end_is_refused(self, storage: StorageBackend) -> None:
        """A negative ``start`` or ``end`` raises InvalidValueError, which names the value."""
        storage.write("k", b"0123456789")
        with pytest.raises(InvalidValueError, match="-1"):
            storage.read("k", -1)
        with pytest.raises(InvalidValueError, match="-1"):
            storage.read("k", 0, -1)

    @promised_by("StorageBackend.read")
    def test_reading_what_is_not_there_is_file_not_found(self, storage: StorageBackend) -> None:
        """``read``, of a range too, raises FileNotFoundError, which names the key, where there is none."""
        windows: list[tuple[int, ...]] = [(), (1,), (0, 1), (2, 1)]
        for window in windows:
            with pytest.raises(FileNotFoundError, match="a/b"):
                storage.read("a/b", *window)
        storage.write("a", b"an object")
        for window in windows:
            with pytest.raises(FileNotFoundError, match="a/b"):
                storage.read("a/b", *window)

    @promised_by("StorageBackend")
    def test_what_other_keys_begin_with_is_no_object(self, storage: StorageBackend, tmp_path: Path) -> None:
        """There are no folders: where there is an object at ``a/b``, there is none at ``a``."""
        storage.write("begin/b", b"x")
        with pytest.raises(FileNotFoundError, match="begin"):
            storage.read("begin")
        with pytest.raises(FileNotFoundError, match="begin"):
            storage.get("begin", tmp_path / "target")
        assert not (tmp_path / "target").exists()
        storage.delete(["begin"])
        assert _keys(storage) == ["begin/b"]

    @promised_by("StorageBackend")
    def test_what_need_not_be_durable_is_seen_all_the_same(
        self, storage: StorageBackend, tmp_path: Path
    ) -> None:
        """With ``durable=False`` the next call sees a change as it does with ``durable=True``."""
        (tmp_path / "source").write_bytes(b"2")
        storage.write("a", b"1", durable=False)
        storage.put(tmp_path / "source", "b", durable=False)
        assert (storage.read("a"), storage.read("b")) == (b"1", b"2")
        assert _keys(storage) == ["a", "b"]
        storage.delete(["a"], durable=False)
        assert _keys(storage) == ["b"]

    # --- list.

    @promised_by("StorageBackend.list")
    def test_a_prefix_is_text_and_not_a_folder(self, storage: StorageBackend) -> None:
        """``list`` finds the objects whose keys begin with the prefix, wherever in a name it ends."""
        every = ["step_1/state", "step_10/manifest", "step_10/state", "step_2/state", "steps"]
        for key in every:
            storage.write(key, b"")
        assert _keys(storage) == every
        assert _keys(storage, "step_1") == every[:3]
        assert _keys(storage, "step_1/") == every[:1]
        assert _keys(storage, "step_10/state") == ["step_10/state"]
        assert _keys(storage, "step_10/state/") == []
        assert _keys(storage, "step") == every
        assert _keys(storage, "x") == []
        assert _keys(storage, "..") == []

    @promised_by("StorageBackend.list")
    def test_a_list_is_sorted_by_the_whole_key(self, storage: StorageBackend) -> None:
        """``list`` yields each object once, sorted by key as Python sorts text."""
        every = ["a!b", "a-b/c", "a.b", "a/b", "a/b.c", "a/c/d", "a0", "B", "a b", "é", "aé/x", "日本/🦆"]
        for key in every:
            storage.write(key, b"")
        assert _keys(storage) == sorted(every)
        assert _keys(storage, "a") == sorted(key for key in every if key.startswith("a"))

    @promised_by("StorageBackend.list")
    def test_a_list_shows_size_and_time(self, storage: StorageBackend) -> None:
        """``list`` shows how long each object is, and when it was written, in seconds since the epoch."""
        before = time.time()
        storage.write("a/k", b"12345")
        (blob,) = storage.list()
        assert (blob.key, blob.size) == ("a/k", 5)
        earliest, latest = before - _CLOCK_MAY_DIFFER_BY_SECS, time.time() + _CLOCK_MAY_DIFFER_BY_SECS
        assert earliest <= blob.modified <= latest

    @promised_by("Blob")
    def test_other_bytes_have_another_version(self, storage: StorageBackend) -> None:
        """The version of an object differs whenever other bytes were written, unless it is None."""
        versions = []
        for data in (b"1", b"2", b"33"):
            storage.write("k", data)
            versions += [blob.version for blob in storage.list()]
        assert versions == [None] * 3 or len({*versions} - {None}) == 3

    @promised_by("StorageBackend.list")
    def test_a_list_is_never_stale(self, root: StorageRoot) -> None:
        """``list`` shows what another storage that is open at the same root has just changed."""
        reader, writer = root.open(), root.open()
        assert _keys(reader) == []
        writer.write("a/1", b"1")
        assert [(blob.key, blob.size) for blob in reader.list("a")] == [("a/1", 1)]
        writer.write("a/1", b"123")
        writer.write("a/2", b"")
        assert [(blob.key, blob.size) for blob in reader.list("a")] == [("a/1", 3), ("a/2", 0)]
        writer.delete(["a/1"])
        assert _keys(reader, "a") == ["a/2"]
        with pytest.raises(FileNotFoundError):
            reader.read("a/1")

    @promised_by("StorageBackend.list")
    def test_a_list_that_is_being_read_stands_deletion(self, storage: StorageBackend) -> None:
        """Whoever goes through a list may delete what it yields on the way, and still sees all of it."""
        for number in range(12):
            storage.write(f"{number % 4}/{number}", b"")
        seen = []
        for blob in storage.list():
            storage.delete([blob.key])
            seen.append(blob.key)
        assert len(seen) == 12
        assert _keys(storage) == []

    # --- delete.

    @promised_by("StorageBackend.delete")
    def test_only_the_named_objects_are_removed(self, storage: StorageBackend) -> None:
        """``delete`` removes exactly the objects of these keys, and none whose keys begin like one."""
        for key in ["a", "a.b", "ab", "b/a", "b/ab", "b/a.b/c"]:
            storage.write(key, b"")
        storage.delete(["a", "b/a"])
        assert _keys(storage) == ["a.b", "ab", "b/a.b/c", "b/ab"]

    @promised_by("StorageBackend.delete")
    def test_deleting_what_is_not_there_is_no_error(self, storage: StorageBackend) -> None:
        """A key of which there is no object is no error, nor is one that is named twice."""
        storage.write("a/b", b"")
        storage.delete(["a/c", "x/y", "a/b/c", "a/b", "a/b"])
        storage.delete(["a/b"])
        storage.delete([])
        assert _keys(storage) == []

    @promised_by("StorageBackend.delete")
    def test_the_keys_to_delete_may_come_from_a_list_of_the_same_storage(
        self, storage: StorageBackend
    ) -> None:
        """``delete`` takes any iterable of keys, one that reads from the storage meanwhile, too."""
        storage.write("a/b", b"")
        storage.write("a/c/d", b"")
        storage.delete(blob.key for blob in storage.list("a/"))
        assert _keys(storage) == []

    @promised_by("StorageBackend.delete")
    def test_one_bad_key_removes_nothing(self, storage: StorageBackend) -> None:
        """Where one of the keys is none, ``delete`` raises InvalidValueError and has removed nothing."""
        storage.write("a", b"")
        with pytest.raises(InvalidValueError, match=r"\.\./a"):
            storage.delete(["a", "../a"])
        with pytest.raises(InvalidValueError):
            storage.delete("a")  # its characters would be the keys
        assert _keys(storage) == ["a"]

    # --- put and get.

    @pytest.mark.parametrize("data", [b"", _BIG], ids=["empty", "big"])
    @pytest.mark.parametrize("move", [False, True], ids=["copied", "moved"])
    @promised_by("StorageBackend.put", "StorageBackend.get")
    def test_a_file_goes_in_and_comes_out(
        self, storage: StorageBackend, tmp_path: Path, data: bytes, move: bool
    ) -> None:
        """``put`` stores the bytes of a file, which stays unless ``move`` is set; ``get`` copies them out."""
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(data)
        storage.put(source, "a/k", move=move)
        assert move or source.read_bytes() == data
        storage.get("a/k", target)
        assert target.read_bytes() == data
        assert [(blob.key, blob.size) for blob in storage.list()] == [("a/k", len(data))]

    @pytest.mark.parametrize("move", [False, True], ids=["copied", "moved"])
    @promised_by("StorageBackend.put")
    def test_a_put_replaces_the_object_and_keeps_its_own_bytes(
        self, storage: StorageBackend, tmp_path: Path, move: bool
    ) -> None:
        """``put`` replaces the whole object; what becomes of the source later does not change it."""
        source = tmp_path / "source"
        storage.write("k", b"a longer object than before")
        source.write_bytes(b"new")
        storage.put(source, "k", move=move)
        source.write_bytes(b"changed afterwards")
        assert storage.read("k") == b"new"

    @promised_by("StorageBackend.put")
    def test_putting_a_file_that_is_not_there_names_it_and_changes_nothing(
        self, storage: StorageBackend, tmp_path: Path
    ) -> None:
        """``put`` of a file that does not exist raises FileNotFoundError, and the object is as it was."""
        storage.write("k", b"old")
        for key in ("k", "new"):
            with pytest.raises(FileNotFoundError, match="no-such-file"):
                storage.put(tmp_path / "no-such-file", key)
        assert storage.read("k") == b"old"
        assert _keys(storage) == ["k"]

    @promised_by("StorageBackend.get")
    def test_a_get_replaces_the_target_and_leaves_nothing_else(
        self, storage: StorageBackend, tmp_path: Path
    ) -> None:
        """``get`` makes the folder of the target, replaces the whole target, and leaves nothing beside it."""
        target = tmp_path / "made" / "target"
        storage.write("k", b"number one")
        storage.get("k", target)
        storage.write("k", b"2")
        storage.get("k", target)
        assert target.read_bytes() == b"2"
        assert list(target.parent.iterdir()) == [target]

    @promised_by("StorageBackend.get")
    def test_a_get_of_what_is_not_there_leaves_the_target(
        self, storage: StorageBackend, tmp_path: Path
    ) -> None:
        """``get`` raises FileNotFoundError, which names the key, and leaves the target as it was."""
        folder = tmp_path / "folder"
        folder.mkdir()
        target = folder / "target"
        with pytest.raises(FileNotFoundError, match="a/k"):
            storage.get("a/k", target)
        assert list(folder.iterdir()) == []
        target.write_bytes(b"mine")
        with pytest.raises(FileNotFoundError, match="a/k"):
            storage.get("a/k", target)
        assert target.read_bytes() == b"mine"
        assert list(folder.iterdir()) == [target]

    @promised_by("StorageBackend.get")
    def test_threads_that_get_one_object_each_get_it_whole(
        self, storage: StorageBackend, tmp_path: Path
    ) -> None:
        """Several threads that ``get`` one object at the same moment each get all of it."""
        storage.write("k", _BIG)
        assert at_once(6, lambda index: storage.get("k", tmp_path / f"{index}")) == [None] * 6
        assert {(tmp_path / f"{index}").read_bytes() == _BIG for index in range(6)} == {True}

    # --- Keys.

    @promised_by("StorageBackend")
    def test_no_method_takes_what_is_no_key(self, storage: StorageBackend, tmp_path: Path) -> None:
        """What is no key, one that leads outside the root above all, raises InvalidValueError everywhere."""
        folder = tmp_path / "folder"
        folder.mkdir()
        source = folder / "source"
        source.write_bytes(b"x")
        calls: dict[str, Callable[[str], object]] = {
            "read": storage.read,
            "write": lambda key: storage.write(key, b""),
            "put": lambda key: storage.put(source, key, move=True),
            "get": lambda key: storage.get(key, source),
            "delete": lambda key: storage.delete([key]),
        }
        raised: dict[tuple[str, str], object] = {}
        for name, call in calls.items():
            for key in _NO_KEYS:
                try:
                    raised[name, key] = call(key)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is compared below
                    raised[name, key] = error
        assert {case: it for case, it in raised.items() if not isinstance(it, InvalidValueError)} == {}
        assert source.read_bytes() == b"x"
        assert list(folder.iterdir()) == [source]
        assert _keys(storage) == []

    @promised_by("StorageBackend.list")
    def test_a_prefix_leads_nowhere_else(self, storage: StorageBackend) -> None:
        """A prefix that no key begins with finds nothing, or raises InvalidValueError."""
        storage.write("a", b"")
        for prefix in ("/", "/a", "../", "a/../", "./a"):
            try:
                found = _keys(storage, prefix)
            except InvalidValueError:
                found = []
            assert found == [], prefix

    @promised_by("StorageBackend")
    def test_a_key_is_taken_as_it_is(self, storage: StorageBackend, tmp_path: Path) -> None:
        """Names may hold any other characters; keys are not quoted, normalised, or matched as patterns."""
        source, target = tmp_path / "source", tmp_path / "target"
        storage.write("other", b"")
        for key in _ODD_KEYS:
            storage.write(key, b"1")
            assert _keys(storage) == sorted([key, "other"])
            assert _keys(storage, key) == [key]
            assert storage.read(key) == b"1"
            source.write_bytes(b"22")
            storage.put(source, key)
            storage.get(key, target)
            assert target.read_bytes() == b"22"
            storage.delete([key])
            assert _keys(storage) == ["other"]

    # --- What a storage may do besides.

    @promised_by("StorageBackend.sweep")
    def test_a_sweep_spares_every_object(self, storage: StorageBackend) -> None:
        """``sweep`` removes no object."""
        storage.write("a/k", b"1")
        storage.write(".hidden", b"2")
        storage.sweep()
        assert [(blob.key, blob.size) for blob in storage.list()] == [(".hidden", 1), ("a/k", 1)]

    @promised_by("StorageBackend.local_path")
    def test_a_local_path_is_where_the_object_is(self, storage: StorageBackend) -> None:
        """``local_path`` is None for every key, or the file that holds the bytes, there or not."""
        storage.write("a/k", b"1")
        paths = [storage.local_path(key) for key in ("", "a/k", "a/none")]
        if paths == [None] * 3:
            return
        root, path, missing = paths
        assert root is not None
        assert path is not None
        assert missing is not None
        assert path.read_bytes() == b"1"
        assert root in path.parents
        assert not missing.exists()

    @promised_by("StorageBackend")
    def test_any_sequence_of_calls_does_what_a_dictionary_would(
        self, root: StorageRoot, tmp_path: Path
    ) -> None:
        """What one call wrote, the next call sees, whatever the calls.

        Only where keys are paths may an object at ``a`` keep others from being at ``a/b``, and the reverse:
        IsADirectoryError or NotADirectoryError says so.
        """
        storage, source = root.open(), tmp_path / "source"

        @settings(
            max_examples=_turns(storage, 25, 12), deadline=None, suppress_health_check=list(HealthCheck)
        )
        @given(operations=st.lists(_OPERATIONS, min_size=3, max_size=25))
        def check(operations: list[tuple[str, Any, bytes]]) -> None:
            storage.delete(_keys(storage))
            model: dict[str, bytes] = {}
            for name, subject, data in operations:
                if name == "delete":
                    storage.delete(subject)
                    for key in subject:
                        model.pop(key, None)
                elif name == "list":
                    assert _keys(storage, subject) == sorted(key for key in model if key.startswith(subject))
                else:
                    source.write_bytes(data)
                    if _store(storage, name, subject, source, model):
                        model[subject] = data
            assert {blob.key: storage.read(blob.key) for blob in storage.list()} == model
            assert [blob.size for blob in storage.list()] == [len(model[key]) for key in sorted(model)]

        with _looking_first(root):
            check()


def _keys(storage: StorageBackend, prefix: str = "") -> list[str]:
    return [blob.key for blob in storage.list(prefix)]


def _turns(storage: StorageBackend, otherwise: int, over_a_network: int) -> int:
    """How often to try what takes a storage that waits for a network much longer."""
    return otherwise if storage.concurrency == 1 else over_a_network


def _needs_conditional_creation(root: StorageRoot) -> None:
    if not root.creates_conditionally:
        pytest.skip("this storage does not create conditionally (StorageRoot.creates_conditionally)")


@contextmanager
def _looking_first(root: StorageRoot) -> Iterator[None]:
    """Let a storage that cannot create conditionally warn that it looks first, and no other."""
    with warnings.catch_warnings():
        if not root.creates_conditionally:
            warnings.simplefilter("ignore", VibeStoreWarning)
        yield


def _store(storage: StorageBackend, how: str, key: str, source: Path, model: dict[str, bytes]) -> bool:
    """Store the bytes of a file; return whether they were, and check that they may not have been."""
    below = {other for other in model if f"{other}/".startswith(f"{key}/") or key.startswith(f"{other}/")}
    try:
        if how in {"put", "move"}:
            storage.put(source, key, move=how == "move")
        else:
            storage.write(key, source.read_bytes(), overwrite=how == "write")
    except FileExistsError:
        assert how == "create"
        assert below
        return False
    except (IsADirectoryError, NotADirectoryError):
        assert below - {key}
        return False
    assert how != "create" or key not in model
    return True
