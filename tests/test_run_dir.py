"""RunDir: the folder of one run."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibe_store
from vibe_store.checkpoint import CheckpointManager, load_checkpoint, save_checkpoint
from vibe_store.errors import InvalidValueError, VibeStoreWarning, WriterLockedError
from vibe_store.run_dir import RunDir

_TREE = {"a": np.arange(3)}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir("dqn_cartpole", base_dir=tmp_path / "runs")


def _save(run: RunDir, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run.checkpoints, _TREE, step=step)


@contextmanager
def _running(code: str, *arguments: str) -> Iterator[int]:
    """A process that has said that it is ready; it is killed when the block ends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(vibe_store.__file__).parents[1])}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def test_a_new_run_has_a_folder_of_its_name_and_time(run: RunDir, tmp_path: Path) -> None:
    now = time.strftime("%Y%m%d_%H%M")
    assert run.run_id.startswith(f"dqn_cartpole_{now[:8]}_")
    assert run.path == tmp_path / "runs" / run.run_id
    assert run.path.is_dir()


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    runs = [RunDir("run", base_dir=tmp_path) for _ in range(5)]
    assert len({run.path for run in runs}) == 5
    assert all(run.path.is_dir() for run in runs)


def test_a_run_is_opened_again_by_its_id(run: RunDir) -> None:
    _save(run, 5)
    again = RunDir(base_dir=run.path.parent, run_id=run.run_id)
    assert again.path == run.path
    assert again.list_checkpoints() == [(5, run.checkpoints / "step_5")]


def test_the_default_base_is_runs_and_stays_where_it_was_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir("run")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    run.save_config({"a": 1})
    run.mark_best(3)
    assert run.path == tmp_path / "runs" / run.run_id
    assert (run.path / "config.json").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".hidden", "-x", "a\0b", "a b", 5])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InvalidValueError, match="cannot be used"):
        RunDir(name, base_dir=tmp_path)
    with pytest.raises(InvalidValueError, match="cannot be used"):
        RunDir(base_dir=tmp_path, run_id=name)
    assert list(tmp_path.iterdir()) == []


def test_neither_or_both_of_name_and_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="the name of a new run, or the run_id"):
        RunDir(base_dir=tmp_path)
    with pytest.raises(InvalidValueError, match="the name of a new run, or the run_id"):
        RunDir("a", base_dir=tmp_path, run_id="b")


def test_the_paths_are_where_the_layout_says(run: RunDir) -> None:
    assert run.checkpoints == run.path / "checkpoints"
    assert run.checkpoint_dir(step=10000) == run.path / "checkpoints" / "step_10000"
    assert run.checkpoint_dir(step=10000).is_dir()
    assert run.logs == run.path / "logs"
    assert run.log_path() == run.path / "logs" / "metrics.jsonl"
    assert run.log_path("eval.jsonl").parent.is_dir()
    with pytest.raises(InvalidValueError, match="cannot be used"):
        run.log_path("../x")
    with pytest.raises(InvalidValueError, match="A step is"):
        run.checkpoint_dir(-1)


@dataclasses.dataclass(frozen=True)
class _Config:
    lr: float = 1e-3
    sizes: tuple[int, ...] = (64, 64)


def test_a_config_comes_back_as_json(run: RunDir) -> None:
    assert run.load_config() is None
    run.save_config(_Config())
    assert run.load_config() == {"lr": 1e-3, "sizes": [64, 64]}
    run.save_config({"b": [1, None]})
    assert run.load_config() == {"b": [1, None]}
    assert json.loads(run.config_path.read_text()) == {"b": [1, None]}


def test_a_config_that_is_no_json_is_refused_by_path_and_the_old_one_stays(run: RunDir) -> None:
    run.save_config({"a": 1})
    with pytest.raises(InvalidValueError, match=r"config\['f'\] is <"):
        run.save_config({"f": print})
    with pytest.raises(InvalidValueError, match="config is a dict"):
        run.save_config(_Config)
    assert run.load_config() == {"a": 1}
    for data in (b"{", b"[1]", b'{"a": "\xff"}'):
        run.config_path.write_bytes(data)
        with pytest.raises(InvalidValueError, match=r"config\.json"):
            run.load_config()


def test_checkpoints_are_listed_by_number_with_their_folders(run: RunDir) -> None:
    assert run.list_checkpoints() == []
    assert run.latest_checkpoint is None
    _save(run, 10000, 5000, 15000)
    run.checkpoint_dir(step=20000)
    run.mark_best(5000)
    folders = [(step, run.checkpoints / f"step_{step}") for step in (5000, 10000, 15000)]
    assert run.list_checkpoints() == folders
    assert run.latest_checkpoint == run.checkpoints / "step_15000"


def test_the_best_checkpoint_is_a_link_that_loads(run: RunDir) -> None:
    assert run.best_checkpoint is None
    _save(run, 1, 2)
    run.mark_best(step=1)
    assert (run.checkpoints / "best").readlink() == Path("step_1")
    assert run.best_checkpoint == run.checkpoints / "step_1"
    run.mark_best(step=2)
    assert run.best_checkpoint == run.checkpoints / "step_2"
    assert np.array_equal(load_checkpoint(run.best_checkpoint, _TREE)["a"], [0, 1, 2])


def test_a_best_step_may_be_marked_before_it_is_committed_and_is_none_until_then(run: RunDir) -> None:
    run.mark_best(7)
    with pytest.warns(VibeStoreWarning, match="points to step 7, which is not there") as warned:
        assert run.best_checkpoint is None
    assert warned[0].filename == __file__
    _save(run, 7)
    assert run.best_checkpoint == run.checkpoints / "step_7"


