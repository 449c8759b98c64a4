"""What LocalStorage adds to the contract: links, permissions, durability, full disks, dead writers."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError
from vibe_store.registry import open_storage
from vibe_store.storage.local import LocalStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    return LocalStorage(str(root))


def keys_of(storage: LocalStorage, prefix: str = "") -> list[str]:
    return [blob.key for blob in storage.list(prefix)]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# the root


def test_a_root_may_be_a_path_or_a_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert LocalStorage("a b").url == f"{tmp_path}/a b"
    assert LocalStorage("./a/").url == f"{tmp_path}/a"
    assert LocalStorage("a/../b").url == f"{tmp_path}/b"
    assert LocalStorage("~/a").url == f"{tmp_path}/home/a"
    assert LocalStorage(f"file://{tmp_path}/%20").url == f"{tmp_path}/%20"


@pytest.mark.parametrize("url", ["s3://b/r", "s3:/b/r", "file://host/a", "file://~/a", "", "~no-such-user/a"])
def test_a_root_that_is_no_local_path_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError):
        LocalStorage(url)


def test_a_relative_root_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("root")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.write("k", b"1")
    assert (tmp_path / "root" / "k").read_bytes() == b"1"


def test_an_option_is_refused_without_its_value() -> None:
    with pytest.raises(InvalidValueError, match="token") as caught:
        LocalStorage("a", token="secret-value")  # noqa: S106 - not a real one
    assert "secret-value" not in str(caught.value)


@pytest.mark.parametrize("below", ["", "/runs"])
def test_a_root_that_is_or_lies_below_a_file_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    storage = LocalStorage(f"{tmp_path}/file{below}")
    calls: list[Callable[[], object]] = [
        lambda: list(storage.list()),
        lambda: storage.read("k"),
        lambda: storage.write("k", b""),
        lambda: storage.write("k", b"", overwrite=False),
        lambda: storage.delete(["k"]),
        storage.sweep,
    ]
    for call in calls:
        with pytest.raises(NotADirectoryError, match=r"is, or lies below, a file\. Choose a folder"):
            call()
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_root_may_be_a_symbolic_link(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    storage = LocalStorage(f"{tmp_path}/link")
    storage.write("a/b", b"1")
    assert storage.read("a/b") == b"1"
    assert keys_of(storage, "a") == ["a/b"]
    storage.delete(["a/b"])
    assert everything(root) == []
    assert (tmp_path / "link").is_symlink()


def test_the_local_path_of_a_key_is_in_the_root(storage: LocalStorage, root: Path) -> None:
    assert storage.local_path("") == root
    assert storage.local_path("a/b") == root / "a" / "b"
    with pytest.raises(InvalidValueError):
        storage.local_path("../a")


# symbolic links below the root


def test_no_method_follows_a_link_out_of_the_root(storage: LocalStorage, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "up").symlink_to("..")
    source = tmp_path / "source"
    source.write_bytes(b"new")
    for key in ["folder/secret", "file", "up/outside/secret", "folder/new"]:
        calls: list[Callable[[], object]] = [
            lambda key=key: storage.read(key),
            lambda key=key: storage.get(key, tmp_path / "target"),
            lambda key=key: storage.write(key, b"x"),
            lambda key=key: storage.write(key, b"x", overwrite=False),
            lambda key=key: storage.put(source, key, move=True),
            lambda key=key: storage.delete([key]),
            lambda key=key: storage.local_path(key),
        ]
        for call in calls:
            with pytest.raises(InvalidValueError, match=r"leads out of .* through a symbolic link"):
                call()
    assert everything(outside) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"
    assert source.exists()
    assert keys_of(storage) == keys_of(storage, "folder/") == keys_of(storage, "up/outside/") == []


def test_links_within_the_root_are_read_but_folders_are_listed_where_they_are(
    storage: LocalStorage, root: Path
) -> None:
    storage.write("step_10/state", b"123")
    (root / "best").symlink_to("step_10")
    (root / "alias").symlink_to("step_10/state")
    (root / "dangling").symlink_to("step_99")
    (root / "loop").symlink_to("loop")
    assert storage.read("best/state") == b"123"
    assert storage.read("alias") == b"123"
    assert [(blob.key, blob.size) for blob in storage.list()] == [("alias", 3), ("step_10/state", 3)]
    assert keys_of(storage, "best") == keys_of(storage, "best/") == []
    for key in ["dangling", "loop"]:
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.read(key)


def test_deleting_a_linked_folder_by_key_removes_nothing(storage: LocalStorage, root: Path) -> None:
    storage.write("step_10/state", b"123")
    (root / "best").symlink_to("step_10")
    storage.delete(["best", "step_10"])
    assert everything(root) == ["best", "step_10", "step_10/state"]


def test_deleting_a_link_to_a_file_removes_the_link_alone(storage: LocalStorage, root: Path) -> None:
    storage.write("a/state", b"123")
    (root / "alias").symlink_to("a/state")
    storage.delete(["alias"])
    assert keys_of(storage) == ["a/state"]


def test_what_is_no_regular_file_is_no_object(storage: LocalStorage, root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "fifo")
    (root / "with\nnewline").write_bytes(b"")
    assert keys_of(storage) == []
    with pytest.raises(FileNotFoundError):
        storage.read("fifo")
    storage.delete(["fifo"])
    assert everything(root) == ["fifo", "with\nnewline"]


# folders


def test_deleting_removes_the_folders_that_it_empties_up_to_the_root(
    storage: LocalStorage, root: Path
) -> None:
    storage.write("a/b/c/d", b"")
    storage.write("a/e", b"")
    (root / "own").mkdir()
    storage.delete(["a/b/c/d"])
    assert everything(root) == ["a", "a/e", "own"]
    storage.delete(["a/e"])
    assert everything(root) == ["own"]
    (root / "own").rmdir()
    storage.write("k", b"")
    storage.delete(["k"])
    assert root.is_dir()


@pytest.mark.parametrize("move", [False, True])
def test_a_folder_that_another_removes_in_between_is_made_again(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, move: bool
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    mkdir, removed = Path.mkdir, []

    def mkdir_then_remove(path: Path, *arguments: object, **options: object) -> None:
        mkdir(path, *arguments, **options)
        if len(removed) < 3:
            removed.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir_then_remove)
    storage.put(source, "a/k", move=move)
    assert storage.read("a/k") == b"1"
    assert len(removed) == 3


def test_a_listing_reads_only_folders_that_can_match(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ["step_1/a", "step_10/a", "step_2/a", "other/a"]:
        storage.write(key, b"")
    visited: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: visited.append(Path(path).name) or scandir(path))
    assert keys_of(storage, "step_1") == ["step_1/a", "step_10/a"]
    assert visited == ["root", "step_1", "step_10"]
    visited.clear()
    assert keys_of(storage, "step_1/") == ["step_1/a"]
    assert visited == ["step_1"]


# permissions


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_new_files_and_folders_get_what_the_umask_leaves(
    storage: LocalStorage, root: Path, tmp_path: Path, umask: int
) -> None:
    (tmp_path / "source").write_bytes(b"1")
    before = os.umask(umask)
    try:
        storage.write("a/written", b"")
        storage.write("a/created", b"", overwrite=False)
        storage.put(tmp_path / "source", "a/put")
        storage.get("a/put", tmp_path / "got")
    finally:
        os.umask(before)
    for path in [root / "a" / "written", root / "a" / "created", root / "a" / "put", tmp_path / "got"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o777 & ~umask


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can get to; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        if os.getuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
            pytest.skip(f"another user, as root ignores permissions, cannot get to {folder}")
        yield folder


def test_a_folder_without_permission_is_named_and_never_taken_for_an_empty_one(open_folder: Path) -> None:
    program = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from vibe_store.storage.local import LocalStorage
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        readonly, closed = LocalStorage(sys.argv[1]), LocalStorage(sys.argv[2])
        print(readonly.read("a/k"))
        for name, call in {
            "write": lambda: readonly.write("a/k", b"x"),
            "create": lambda: readonly.write("a/new", b"x", overwrite=False),
            "mkdir": lambda: readonly.write("new/k", b"x"),
            "put": lambda: readonly.put(Path(sys.argv[1], "a/k"), "a/j"),
            "delete": lambda: readonly.delete(["a/k"]),
            "list": lambda: list(closed.list()),
            "read": lambda: closed.read("a/k"),
            "sweep": lambda: closed.sweep(),
        }.items():
            try:
                call()
            except PermissionError as error:
                print(name, error)
            else:
                print(name, "was allowed")
    """)
    roots = [open_folder / "readonly", open_folder / "closed"]
    for root in roots:
        LocalStorage(str(root)).write("a/k", b"1")
    for folder in [roots[0], roots[0] / "a"]:
        folder.chmod(0o555)
    (roots[1] / "a").chmod(0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, roots)], capture_output=True, text=True, check=True
        )
    finally:
        for folder in [*roots, roots[0] / "a", roots[1] / "a"]:
            folder.chmod(0o755)
    read, *refused = done.stdout.splitlines()
    assert read == "b'1'"
    for line, name, root in zip(
        refused,
        ["write", "create", "mkdir", "put", "delete", "list", "read", "sweep"],
        [roots[0]] * 5 + [roots[1]] * 3,
        strict=True,
    ):
        assert line.startswith(f"{name} [Errno 13] Could not ")
        assert str(root) in line
        assert "Check the permissions" in line
    assert everything(roots[0]) == ["a", "a/k"]


