"""The start of a run: fresh, resumed, over what was there, or refused."""

import inspect
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import xxhash

from vibe_store.checkpoint import (
    CheckpointManager,
    initialize_checkpoint_dir,
    list_checkpoints,
    save_checkpoint,
)
from vibe_store.errors import (
    CheckpointsExistError,
    DamagedCheckpointWarning,
    InvalidValueError,
    NewerFormatError,
    UnknownProviderError,
)
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Fault, FaultyStorage


def test_it_takes_what_the_manager_takes_with_the_same_defaults() -> None:
    own = dict(inspect.signature(initialize_checkpoint_dir).parameters)
    for name in ("resume", "overwrite"):
        assert own.pop(name).default is False
    managers = inspect.signature(CheckpointManager).parameters
    assert {name: p.default for name, p in own.items()} == {name: p.default for name, p in managers.items()}


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_where_there_is_nothing_the_run_starts_fresh(
    storage: StorageBackend, scenarios: ModuleType, resume: bool, overwrite: bool
) -> None:
    manager, resuming = initialize_checkpoint_dir(storage, resume=resume, overwrite=overwrite)
    assert not resuming
    assert manager.latest_step() is None
    with manager:
        assert manager.save(0, scenarios.tree(0))


def test_with_resume_it_goes_on_from_the_newest(storage: StorageBackend, scenarios: ModuleType) -> None:
    scenarios.prepare(storage)
    manager, resuming = initialize_checkpoint_dir(storage, resume=True, save_interval_steps=2)
    assert resuming
    step = manager.latest_step()
    assert step == 3
    assert scenarios.same(manager.restore(step, scenarios.tree(0)), scenarios.tree(3))
    assert not manager.save(5, scenarios.tree(5))


