"""Files and folders get what the umask of the process leaves; a replaced file keeps its permissions."""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import CheckpointManager, save_checkpoint, save_eqx
from vibe_store.run_dir import RunDir


@pytest.fixture(params=[0o077, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _check(root: Path, umask: int) -> list[str]:
    paths = [path for path in root.rglob("*") if not path.is_symlink()]
    wrong = {
        str(path.relative_to(root)): oct(_mode(path))
        for path in paths
        if _mode(path) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong
    return [str(path.relative_to(root)) for path in paths]


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_a_checkpoint_has_the_permissions_that_the_umask_leaves(
    serializer: str, umask: int, tmp_path: Path, tree: Any
) -> None:
    root = tmp_path / "new/checkpoints"
    with CheckpointManager(root, serializer=serializer) as manager:
        manager.save(1, tree, metadata={"a": 1}, items={"runner": [1.5]})
        manager.wait()
        manager.pin(1)
    save_checkpoint(root, tree, step=1, metadata={"a": 2}, serializer=serializer)  # under other names
    names = _check(tmp_path, umask)
    assert any("writer.lock" in name for name in names)
    assert any("pinned" in name for name in names)


def test_what_is_under_way_has_the_permissions_that_the_umask_leaves(
    umask: int, tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staged files and the list of a save's keys, at the moment before its commit."""
    root = tmp_path / "checkpoints"
    save_checkpoint(root, tree, step=1)
    seen: list[str] = []

    def commit(*_: Any, **__: Any) -> None:
        seen.extend(_check(tmp_path, umask))
        raise OSError(5, "stop here")

    monkeypatch.setattr("vibe_store.storage.local.LocalStorage.put", commit)
    with pytest.raises(OSError, match="stop here"):
        save_checkpoint(root, tree, step=1)
    assert any("/staging/" in name and name.endswith(".eqx") for name in seen)
    assert any("/pending-" in name for name in seen)


def test_a_run_directory_has_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    run = RunDir("run", base_dir=tmp_path / "runs")
    run.save_config({"a": 1})
    run.log_path().touch()
    save_checkpoint(run.checkpoints, 1, step=1)
    run.mark_best(1)
    _check(tmp_path, umask)


def test_a_new_file_of_save_eqx_has_the_permissions_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    save_eqx(tmp_path / "new/model.eqx", 1)
    _check(tmp_path, umask)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_a_file_that_save_eqx_replaces_keeps_its_permissions(mode: int, umask: int, tmp_path: Path) -> None:
    del umask
    path = tmp_path / "model.eqx"
    path.touch()
    path.chmod(mode)
    save_eqx(path, 1)
    assert _mode(path) == mode


_sizes: list[tuple[int, int]] = []
_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening and event == "os.chmod" and isinstance(arguments[0], int):
        _sizes.append((os.fstat(arguments[0]).st_size, arguments[1]))


def test_a_private_file_is_private_before_anything_is_in_it(tmp_path: Path) -> None:
    global _listening
    path = tmp_path / "model.eqx"
    path.touch()
    path.chmod(0o600)
    sys.addaudithook(_listen)
    _listening = True
    try:
        save_eqx(path, 1)
    finally:
        _listening = False
    assert _sizes == [(0, 0o600)]