# failures


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("only root on Linux can mount a small file system to fill")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(full_disk: Path, tmp_path: Path) -> None:
    storage = LocalStorage(str(full_disk / "root"))
    storage.write("step_1/state", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    calls: list[Callable[[], object]] = [
        lambda: storage.write("step_1/state", source.read_bytes()),
        lambda: storage.write("step_2/state", source.read_bytes()),
        lambda: storage.write("step_2/state", source.read_bytes(), overwrite=False),
        lambda: storage.put(source, "step_1/state"),
        lambda: storage.put(source, "step_2/state", move=True),
    ]
    for call in calls:
        with pytest.raises(OSError, match=r"step_[12]/state.*No space left.*Free some space") as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
        assert str(full_disk) in str(caught.value)
        assert everything(full_disk) == ["root", "root/step_1", "root/step_1/state"]
    assert storage.read("step_1/state") == b"old"
    assert source.stat().st_size == 3_000_000
    storage.write("step_2/state", b"fits")
    target = full_disk / "target"
    target.write_bytes(b"mine")
    big = LocalStorage(str(tmp_path / "big"))
    big.put(source, "k")
    with pytest.raises(OSError, match="No space left"):
        big.get("k", target)
    assert target.read_bytes() == b"mine"
    assert everything(full_disk) == [
        "root",
        "root/step_1",
        "root/step_1/state",
        "root/step_2",
        "root/step_2/state",
        "target",
    ]


def test_a_file_moves_between_file_systems_as_a_copy(full_disk: Path, tmp_path: Path) -> None:
    storage = LocalStorage(str(full_disk / "root"))
    source = tmp_path / "source"
    source.write_bytes(b"x" * 500_000)
    storage.put(source, "a/k", move=True)
    assert storage.read("a/k") == b"x" * 500_000
    assert not source.exists()
    assert everything(full_disk) == ["root", "root/a", "root/a/k"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_nothing(
    storage: LocalStorage, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    storage.write("a/k", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"new")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    calls: list[Callable[[], object]] = [
        lambda: storage.write("a/k", b"new"),
        lambda: storage.put(source, "a/k"),
        lambda: storage.put(source, "b/k"),
        lambda: storage.put(source, "a/k", move=True),
    ]
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail) if broken == "fsync" else patch.setattr(Path, "replace", fail)
            with pytest.raises(OSError, match=r"Could not .*/k'.*Input/output error"):
                call()
        assert [name for name in everything(root) if name != "b"] == ["a", "a/k"]
        assert storage.read("a/k") == b"old"
        assert source.read_bytes() == b"new"


def test_a_name_too_long_for_the_disk_is_said_to_be(storage: LocalStorage, root: Path) -> None:
    with pytest.raises(OSError, match="Choose shorter names") as caught:
        storage.write("x" * 300, b"")
    assert caught.value.errno == errno.ENAMETOOLONG
    assert not root.exists() or everything(root) == []


def test_a_link_as_the_source_of_a_move_is_stored_as_the_bytes_it_leads_to(
    storage: LocalStorage, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage.put(tmp_path / "link", "k", move=True)
    assert not (root / "k").is_symlink()
    assert storage.read("k") == b"1"
    assert (tmp_path / "real").read_bytes() == b"1"


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="there is no fast copy to fail here")
@pytest.mark.parametrize("copied", [0, 70_000])
def test_a_fast_copy_that_stops_is_finished_slowly(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: int
) -> None:
    data = bytes(range(256)) * 1_000
    (tmp_path / "source").write_bytes(data)
    real = os.copy_file_range
    calls = []

    def stop(source: int, target: int, count: int) -> int:
        del count
        calls.append(1)
        if len(calls) > 1 or not copied:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(source, target, copied)

    monkeypatch.setattr(os, "copy_file_range", stop)
    storage.put(tmp_path / "source", "k")
    assert calls
    assert storage.read("k") == data


def test_without_hard_links_an_object_is_still_created_once(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    storage.write("a/k", b"1", overwrite=False)
    with pytest.raises(FileExistsError, match="exists already"):
        storage.write("a/k", b"2", overwrite=False)
    assert storage.read("a/k") == b"1"
    assert everything(root) == ["a", "a/k"]


# durability


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced, named and removed, in order; temporary names as ``TMP``."""
    seen: list[tuple[str, str]] = []

    def name(path: object) -> str:
        text = Path(os.fsdecode(path)).name
        return "TMP" if text.startswith(TEMPORARY_PREFIX) else text

    fsync, link, unlink, replace = os.fsync, os.link, os.unlink, os.replace

    def record_fsync(descriptor: int) -> None:
        seen.append(("sync", name(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def record_link(old: str, new: str, **options: bool) -> None:
        seen.append(("link", name(new)))
        link(old, new, **options)

    def record_replace(old: Path, new: Path) -> Path:
        seen.append(("rename", name(new)))
        replace(old, new)
        return new

    def record_unlink(path: Path, missing_ok: bool = False) -> None:
        try:
            unlink(path)
        except FileNotFoundError:
            if not missing_ok:
                raise
        else:
            seen.append(("unlink", name(path)))

    if not Path("/proc/self/fd").exists():
        pytest.skip("which file is synced can be seen by /proc only")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    monkeypatch.setattr(Path, "replace", record_replace)
    monkeypatch.setattr(Path, "unlink", record_unlink)
    return seen


def test_a_write_is_durable_before_and_after_it_gets_its_name(
    storage: LocalStorage, events: list[tuple[str, str]], tmp_path: Path
) -> None:
    storage.write("a/b/k", b"1")
    made = [("sync", tmp_path.name), ("sync", "root"), ("sync", "a")]
    assert events == [("sync", "TMP"), *made, ("rename", "k"), ("sync", "b")]
    events.clear()
    storage.write("a/b/k", b"2")
    assert events == [("sync", "TMP"), ("rename", "k"), ("sync", "b")]
    events.clear()
    storage.write("a/b/j", b"2", overwrite=False)
    assert events == [("sync", "TMP"), ("link", "j"), ("unlink", "TMP"), ("sync", "b")]


def test_a_put_is_durable_before_and_after_it_gets_its_name(
    storage: LocalStorage, events: list[tuple[str, str]], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    storage.write("a/j", b"")
    events.clear()
    storage.put(source, "a/k")
    assert events == [("sync", "TMP"), ("rename", "k"), ("sync", "a")]
    events.clear()
    storage.put(source, "a/k", move=True)
    assert events == [("sync", "source"), ("rename", "k"), ("sync", "a")]


def test_a_deletion_is_durable_with_one_sync_for_each_folder(
    storage: LocalStorage, events: list[tuple[str, str]]
) -> None:
    for key in ["a/1", "a/2", "a/3", "b/1", "b/2"]:
        storage.write(key, b"")
    events.clear()
    storage.delete(["a/1", "a/2", "b/1", "b/2"])
    removed = [("unlink", "1"), ("unlink", "2")] * 2
    assert events[:4] == removed
    assert sorted(events[4:]) == [("sync", "a"), ("sync", "root")]


def test_what_may_wait_is_made_durable_before_the_next_durable_change_gets_its_name(
    storage: LocalStorage, events: list[tuple[str, str]], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"1")
    storage.write("gone", b"")
    events.clear()
    storage.write("list", b"1", durable=False)
    storage.put(source, "a/data", move=True, durable=False)
    storage.delete(["gone"], durable=False)
    assert events == [("rename", "list"), ("rename", "data"), ("unlink", "gone")]
    events.clear()
    storage.write("a/manifest", b"1", overwrite=False)
    files, folders = [("sync", "list"), ("sync", "data")], [("sync", "root"), ("sync", "a")]
    assert events[:5] == [("sync", "TMP"), *files, *folders]
    assert events[5:] == [("link", "manifest"), ("unlink", "TMP"), ("sync", "a")]
    events.clear()
    storage.write("a/manifest", b"2")
    assert events == [("sync", "TMP"), ("rename", "manifest"), ("sync", "a")]


def test_while_something_cannot_be_made_durable_no_later_change_takes_effect(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.sameopenfile(descriptor, data.fileno()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    storage.write("data", b"1", durable=False)
    data = storage.local_path("data").open("rb")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"manifest.*Input/output error \(for '"):
            storage.write("manifest", b"1")
    data.close()
    assert [blob.key for blob in storage.list()] == ["data"]
    storage.write("manifest", b"1")


def test_a_child_that_was_forked_while_files_were_made_durable_can_write(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write("data", b"1", durable=False)
    fsync, forked = os.fsync, []

    def fork_now(descriptor: int) -> None:
        if not forked:
            forked.append(os.fork())
            if forked == [0]:
                signal.alarm(20)  # ends a child that hangs
                storage.write("child", b"1")
                os._exit(0)
        fsync(descriptor)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork in a process with threads
        warnings.simplefilter("ignore", RuntimeWarning)
        monkeypatch.setattr(os, "fsync", fork_now)
        storage.write("parent", b"1")
    assert os.waitpid(forked[0], 0)[1] == 0
    assert [blob.key for blob in storage.list()] == ["child", "data", "parent"]


# dead writers

WRITER = textwrap.dedent("""
    import os, sys, time
    from vibe_store.storage.local import LocalStorage
    real = os.fsync
    def stop(descriptor):
        if "vibe-store-tmp" in os.readlink(f"/proc/self/fd/{descriptor}"):
            print("writing", flush=True)
            time.sleep(60)
        real(descriptor)
    os.fsync = stop
    LocalStorage(sys.argv[1]).write(sys.argv[2], b"x" * 100000)
""")


def test_a_killed_writer_leaves_the_old_object_and_a_hidden_file_that_is_swept(
    storage: LocalStorage, root: Path
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("the writer is stopped by means of /proc")
    storage.write("step_1/k", b"old")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(root), key], stdout=subprocess.PIPE, text=True)
        for key in ["step_1/k", "step_2/k"]
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
        storage.sweep()
        assert sum(TEMPORARY_PREFIX in name for name in everything(root)) == 2  # both writers live
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert keys_of(storage) == ["step_1/k"]
    assert storage.read("step_1/k") == b"old"
    assert sum(TEMPORARY_PREFIX in name for name in everything(root)) == 2
    storage.sweep()
    assert everything(root) == ["step_1", "step_1/k"]


def test_a_sweep_of_nothing_makes_nothing(storage: LocalStorage, root: Path) -> None:
    storage.sweep()
    assert not root.exists()
    shutil.rmtree(root, ignore_errors=True)


def test_a_sweep_leaves_what_is_not_ours(storage: LocalStorage, root: Path) -> None:
    storage.write("a/k", b"1")
    (root / "a" / ".tmp-other").write_bytes(b"")
    (root / "empty").mkdir()
    storage.sweep()
    assert everything(root) == ["a", "a/.tmp-other", "a/k", "empty"]


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_url_of_a_local_folder_opens_it_as_its_path_does(tmp_path: Path, scheme: str) -> None:
    storage = open_storage(f"{scheme}://{tmp_path}")
    assert isinstance(storage, LocalStorage)
    assert storage.url == str(tmp_path)
