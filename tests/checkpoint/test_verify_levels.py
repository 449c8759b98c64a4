"""How much is checked of what is loaded: everything by default, less when asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vibe_store import CheckpointManager, initialize_checkpoint_dir, load_checkpoint, save_checkpoint
from vibe_store.checkpoint.looking import load_manifest, verify_checkpoint
from vibe_store.errors import CorruptCheckpointError, DamagedCheckpointWarning, InvalidValueError
from vibe_store.storage.memory import MemoryStorage

TREE = {"a": np.arange(100)}
LIKE = {"a": np.zeros(100, int)}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(TREE["a"].tobytes()) + 8] ^= 64
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, TREE, step=1)
    flip(tmp_path / "step_1" / "state.eqx")
    return tmp_path


def test_everything_is_checked_by_default(flipped: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        load_checkpoint(flipped, LIKE, step=1)


@pytest.mark.parametrize("level", ["sizes", "off"])
def test_less_than_full_reads_a_changed_byte_as_it_is(flipped: Path, level: Any) -> None:
    assert load_checkpoint(flipped, LIKE, step=1, verify=level)["a"][1] == 65


@pytest.mark.parametrize("level", ["sizes", "off"])
def test_less_than_full_goes_for_a_part_too(flipped: Path, level: Any) -> None:
    save_checkpoint(flipped, {**TREE, "b": 1}, step=2)
    flip(flipped / "step_2" / "state.eqx")
    assert load_checkpoint(flipped, LIKE, step=2, partial=True, verify=level)["a"][1] == 65


def test_sizes_notices_a_file_that_was_cut(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TREE)
    cut(tmp_path / "state.eqx")
    with pytest.raises(CorruptCheckpointError, match="bytes instead of"):
        load_checkpoint(tmp_path, LIKE, verify="sizes")


def test_off_saves_what_can_be_saved_of_a_file_that_was_cut(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TREE)
    cut(tmp_path / "state.eqx")
    assert (load_checkpoint(tmp_path, LIKE, verify="off")["a"] == TREE["a"]).all()


def test_off_still_reads_no_leaf_that_is_not_all_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TREE)
    (tmp_path / "state.eqx").write_bytes((tmp_path / "state.eqx").read_bytes()[:500])
    with pytest.raises(CorruptCheckpointError, match="ended early"):
        load_checkpoint(tmp_path, LIKE, verify="off")


def test_off_reads_no_part_that_is_not_all_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {**TREE, "b": 1})
    (tmp_path / "state.eqx").write_bytes((tmp_path / "state.eqx").read_bytes()[:500])
    with pytest.raises(CorruptCheckpointError, match="ends at byte 500, within what is to be read"):
        load_checkpoint(tmp_path, LIKE, partial=True, verify="off")


def test_the_manager_restores_at_its_level(flipped: Path) -> None:
    with CheckpointManager(flipped, verify="sizes") as manager:
        assert manager.restore(1, LIKE)["a"][1] == 65
    with CheckpointManager(flipped) as manager, pytest.raises(CorruptCheckpointError, match="checksum"):
        manager.restore(1, LIKE)


def test_resuming_sets_aside_what_does_not_verify_at_the_level(flipped: Path) -> None:
    manager, resumed = initialize_checkpoint_dir(flipped, resume=True, verify="sizes")
    assert (resumed, manager.latest_step()) == (True, 1)
    with pytest.warns(DamagedCheckpointWarning, match="Step 1"):
        manager, resumed = initialize_checkpoint_dir(flipped, resume=True)
    assert (resumed, manager.latest_step()) == (False, None)


def test_verifying_sizes_looks_into_no_file(flipped: Path) -> None:
    assert len(verify_checkpoint(flipped)) == 1
    assert verify_checkpoint(flipped, level="sizes") == []
    cut(flipped / "step_1" / "state.eqx")
    (fault,) = verify_checkpoint(flipped, level="sizes")
    assert fault.file == "step_1/state.eqx"
    assert "bytes instead of" in fault.problem
    assert verify_checkpoint(flipped, level="off") == []
    (flipped / "step_1" / "state.eqx").unlink()
    (fault,) = verify_checkpoint(flipped, level="off")
    assert "is missing" in fault.problem


def test_verifying_sizes_fetches_no_file_from_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage("memory://verify-levels")
    save_checkpoint(storage, TREE)
    key = load_manifest(storage).items["state"].files["state.eqx"].key
    read = MemoryStorage.read

    def reads_no_file(self: MemoryStorage, wanted: str, start: int = 0, end: int | None = None) -> bytes:
        assert wanted != key
        return read(self, wanted, start, end)

    monkeypatch.setattr(MemoryStorage, "get", None)
    monkeypatch.setattr(MemoryStorage, "read", reads_no_file)
    assert verify_checkpoint(storage, level="sizes") == []
    storage.write(key, b"short")
    assert "has 5 bytes instead of" in verify_checkpoint(storage, level="sizes")[0].problem
    assert verify_checkpoint(storage, level="off") == []
    storage.delete([key])
    assert "is missing" in verify_checkpoint(storage, level="off")[0].problem


@pytest.mark.parametrize("level", ["none", True, None])
def test_a_level_that_is_none_is_refused(tmp_path: Path, level: Any) -> None:
    save_checkpoint(tmp_path, TREE)
    with pytest.raises(InvalidValueError, match='verify is "full"'):
        load_checkpoint(tmp_path, LIKE, verify=level)
    with pytest.raises(InvalidValueError, match='verify is "full"'):
        CheckpointManager(tmp_path, verify=level)
    with pytest.raises(InvalidValueError, match='verify is "full"'):
        verify_checkpoint(tmp_path, level=level)