def test_a_best_that_is_no_link_is_refused_and_stays(run: RunDir) -> None:
    _save(run, 1)
    (run.checkpoints / "best").write_text("mine")
    with pytest.raises(InvalidValueError, match="is no symbolic link"):
        run.mark_best(1)
    with pytest.raises(InvalidValueError, match="is no symbolic link"):
        _ = run.best_checkpoint
    assert (run.checkpoints / "best").read_text() == "mine"


def test_a_best_that_leads_elsewhere_is_refused_until_another_step_is_marked(
    run: RunDir, tmp_path: Path
) -> None:
    _save(run, 1, 2)
    (run.checkpoints / "best").symlink_to(tmp_path)
    with pytest.raises(InvalidValueError, match="which is no step_N beside it"):
        _ = run.best_checkpoint
    with pytest.raises(InvalidValueError, match="which is no step_N beside it"):
        run.cleanup_checkpoints(keep=1)
    assert len(run.list_checkpoints()) == 2
    run.mark_best(1)
    assert run.best_checkpoint == run.checkpoints / "step_1"


_MARKS = """
import sys
from vibe_store.run_dir import RunDir

run = RunDir(base_dir=sys.argv[1], run_id=sys.argv[2])
run.mark_best(1)
print("ready", flush=True)
while True:
    run.mark_best(2)
    run.mark_best(1)
"""


def test_a_process_killed_while_it_marks_leaves_a_link_to_one_of_the_steps(run: RunDir) -> None:
    _save(run, 1, 2)
    with _running(_MARKS, str(run.path.parent), run.run_id):
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert (run.checkpoints / "best").readlink() in {Path("step_1"), Path("step_2")}
    assert run.best_checkpoint in {run.checkpoints / "step_1", run.checkpoints / "step_2"}
    assert [step for step, _ in run.list_checkpoints()] == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux names open files, in /proc")
def test_what_is_marked_best_is_on_the_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[Path, list[str]]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        folder = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((folder, [path.name for path in folder.iterdir()]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run.mark_best(1)
    assert synced == [(run.path, ["checkpoints"]), (run.checkpoints, ["best"])]


def test_what_a_killed_marker_left_is_swept_by_a_later_writer(run: RunDir) -> None:
    _save(run, 1)
    old, new = run.checkpoints / ".best-0123456789abcdef", run.checkpoints / ".best-fedcba9876543210"
    for link in (old, new):
        link.symlink_to("step_1")
    os.utime(old, (0, 0), follow_symlinks=False)
    _save(run, 2)
    assert not old.is_symlink()
    assert new.is_symlink()


def test_cleaning_up_keeps_the_highest_the_best_and_the_pinned(run: RunDir) -> None:
    with CheckpointManager(run.checkpoints, max_to_keep=99) as manager:
        for step in range(10):
            manager.save(step, _TREE)
        manager.pin(3)
    run.mark_best(1)
    (run.checkpoints / "notes.txt").touch()
    deleted = run.cleanup_checkpoints(keep=2)
    assert deleted == [run.checkpoints / f"step_{step}" for step in (0, 2, 4, 5, 6, 7)]
    assert [step for step, _ in run.list_checkpoints()] == [1, 3, 8, 9]
    assert not any(folder.exists() for folder in deleted)
    assert run.cleanup_checkpoints(keep=5) == []
    assert run.cleanup_checkpoints() == []
    assert (run.checkpoints / "notes.txt").exists()


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, None])
def test_cleaning_up_keeps_at_least_one(run: RunDir, keep: Any) -> None:
    _save(run, 1, 2)
    with pytest.raises(InvalidValueError, match="keep is a whole number, 1 or more"):
        run.cleanup_checkpoints(keep=keep)
    assert len(run.list_checkpoints()) == 2


_WRITES = """
import sys, time
import numpy as np
from vibe_store.checkpoint import CheckpointManager

manager = CheckpointManager(sys.argv[1])
manager.save(9, {"a": np.arange(3)})
manager.wait()
print("ready", flush=True)
time.sleep(60)
"""


def test_cleaning_up_beside_another_writing_process_is_refused_and_deletes_nothing(run: RunDir) -> None:
    _save(run, 1, 2)
    with _running(_WRITES, str(run.checkpoints)) as pid, pytest.raises(WriterLockedError, match=str(pid)):
        run.cleanup_checkpoints(keep=1)
    assert [step for step, _ in run.list_checkpoints()] == [1, 2, 9]


_REPLACES = """
import sys
import numpy as np
from vibe_store.checkpoint import save_checkpoint
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Fault, FaultyStorage

def puts(call):
    if call.method == "put":
        print("ready", flush=True)
    return call.method == "put"

slow = FaultyStorage(LocalStorage(sys.argv[1]), Fault(puts, "delay", seconds=1))
save_checkpoint(slow, {"a": np.arange(3)}, step=1)
"""


def test_cleaning_up_waits_for_a_step_that_is_being_replaced_and_leaves_nothing_of_it(run: RunDir) -> None:
    _save(run, 1, 2)
    with _running(_REPLACES, str(run.checkpoints)):
        assert run.cleanup_checkpoints(keep=1) == [run.checkpoints / "step_1"]
    assert not (run.checkpoints / "step_1").exists()


def test_reading_a_run_that_is_not_there_creates_nothing(tmp_path: Path) -> None:
    run = RunDir(base_dir=tmp_path, run_id="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.list_checkpoints() == []
        assert run.best_checkpoint is None
        assert run.latest_checkpoint is None
        assert run.cleanup_checkpoints() == []
        assert run.load_config() is None
    assert list(tmp_path.iterdir()) == []
