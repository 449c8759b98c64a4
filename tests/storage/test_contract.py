"""Every storage of ours keeps the contract, and what else those on one disk or in one memory promise."""

import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import StorageContract, StorageRoot


def keys_of(storage: StorageBackend, prefix: str = "") -> list[str]:
    return [blob.key for blob in storage.list(prefix)]


def root_in_a_folder(folder: Path, open_it: Callable[[], StorageBackend], **options: Any) -> StorageRoot:
    """A root whose objects are files: they are replaced by a rename, so that no reader sees a part."""

    def raw_set(key: str, data: bytes) -> None:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)

    def raw_get(key: str) -> bytes | None:
        path = folder / key
        return path.read_bytes() if path.is_file() else None

    return StorageRoot(open_it, raw_set, raw_get, **options)


def root_in_memory(url: str) -> StorageRoot:
    """A root in fsspec's filesystem in memory, whose objects are reached in its dictionary."""
    fs, root = MemoryFileSystem(), MemoryFileSystem._strip_protocol(url)

    def raw_set(key: str, data: bytes) -> None:
        fs.store[f"{root}/{key}"] = MemoryFile(fs, f"{root}/{key}", data)

    def raw_get(key: str) -> bytes | None:
        file = fs.store.get(f"{root}/{key}")
        return None if file is None else file.getvalue()

    return StorageRoot(lambda: MemoryStorage(url), raw_set, raw_get)


def root_in_a_bucket(bucket: Any) -> StorageRoot:
    path = f"{uuid.uuid4().hex}/root"
    return StorageRoot(
        open=lambda: bucket.open(path),
        raw_set=lambda key, data: bucket.raw_set(f"{path}/{key}", data),
        raw_get=lambda key: bucket.raw_get(f"{path}/{key}"),
        secrets=tuple(bucket.storage_options.get(name, "a secret") for name in ("secret", "token")),
    )


class OurContract(StorageContract):
    """What all of our storages promise besides."""

    def test_a_file_that_may_be_moved_takes_no_room_afterwards(
        self, storage: StorageBackend, tmp_path: Path
    ) -> None:
        (tmp_path / "source").write_bytes(b"x")
        storage.put(tmp_path / "source", "k", move=True)
        assert not (tmp_path / "source").exists()

    def test_a_prefix_that_no_key_begins_with_is_refused(self, storage: StorageBackend) -> None:
        with pytest.raises(InvalidValueError):
            storage.list("../")

    def test_a_collection_of_keys_is_not_one_text(self, storage: StorageBackend) -> None:
        with pytest.raises(InvalidValueError, match="not one str"):
            storage.delete("a")


class TestLocal(OurContract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> StorageRoot:
        folder = tmp_path / "root"
        return root_in_a_folder(folder, lambda: LocalStorage(str(folder)))


class TestMemory(OurContract):
    @pytest.fixture
    def root(self) -> StorageRoot:
        return root_in_memory(f"memory://{uuid.uuid4().hex}/root")


class TestFsspec(OurContract):
    @pytest.fixture
    def root(self, tmp_path: Path) -> StorageRoot:
        folder = tmp_path / "root"
        return root_in_a_folder(
            folder, lambda: FsspecStorage(f"file://{folder}"), creates_conditionally=False
        )

    def test_any_sequence_of_calls_does_what_a_dictionary_would(self) -> None:
        pytest.skip("fsspec's local filesystem keeps empty folders, and no object can be where one is")


class TestS3(OurContract):
    @pytest.fixture
    def root(self, s3: Any) -> StorageRoot:
        return root_in_a_bucket(s3)


class TestGCS(OurContract):
    @pytest.fixture
    def root(self, gcs: Any) -> StorageRoot:
        return root_in_a_bucket(gcs)


@pytest.fixture(params=["local", "memory"])
def here(request: pytest.FixtureRequest, tmp_path: Path) -> StorageBackend:
    """A storage whose keys are paths, and whose URL is all that it takes to open it."""
    if request.param == "local":
        return LocalStorage(str(tmp_path / "root"))
    return MemoryStorage(f"memory://{uuid.uuid4().hex}/root")


def test_where_keys_are_paths_an_object_and_objects_below_it_cannot_both_be(here: StorageBackend) -> None:
    here.write("a/b", b"1")
    for overwrite in (True, False):
        with pytest.raises(NotADirectoryError, match="a/b/c"):
            here.write("a/b/c", b"2", overwrite=overwrite)
    with pytest.raises(IsADirectoryError, match="'a'"):
        here.write("a", b"3")
    assert keys_of(here) == ["a/b"]


def test_the_url_opens_the_same_storage_again(here: StorageBackend) -> None:
    here.write("a", b"1")
    assert type(here)(here.url).read("a") == b"1"
    assert here.url in repr(here)


def test_a_folder_is_made_at_the_first_write_and_not_before(tmp_path: Path) -> None:
    for storage in (LocalStorage(str(tmp_path / "root")), FsspecStorage(f"file://{tmp_path}/root")):
        assert keys_of(storage, "a/b") == []
        storage.delete(["a"])
        assert list(tmp_path.iterdir()) == []


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


def test_an_empty_folder_that_fsspec_leaves_is_not_taken_for_an_object(tmp_path: Path) -> None:
    storage = FsspecStorage(f"file://{tmp_path}")
    storage.write("a/b", b"1")
    storage.delete(["a/b"])
    with pytest.warns(VibeStoreWarning), pytest.raises(IsADirectoryError):
        storage.write("a", b"2", overwrite=False)
    assert keys_of(storage) == []
