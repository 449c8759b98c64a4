"""A writer is killed at every call that changes a file, and no checkpoint is ever seen by halves."""

import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import load_eqx, load_manifest, save_eqx

SCENES = [
    "first save",
    "next save",
    "replacement",
    "replacement without a step",
    "save that prunes",
    "deletion",
    "wipe",
]


def _fresh(folder: Path, original: Path) -> Path:
    """A copy of a directory, where a RunDir would have it."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    root = folder / "run" / "checkpoints"
    root.parent.mkdir()
    if original.exists():
        shutil.copytree(original, root, symlinks=True)
    return root


def _original(folder: Path, scene: str, serializer: str, writing: ModuleType) -> Path:
    original = folder / f"{scene} by {serializer}"
    if not original.exists():
        writing.prepare(original, serializer, writing.SCENES[scene].before)
    return original


@pytest.mark.parametrize("torn", [False, True], ids=["before it", "in the middle of a write"])
@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_any_call_each_checkpoint_is_whole_and_the_next_writer_sweeps(
    scene: str, torn: bool, fast_path: Path, writing: ModuleType, writers: Any
) -> None:
    original = _original(fast_path, scene, "eqx", writing)
    names = [name for name, *_ in writers.calls_of(_fresh(fast_path, original), scene, "eqx")]
    assert len(names) >= 12
    stages = list(writing.SCENES[scene].stages)
    reached = []
    for index, name in enumerate(names):
        if torn and name != "write":
            continue
        root = _fresh(fast_path, original)
        status = writers.run_scene(root, scene, "eqx", kill_at=index, torn=torn)
        assert status == -signal.SIGKILL
        found = writing.held(root)
        reached.append(stages.index(found))
        if not (index and names[index - 1] == "fsync"):  # else the disk is as it was one kill before
            writing.check_next_writer(root, "eqx", found)
    assert reached == sorted(reached)  # what was done once stays done
    if not torn:
        assert set(reached) == set(range(len(stages)))


@pytest.mark.parametrize("torn", [False, True], ids=["before it", "in the middle of a write"])
def test_killed_at_any_call_a_single_file_is_the_old_one_or_the_new_one(
    torn: bool, fast_path: Path, writing: ModuleType, writers: Any
) -> None:
    path, reached = fast_path / "state.eqx", []
    status = -signal.SIGKILL
    while status == -signal.SIGKILL:
        save_eqx(path, writing.tree(1))
        child = writers.start("save_file(**arguments)", path=str(path), kill_at=len(reached), torn=torn)
        status = child.wait()
        loaded = load_eqx(path, writing.tree(0))
        assert writing.same(loaded, writing.tree(loaded["seed"]))
        reached.append(loaded["seed"])
    assert status == 0, child.output
    assert reached == sorted(reached)
    assert len(reached) >= 5
    assert set(reached) == {1, 2}


class Disk:
    """What would surely be on the disk, were the power to fail: what was synced after its last change."""

    def __init__(self) -> None:
        self.durable: set[str] = set()
        """Files whose bytes are."""
        self.loose: set[str] = set()
        """Files and folders whose names may be missing, or still be there."""

    def follow(self, name: str, *paths: str) -> None:
        """Take note of one call."""
        if name.startswith("failed "):
            return
        if name in {"fsync", "fdatasync"}:
            self.durable.add(paths[0])
            self.loose -= {path for path in self.loose if str(Path(path).parent) == paths[0]}
        elif name in {"rename", "replace", "link"}:
            old, new = paths
            self.durable -= {path for path in self.durable if path == new or path.startswith(f"{new}/")}
            self.durable |= {
                new + path[len(old) :] for path in self.durable if f"{path}/".startswith(f"{old}/")
            }
            self.loose |= set(paths)
        elif name in {"open", "mkdir", "unlink", "remove", "rmdir", "symlink"}:
            self.loose.add(paths[-1])
            self.durable.discard(paths[-1])
        else:
            self.durable.discard(paths[0])

    def holds(self, path: Path, root: Path) -> bool:
        """Whether the bytes of a file are there, and the names of the file and its folders."""
        names = [path, *(folder for folder in path.parents if folder.is_relative_to(root))]
        return str(path) in self.durable and not self.loose & set(map(str, names))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd to tell files apart")
@pytest.mark.parametrize("scene", ["first save", "next save", "replacement", "save that prunes"])
def test_all_that_a_manifest_names_is_durable_before_it_is_there_and_it_itself_when_the_save_returns(
    scene: str, serializer: str, fast_path: Path, writing: ModuleType, writers: Any
) -> None:
    root = _fresh(fast_path, _original(fast_path, scene, serializer, writing))
    calls = writers.calls_of(root, scene, serializer)
    last = writing.SCENES[scene].stages[-1]
    step = max(step for step, seed in last.items() if writing.SCENES[scene].before.get(step) != seed)
    manifest = root / f"step_{step}" / "manifest.json"
    files = [manifest.parent / file.key for file in load_manifest(root, step=step).files]
    commits = [
        index
        for index, call in enumerate(calls)
        if call[0] in {"link", "replace"} and call[2] == str(manifest)
    ]
    assert len(commits) == 1
    disk = Disk()
    for index, call in enumerate(calls):
        if index == commits[0]:
            assert call[1] in disk.durable
            assert [path for path in files if not disk.holds(path, root)] == []
        disk.follow(*call)
        if index == commits[0]:
            assert not disk.holds(manifest, root)
    assert disk.holds(manifest, root)
