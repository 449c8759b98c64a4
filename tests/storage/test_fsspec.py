"""FsspecStorage on a filesystem that has the traps of real ones, and what MemoryStorage adds to it."""

import contextlib
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.memory import MemoryStorage


class TrapFileSystem(LocalFileSystem):
    """Caches listings, cannot read folders named "closed", and stops in the middle of an upload when told."""

    protocol = "trap"
    cut_off = False

    def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True, **options)
        entries = self.dircache[path]
        return list(entries) if detail else [entry["name"] for entry in entries]

    def info(self, path: Any, **options: Any) -> dict[str, Any]:
        if isinstance(path, str):
            for entry in self.dircache.get(self._parent(path), []):
                if entry["name"] == path:
                    return dict(entry)
        return dict(super().info(path, **options))

    def invalidate_cache(self, path: str | None = None) -> None:
        del path
        self.dircache.clear()

    def _upload(self, path: str, data: bytes) -> None:
        Path(path).write_bytes(data[: len(data) // 2] if self.cut_off else data)
        if self.cut_off:
            raise ConnectionResetError(104, "Connection reset by peer")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        del mode
        self._upload(path, value)

    def put_file(self, path1: str, path2: str, callback: Any = None, **_: Any) -> None:
        del callback
        self._upload(path2, Path(path1).read_bytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def storage(root: Path) -> Iterator[FsspecStorage]:
    fsspec.register_implementation("trap", TrapFileSystem, clobber=True)
    TrapFileSystem.clear_instance_cache()
    yield FsspecStorage(f"trap://{root}", token="secret-token")  # noqa: S106 - not a real one
    TrapFileSystem.clear_instance_cache()


def keys_of(storage: FsspecStorage, prefix: str = "") -> list[str]:
    return [blob.key for blob in storage.list(prefix)]


def test_no_cached_listing_is_shown(storage: FsspecStorage, root: Path) -> None:
    storage.write("a/k", b"1")
    assert keys_of(storage) == ["a/k"]
    (root / "a" / "j").write_bytes(b"12")
    assert keys_of(storage) == ["a/j", "a/k"]
    (root / "a" / "k").write_bytes(b"12345")
    assert storage.read("a/k", 1, 99) == b"2345"
    assert [(blob.key, blob.size) for blob in storage.list()] == [("a/j", 2), ("a/k", 5)]


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    storage: FsspecStorage, root: Path
) -> None:
    storage.write("a/k", b"1")
    (root / "closed").mkdir()
    with pytest.raises(PermissionError) as caught:
        storage.list()
    assert any(storage.url in note for note in caught.value.__notes__)


@pytest.mark.parametrize("how", ["write", "put"])
def test_an_upload_that_is_cut_off_leaves_the_old_object_and_nothing_else(
    storage: FsspecStorage, root: Path, tmp_path: Path, how: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"new bytes")
    storage.write("a/k", b"old")
    storage.fs.cut_off = True
    with pytest.raises(ConnectionResetError):
        storage.write("a/k", b"new bytes") if how == "write" else storage.put(source, "a/k", move=True)
    assert storage.read("a/k") == b"old"
    assert [path.name for path in (root / "a").iterdir()] == ["k"]
    assert source.exists()


def test_an_object_never_goes_into_a_folder_of_its_name(storage: FsspecStorage, root: Path) -> None:
    storage.write("a/k", b"1")
    with pytest.raises(IsADirectoryError, match="folder"):
        storage.write("a", b"2")
    assert sorted(path.name for path in root.rglob("*")) == ["a", "k"]


def test_a_sweep_removes_what_a_dead_writer_left(storage: FsspecStorage, root: Path) -> None:
    storage.write("a/k", b"1")
    (root / "a" / f"{TEMPORARY_PREFIX}dead").write_bytes(b"half")
    assert keys_of(storage) == ["a/k"]
    storage.sweep()
    assert [path.name for path in (root / "a").iterdir()] == ["k"]


def test_a_sweep_spares_what_this_process_is_uploading(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = TrapFileSystem._upload

    def sweep_then_upload(fs: TrapFileSystem, path: str, data: bytes) -> None:
        upload(fs, path, data)
        storage.sweep()

    monkeypatch.setattr(TrapFileSystem, "_upload", sweep_then_upload)
    storage.write("a/k", b"1")
    assert storage.read("a/k") == b"1"


def test_no_secret_is_shown(storage: FsspecStorage) -> None:
    assert "secret-token" not in repr(storage) + storage.url
    in_url = FsspecStorage("trap://user:pass:w@rd@host/a@b:c", token="secret-token")  # noqa: S106 - see above
    assert in_url.url == "trap://user@host/a@b:c"
    assert repr(in_url) == "FsspecStorage('trap://user@host/a@b:c')"
    with pytest.raises(FileNotFoundError) as caught:
        in_url.read("k")
    assert "secret-token" not in str(caught.value)
    assert "pass" not in str(caught.value)


def test_a_protocol_that_fsspec_does_not_know_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="no-such-protocol"):
        FsspecStorage("no-such-protocol://a")


def test_a_protocol_whose_package_is_missing_says_what_to_install() -> None:
    fsspec.register_implementation(
        "absent", "no_such_package.FileSystem", errtxt="Install no-such-package", clobber=True
    )
    with pytest.raises(MissingDependencyError, match="Install no-such-package"):
        FsspecStorage("absent://a")


def test_objects_in_memory_last_as_long_as_the_process_and_stay_in_their_roots() -> None:
    MemoryStorage("memory://one/root").write("k", b"1")
    MemoryStorage("memory://one/root2").write("k", b"2")
    assert MemoryStorage("memory://one/root").read("k") == b"1"
    assert [blob.key for blob in MemoryStorage("memory://one").list("root/")] == ["root/k"]
    MemoryStorage("memory://one").delete(["root/k", "root2/k"])
    assert [blob.key for blob in MemoryStorage("memory://").list("one/")] == []


def test_of_threads_that_create_one_object_in_memory_one_succeeds_however_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = MemoryFile.__init__

    def begin_slowly(file: MemoryFile, *arguments: Any, **options: Any) -> None:
        time.sleep(0.02)  # fsspec has looked whether the object exists, and has not made it yet
        begin(file, *arguments, **options)

    monkeypatch.setattr(MemoryFile, "__init__", begin_slowly)
    winners = []

    def create(index: int) -> None:
        with contextlib.suppress(FileExistsError):
            MemoryStorage("memory://slow").write("k", b"%d" % index, overwrite=False)
            winners.append(b"%d" % index)

    threads = [threading.Thread(target=create, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == [MemoryStorage("memory://slow").read("k")]


def test_a_forked_child_is_not_locked_out_of_memory() -> None:
    # In a process of its own: this one may have imported JAX, which warns of every fork.
    code = """
    import faulthandler, os, threading, warnings
    from vibe_store.storage import memory

    warnings.simplefilter("ignore", DeprecationWarning)
    storage = memory.MemoryStorage("memory://forked")
    held, done = threading.Event(), threading.Event()

    def hold():
        with memory._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(10, exit=True)
        storage.write("k", b"1")
        os._exit(0 if storage.read("k") == b"1" else 3)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