def test_with_overwrite_every_step_and_best_go_and_foreign_files_stay(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    scenarios.prepare(storage)
    storage.write("notes.txt", b"mine")
    storage.write("step_x/notes.txt", b"mine")
    local = storage.local_path("best")
    if local is None:
        storage.write("best", b"step_2\n")
    else:
        local.symlink_to("step_2")
    manager, resuming = initialize_checkpoint_dir(storage, overwrite=True)
    assert not resuming
    assert manager.all_steps() == []
    assert list_checkpoints(storage) == []
    of_the_writer = {".vibe_store/writer.lock", ".vibe_store/writer.json"}
    assert scenarios.keys_of(storage) - of_the_writer == {"notes.txt", "step_x/notes.txt"}
    with manager:
        assert manager.save(1, scenarios.tree(9))


def test_with_neither_existing_checkpoints_are_an_error_and_stay(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    scenarios.prepare(storage)
    before = scenarios.keys_of(storage)
    with pytest.raises(
        CheckpointsExistError, match=r"already holds the steps \[1, 2, 3\]\. Give resume=True"
    ):
        initialize_checkpoint_dir(storage)
    with pytest.raises(FileExistsError):
        initialize_checkpoint_dir(storage)
    assert scenarios.keys_of(storage) == before


def test_with_both_it_is_an_error_and_nothing_is_lost(storage: StorageBackend, scenarios: ModuleType) -> None:
    scenarios.prepare(storage)
    with pytest.raises(InvalidValueError, match="give one"):
        initialize_checkpoint_dir(storage, resume=True, overwrite=True)
    assert CheckpointManager(storage).all_steps() == [1, 2, 3]


def test_a_bad_argument_is_refused_before_anything_is_wiped(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    scenarios.prepare(storage)
    with pytest.raises(InvalidValueError, match="max_to_keep"):
        initialize_checkpoint_dir(storage, overwrite=True, max_to_keep=0)
    assert CheckpointManager(storage).all_steps() == [1, 2, 3]


def test_stale_files_alone_are_nothing_to_resume_from(tmp_path: Path, scenarios: ModuleType) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_6").mkdir()
    (tmp_path / "step_6" / "state.eqx").write_text("half")
    manager, resuming = initialize_checkpoint_dir(tmp_path, resume=True)
    assert not resuming
    assert manager.save(0, scenarios.tree(0))
    manager.close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("file", ["state.eqx", "aux.eqx", "manifest.json", "metadata.json"])
def test_damaged_newest_steps_are_set_aside_so_that_the_latest_restores(
    tmp_path: Path, scenarios: ModuleType, file: str
) -> None:
    storage = LocalStorage(str(tmp_path))
    scenarios.prepare(storage)
    for step in (2, 3):
        path = tmp_path / f"step_{step}" / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    before = {path: path.read_bytes() for path in tmp_path.glob("step_*/*") if path.name != "manifest.json"}
    manifests = [(tmp_path / f"step_{step}" / "manifest.json").read_bytes() for step in (2, 3)]
    with pytest.warns(DamagedCheckpointWarning) as warned:
        manager, resuming = initialize_checkpoint_dir(tmp_path, resume=True)
    assert [str(each.message)[:6] for each in warned] == ["Step 3", "Step 2"]
    assert {each.filename for each in warned} == {__file__}
    assert resuming
    assert manager.latest_step() == 1
    assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(1))
    assert {path: path.read_bytes() for path in before} == before
    kept = [next((tmp_path / f"step_{step}").glob("manifest.damaged-*.json")) for step in (2, 3)]
    assert [path.read_bytes() for path in kept] == manifests
    assert [status.status for status in list_checkpoints(tmp_path)] == ["committed", "set-aside", "set-aside"]
    with manager:
        assert manager.save(3, scenarios.tree(33))
        assert scenarios.same(manager.restore(3, scenarios.tree(0)), scenarios.tree(33))
    assert {path: path.read_bytes() for path in before} == before


def test_where_every_step_is_damaged_the_run_starts_fresh_and_says_so(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(1), step=1)
    (tmp_path / "step_1" / "state.eqx").unlink()
    with pytest.warns(DamagedCheckpointWarning, match="Step 1"):
        _, resuming = initialize_checkpoint_dir(tmp_path, resume=True)
    assert not resuming


def test_a_newest_step_of_a_newer_format_is_an_error_and_is_not_set_aside(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    path = tmp_path / "step_3" / "manifest.json"
    body = path.read_bytes().partition(b"\n")[2].replace(b'"format": 1', b'"format": 2')
    checksum = xxhash.xxh3_128_hexdigest(body).encode()
    path.write_bytes(b'{"checksum": "' + checksum + b'",\n' + body)
    with pytest.raises(NewerFormatError, match="format 2"):
        initialize_checkpoint_dir(tmp_path, resume=True)
    with pytest.raises(NewerFormatError, match="format 2"):
        CheckpointManager(tmp_path).restore(None, scenarios.tree(0))
    assert path.exists()
    assert [found.status for found in list_checkpoints(tmp_path)] == ["committed", "committed", "newer"]


@pytest.mark.parametrize("how", ["before", "after"])
def test_whichever_call_of_setting_a_step_aside_fails_nothing_is_lost(
    tmp_path: Path, scenarios: ModuleType, how: Literal["before", "after"]
) -> None:
    index, reached = 0, True
    while reached:
        inner = LocalStorage(str(tmp_path / str(index)))
        scenarios.prepare(inner)
        inner.write("step_3/state.eqx", b"damaged")
        manifest = inner.read("step_3/manifest.json")
        faulty = FaultyStorage(inner, Fault(index, how))
        with warnings.catch_warnings(), suppress(OSError):
            warnings.simplefilter("ignore", DamagedCheckpointWarning)
            initialize_checkpoint_dir(faulty, resume=True)
        index, reached = index + 1, len(faulty.calls) > index
        assert {scenarios.held(inner, step) for step in (1, 2)} == {1, 2}
        assert inner.read("step_3/state.eqx") == b"damaged"
        kept = [blob.key for blob in inner.list("step_3/manifest")]
        assert {inner.read(key) for key in kept} == {manifest}
    assert index > 2


def test_overwriting_removes_a_best_that_leads_elsewhere_and_nothing_there(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path / "checkpoints")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "checkpoints" / "best").symlink_to(tmp_path / "mine")
    manager, _ = initialize_checkpoint_dir(tmp_path / "checkpoints", overwrite=True)
    assert manager.all_steps() == []
    assert not (tmp_path / "checkpoints" / "best").is_symlink()
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_a_damaged_manifest_does_not_hide_that_there_is_no_such_serializer(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": 1}, step=1)
    (tmp_path / "step_1" / "manifest.json").write_bytes(b"{")
    with pytest.raises(UnknownProviderError, match="There is no serializer 'nobody'"):
        initialize_checkpoint_dir(tmp_path, resume=True, serializer="nobody")
