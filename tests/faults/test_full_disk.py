"""A disk that is full: the save that does not fit says so, hurts nothing, and works once there is room."""

import errno
import gc
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    initialize_checkpoint_dir,
    load_checkpoint,
    load_eqx,
    save_checkpoint,
    save_eqx,
    verify_checkpoint,
)
from vibe_store.errors import SaveFailedError
from vibe_store.run_dir import RunDir

# An Orbax that cannot write leaves coroutines whose event loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 512 * PAGE
BIG = 300 * PAGE
"""Bytes of a state of which one fits, and two do not."""

PAGES_AT_A_TIME = {"eqx": 1, "orbax": 5}  # which needs many more of them, and much longer to fail


class Disk:
    """A file system of :data:`SIZE` bytes, some of which a file of ballast takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path / "run" / "checkpoints"
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def leave(self, free: int) -> None:
        """Leave so many bytes free, a whole number of pages."""
        self._ballast.unlink(missing_ok=True)
        with self._ballast.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, self.free - free)
        assert self.free == free

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def clear(self) -> None:
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def mounted() -> Iterator[Disk]:
    """A real small file system, where this process may mount one.

    It is not among the folders of pytest, which clears those of earlier runs, or of others under way.
    """
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("this fills a real small file system, which only root may mount")
    place = Path(tempfile.mkdtemp(prefix="vibe_store-disk-"))
    options = ["-t", "tmpfs", "-o", f"size={SIZE},nr_inodes=1000", "vibe_store-disk"]
    done = subprocess.run([mount, *options, place], capture_output=True, text=True, check=False)
    try:
        if done.returncode != 0:
            pytest.skip(f"this fills a real small file system, and mount says: {done.stderr.strip()}")
        try:
            yield Disk(place)
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        place.rmdir()


@pytest.fixture(autouse=True)
def what_orbax_leaves() -> Iterator[None]:
    """Collect the coroutines of an Orbax that failed here, lest their complaints are laid to another test."""
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _: None)
        gc.collect()


@pytest.fixture
def disk(mounted: Disk) -> Iterator[Disk]:
    yield mounted
    mounted.clear()


def big(seed: int) -> dict[str, Any]:
    return {"w": np.full(BIG // 8, seed, np.int64), "seed": seed}


LIKE = big(0)


def holds(root: Path, step: int | None, seed: int) -> bool:
    loaded = load_checkpoint(root, LIKE, step=step)
    return bool(loaded["seed"] == seed and (loaded["w"] == seed).all())


def by_manager(root: Path, serializer: str, step: int, seed: int) -> None:
    with CheckpointManager(root, serializer=serializer, async_timeout_secs=None) as manager:
        manager.save(step, big(seed))


def in_background(root: Path, serializer: str, step: int, seed: int) -> None:
    with CheckpointManager(root, serializer=serializer) as manager:
        manager.save(step, big(seed))
        manager.wait()


def at_once(root: Path, serializer: str, step: int, seed: int) -> None:
    save_checkpoint(root, big(seed), step=step, serializer=serializer)


DOORS: dict[str, Callable[[Path, str, int, int], None]] = {
    "manager": by_manager,
    "manager in the background": in_background,
    "save_checkpoint": at_once,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_save_that_does_not_fit_says_so_gives_back_the_space_and_works_once_there_is_room(
    door: str, disk: Disk, serializer: str, writing: ModuleType
) -> None:
    by_manager(disk.root, serializer, 1, 1)
    free = disk.free
    with pytest.raises((SaveFailedError, OSError), match=r"(?s)step.?2\b.*No space left on device") as raised:
        DOORS[door](disk.root, serializer, 2, 2)
    assert str(disk.path) in str(raised.value)
    assert isinstance(raised.value, OSError) or isinstance(raised.value.__cause__, OSError)
    error = raised.value if isinstance(raised.value, OSError) else raised.value.__cause__
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    assert disk.free >= free - PAGE  # the lock file
    assert CheckpointManager(disk.root).all_steps() == [1]
    assert not (disk.root / "step_2").exists()
    assert holds(disk.root, 1, 1)
    assert verify_checkpoint(disk.root) == []
    shutil.rmtree(disk.root / "step_1")
    DOORS[door](disk.root, serializer, 2, 2)
    assert holds(disk.root, 2, 2)
    assert writing.stray(disk.root) == set()


@pytest.mark.parametrize("step", [1, None])
def test_a_replacement_that_does_not_fit_leaves_the_old_checkpoint(
    step: int | None, disk: Disk, serializer: str, writing: ModuleType
) -> None:
    save_checkpoint(disk.root, big(1), step=step, serializer=serializer)
    free = disk.free
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(disk.root, big(2), step=step, serializer=serializer)
    assert disk.free == free
    assert holds(disk.root, step, 1)
    assert writing.stray(disk.root) == set()
    save_checkpoint(disk.root, {"seed": 3}, step=step, serializer=serializer)
    assert load_checkpoint(disk.root, {"seed": 0}, step=step) == {"seed": 3}
    assert writing.stray(disk.root) == set()


def test_a_manager_goes_on_after_a_save_that_did_not_fit(disk: Disk, serializer: str) -> None:
    with CheckpointManager(disk.root, serializer=serializer) as manager:
        manager.save(1, big(1))
        manager.save(2, big(2))
        with pytest.raises(SaveFailedError, match="No space left on device") as raised:
            manager.save(3, {"seed": 3})
        assert raised.value.step == 2
        manager.save(3, {"seed": 3})
        assert manager.all_steps() == [1, 3]
        assert holds(disk.root, 1, 1)


def test_a_single_file_that_does_not_fit_leaves_the_one_that_was_there(disk: Disk) -> None:
    path = disk.path / "folder" / "state.eqx"
    save_eqx(path, big(1))
    free = disk.free
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_eqx(path, big(2))
    assert raised.value.errno == errno.ENOSPC
    assert str(path) in str(raised.value)
    assert disk.free == free
    assert list(path.parent.iterdir()) == [path]
    assert load_eqx(path, LIKE)["seed"] == 1
    path.unlink()
    save_eqx(path, big(2))
    assert load_eqx(path, LIKE)["seed"] == 2


def test_however_little_room_there_is_a_save_is_whole_or_leaves_nothing(
    disk: Disk, serializer: str, writing: ModuleType
) -> None:
    root = str(disk.root)
    writing.prepare(disk.root, serializer, {1: 1})
    for pages in itertools.count(step=PAGES_AT_A_TIME[serializer]):
        disk.leave(pages * PAGE)
        failure: OSError | None = None
        try:
            save_checkpoint(root, writing.tree(2), step=2, serializer=serializer, **writing.content(2))
        except OSError as error:
            failure = error
        if failure is None:
            break
        assert failure.errno == errno.ENOSPC
        assert disk.free == pages * PAGE
        assert writing.held(disk.root) == {1: 1}
        assert writing.stray(disk.root) == set()
    assert pages >= 5
    assert writing.held(disk.root) == {1: 1, 2: 2}
    assert writing.stray(disk.root) == set()


def test_however_little_room_there_is_a_save_that_fits_prunes_too(
    disk: Disk, serializer: str, writing: ModuleType
) -> None:
    writing.prepare(disk.root, serializer, {1: 1, 2: 2})
    for pages in itertools.count(step=PAGES_AT_A_TIME[serializer]):
        disk.leave(pages * PAGE)
        failure: SaveFailedError | None = None
        try:
            writing.SCENES["save that prunes"].act(str(disk.root), serializer)
        except SaveFailedError as error:
            failure = error
        if failure is None:
            break
        assert failure.step == 3
        assert writing.held(disk.root) == {1: 1, 2: 2}
        assert writing.stray(disk.root) == set()
    assert pages >= 5
    assert writing.held(disk.root) == {3: 3}
    assert writing.stray(disk.root) == set()


def test_a_lock_that_could_not_be_signed_is_given_back(disk: Disk, writing: ModuleType, writers: Any) -> None:
    disk.leave(0)
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(disk.root, {"seed": 1}, step=1)
    disk.make_room()
    assert writers.run_scene(disk.root, "first save", "eqx") == 0
    assert writing.held(disk.root) == {1: 1}


@pytest.mark.parametrize("how", ["cleanup", "wipe"])
def test_on_a_full_disk_checkpoints_can_be_deleted(
    how: str, disk: Disk, serializer: str, writing: ModuleType
) -> None:
    writing.prepare(disk.root, serializer, {1: 1, 2: 2})
    disk.leave(0)
    if how == "cleanup":
        RunDir(base_dir=disk.path, run_id="run").cleanup_checkpoints(keep=1)
        assert writing.held(disk.root) == {2: 2}
    else:
        initialize_checkpoint_dir(disk.root, overwrite=True)
        assert writing.held(disk.root) == {}
    assert disk.free > 0
    assert writing.stray(disk.root) == set()
