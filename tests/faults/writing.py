"""Saving, replacing and deleting in processes that are killed on the way, and what must hold afterwards.

A tree has NumPy leaves only, so that saving it needs no computing with JAX.
"""

import io
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vibe_store.checkpoint.directory import initialize_checkpoint_dir
from vibe_store.checkpoint.looking import list_checkpoints, load_manifest, verify_checkpoint
from vibe_store.checkpoint.manager import CheckpointManager
from vibe_store.checkpoint.oneshot import load_checkpoint, load_metadata, save_checkpoint
from vibe_store.run_dir import RunDir
from vibe_store.serializers.eqx import save_eqx

LATER_STEP = 90
Steps = Mapping[int | None, int]
"""The seed of what each step holds; the step None is the checkpoint of the directory itself."""


def tree(seed: int) -> dict[str, Any]:
    """A small pytree of NumPy leaves, another one for each seed."""
    random = np.random.default_rng(seed)
    return {
        "w": random.normal(size=(3, 4)).astype(np.float32),
        "n": np.arange(seed, seed + 5),
        "list": [np.float64(seed), f"tree {seed}"],
        "seed": seed,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two such trees are the same, bit for bit."""
    return one.keys() == other.keys() and all(_bits(one[name]) == _bits(other[name]) for name in one)


def _bits(leaf: Any) -> Any:
    if isinstance(leaf, list):
        return [_bits(each) for each in leaf]
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf), leaf.dtype, leaf.shape, leaf.tobytes()
    return type(leaf), leaf


def content(seed: int) -> dict[str, Any]:
    """What goes with a state, by the names of ``save``'s arguments."""
    return {"items": {"aux": tree(seed + 1000)}, "metadata": {"seed": seed}, "metrics": {"score": seed}}


@dataclass(frozen=True)
class Scene:
    """One thing to do in a directory.

    Attributes:
        before: the checkpoints that are there.
        act: does it, in the directory and with the serializer of that name.
        stages: every state in which the directory may ever be seen, in order; the last is that of the end.
    """

    before: Steps
    act: Callable[[str, str], None]
    stages: tuple[Steps, ...]


def _save(root: str, serializer: str, step: int, seed: int, **options: Any) -> None:
    with CheckpointManager(root, serializer=serializer, **options) as manager:
        manager.save(step, tree(seed), **content(seed))


def _replace(root: str, serializer: str, step: int | None, seed: int) -> None:
    save_checkpoint(root, tree(seed), step=step, serializer=serializer, **content(seed))


def _clean_up(root: str) -> None:
    RunDir(base_dir=Path(root).parents[1], run_id=Path(root).parent.name).cleanup_checkpoints(keep=1)


SCENES: Mapping[str, Scene] = {
    "first save": Scene({}, lambda root, by: _save(root, by, 1, 1), ({}, {1: 1})),
    "next save": Scene({1: 1}, lambda root, by: _save(root, by, 2, 2), ({1: 1}, {1: 1, 2: 2})),
    "replacement": Scene(
        {1: 1, 2: 2}, lambda root, by: _replace(root, by, 2, 22), ({1: 1, 2: 2}, {1: 1, 2: 22})
    ),
    "replacement without a step": Scene(
        {1: 1, None: 5}, lambda root, by: _replace(root, by, None, 55), ({1: 1, None: 5}, {1: 1, None: 55})
    ),
    "save that prunes": Scene(
        {1: 1, 2: 2},
        lambda root, by: _save(root, by, 3, 3, max_to_keep=1),
        ({1: 1, 2: 2}, {1: 1, 2: 2, 3: 3}, {2: 2, 3: 3}, {3: 3}),
    ),
    "deletion": Scene({1: 1, 2: 2}, lambda root, _: _clean_up(root), ({1: 1, 2: 2}, {2: 2})),
    "wipe": Scene(
        {1: 1, 2: 2},
        lambda root, _: initialize_checkpoint_dir(root, overwrite=True)[0].close(),
        ({1: 1, 2: 2}, {2: 2}, {}),
    ),
}


def prepare(root: Path, serializer: str, steps: Steps) -> None:
    """Write checkpoints."""
    for step, seed in steps.items():
        _replace(str(root), serializer, step, seed)


def held(root: Path) -> dict[int | None, int]:
    """Return the seed of each checkpoint, having made sure that all of it is there, and of no half a one."""
    found: dict[int | None, int] = {}
    listed = [(status.step, status.status) for status in list_checkpoints(root)]
    assert {status for _, status in listed} <= {"committed"}, listed
    for step, _ in listed:
        found[step] = _seed_of(root, step)
    steps = [step for step, _ in listed]
    reader = CheckpointManager(root)
    assert reader.all_steps() == steps
    run = RunDir(base_dir=root.parents[1], run_id=root.parent.name)
    assert [step for step, _ in run.list_checkpoints()] == steps
    if steps:
        assert same(reader.restore(None, tree(0)), tree(found[steps[-1]]))
    if (root / "manifest.json").exists():
        state = load_checkpoint(root, tree(0))
        found[None] = int(state["seed"])
        assert same(state, tree(found[None]))
        assert load_metadata(root) == {"seed": found[None]}
    if found:
        assert verify_checkpoint(root) == []
    return found


def _seed_of(root: Path, step: int) -> int:
    reader = CheckpointManager(root)
    state, items = reader.restore(step, tree(0), items={"aux": tree(0)})
    seed = int(state["seed"])
    assert same(state, tree(seed))
    assert same(items["aux"], tree(seed + 1000))
    assert reader.metadata(step) == {"seed": seed}
    return seed


def check_next_writer(root: Path, serializer: str, before: Steps) -> None:
    """Check that another writer saves and leaves all else alone, and that nothing stray stays."""
    _save(str(root), serializer, LATER_STEP, LATER_STEP, max_to_keep=100)
    assert held(root) == {**before, LATER_STEP: LATER_STEP}
    left = stray(root)
    assert not left, left


def stray(root: Path) -> set[str]:
    """Every file and folder that belongs to no checkpoint, less those that are ours for good."""
    named = {".vibe_store/writer.lock"}
    steps: list[int | None] = [status.step for status in list_checkpoints(root)]
    if (root / "manifest.json").exists():
        steps.append(None)
    for step in steps:
        folder = "" if step is None else f"step_{step}/"
        named |= {f"{folder}manifest.json"}
        named |= {f"{folder}{file.key}" for file in load_manifest(root, step=step).files}
    folders = {str(parent) for name in named for parent in Path(name).parents}
    empty = {".vibe_store/staging"}
    return {str(path.relative_to(root)) for path in root.rglob("*")} - named - folders - empty


_CHANGING = (
    "mkdir", "rmdir", "rename", "replace", "link", "symlink", "unlink", "remove", "write", "writev",
    "pwrite", "pwritev", "truncate", "ftruncate", "fsync", "fdatasync", "copy_file_range", "sendfile",
    "chmod", "fchmod", "posix_fallocate",
)  # fmt: skip
_OF_TWO_PATHS = frozenset({"rename", "replace", "link", "symlink"})
_AUDITED = frozenset(
    {"os.mkdir", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.truncate", "os.chmod"}
)


class Calls:
    """Counts every call of this process that changes a file, and kills it before one of them.

    Attributes:
        made: the calls so far, each its name and the paths that it was about; of one that failed, the name.
        unseen: what changed something below the root and was not counted.
    """

    def __init__(self, root: str, kill_at: int | None, *, torn: bool) -> None:
        self.made: list[tuple[str, ...]] = []
        self.unseen: list[str] = []
        self._root, self._kill_at, self._torn = root, kill_at, torn
        self._inside = threading.local()

    def install(self) -> None:
        """Begin to count, for the rest of this process's life."""
        for name in _CHANGING:
            if hasattr(os, name):
                setattr(os, name, self._counted(name, getattr(os, name), lambda *_, **__: True))
        os.open = self._counted(
            "open", os.open, lambda _, flags, *__, **___: flags & (os.O_CREAT | os.O_TRUNC)
        )
        io.open = self._opened(io.open)
        sys.addaudithook(self._audit)

    def due(self, name: str, paths: tuple[Any, ...], half: Callable[[], object] | None = None) -> int:
        """Count a call; or die instead of it, having done the first half of it, if it has one."""
        if len(self.made) == self._kill_at:
            if self._torn and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        self.made.append((name, *(_path(each) for each in paths)))
        return len(self.made) - 1

    def _counted(
        self, name: str, call: Callable[..., Any], matters: Callable[..., Any]
    ) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            index = None
            if matters(*args, **options):
                index = self.due(name, args[: 2 if name in _OF_TWO_PATHS else 1])
            self._inside.call = True
            try:
                return call(*args, **options)
            except OSError:
                if index is not None:
                    self.made[index] = (f"failed {name}",)
                raise
            finally:
                self._inside.call = False

        return counted

    def _opened(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a version of ``open`` whose binary files count each write that reaches the system."""
        due = self.due

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                half = len(bytes(data)) // 2
                due("write", (self.fileno(),), lambda: super(File, self).write(bytes(data)[:half]))
                return super().write(data)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if "b" not in mode or not set(mode) & set("wxa"):
                return plain(file, mode, buffering, *args, **options)
            due("open", (file,))
            self._inside.call = True
            try:
                raw = File(file, mode.replace("b", ""))
            finally:
                self._inside.call = False
            return raw if buffering == 0 else io.BufferedWriter(raw, max(buffering, io.DEFAULT_BUFFER_SIZE))

        return opened

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if getattr(self._inside, "call", False):
            return
        if event == "open":
            _, mode, flags = args
            changing = flags & (os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if not changing and not (mode and flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event not in _AUDITED:
            return
        if str(args[0]).startswith(self._root):
            self.unseen.append(f"{event} {args}")


def _path(place: Any) -> str:
    """The path of an argument, be it a path or, where the system tells, the number of an open file."""
    if isinstance(place, int):
        return str(Path(f"/proc/self/fd/{place}").readlink()) if sys.platform == "linux" else ""
    return os.fspath(place)


def run_scene(
    root: str,
    scene: str,
    serializer: str,
    *,
    kill_at: int | None = None,
    torn: bool = False,
    log: str | None = None,
) -> None:
    """Act a scene, or be killed at a call; report the calls in the file ``log``."""
    calls = Calls(root, kill_at, torn=torn)
    with Path(os.devnull if log is None else log).open("w") as report:  # before calls are counted
        calls.install()
        SCENES[scene].act(root, serializer)
        json.dump({"made": calls.made, "unseen": calls.unseen}, report)


def save_file(path: str, kill_at: int, torn: bool) -> None:
    """Replace a single file, or be killed at a call."""
    Calls(path, kill_at, torn=torn).install()
    save_eqx(path, tree(2))


def save_for_ever(root: str, serializer: str, log: str) -> None:
    """Save step after step, and at times replace one; write a line once each is committed."""
    with (
        Path(log).open("a", buffering=1) as said,
        CheckpointManager(root, serializer=serializer, max_to_keep=2) as manager,
    ):
        said.write("ready\n")
        for step in itertools.count((manager.latest_step() or 0) + 1):
            manager.save(step, tree(100 * step), **content(100 * step))
            manager.wait()
            said.write(f"{step} {100 * step}\n")
            if step % 3 == 0:
                _replace(root, serializer, step, 100 * step + 1)
                said.write(f"{step} {100 * step + 1}\n")
