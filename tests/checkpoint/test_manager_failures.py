"""CheckpointManager when something goes wrong: in the background, on a full disk, at an interrupt."""

import gc
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vibe_store.checkpoint import CheckpointManager
from vibe_store.errors import (
    CheckpointNotFoundError,
    SaveFailedError,
    SaveTimeoutError,
    StepAlreadyExistsError,
)
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Call, Fault, FaultyStorage


def _puts_step(step: int) -> Callable[[Call], bool]:
    return lambda call: call.method == "put" and call.keys[0].startswith(f"step_{step}/")


def _commits_step(step: int) -> Callable[[Call], bool]:
    return lambda call: call.method == "write" and call.keys[0] == f"step_{step}/manifest.json"


@pytest.mark.parametrize("surfaces_in", ["save", "wait", "close"])
def test_a_failure_in_the_background_is_raised_once_by_the_next_call_with_its_step(
    storage: StorageBackend, scenarios: ModuleType, surfaces_in: str
) -> None:
    faulty = FaultyStorage(storage, Fault(_puts_step(2)))
    manager = CheckpointManager(faulty)
    manager.save(1, scenarios.tree(1))
    manager.save(2, scenarios.tree(2))
    assert manager.all_steps() == [1]
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: manager.save(3, scenarios.tree(3)),
        "wait": manager.wait,
        "close": manager.close,
    }
    with pytest.raises(SaveFailedError, match=r"The save of step 2 failed: .*injected fault") as caught:
        calls[surfaces_in]()
    assert caught.value.step == 2
    assert isinstance(caught.value.__cause__, OSError)
    manager.wait()
    assert manager.all_steps() == [1]
    faulty.faults = ()
    if surfaces_in != "close":
        manager.save(3, scenarios.tree(3))
        manager.save(2, scenarios.tree(2))
        assert manager.all_steps() == [1, 2, 3]
        manager.close()
    assert scenarios.garbage(storage) == set()


def test_a_save_off_the_interval_raises_what_has_gone_wrong_and_waits_for_nothing(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    begun, may_fail = threading.Event(), threading.Event()

    def puts(call: Call) -> bool:
        if _puts_step(10)(call):
            begun.set()
            assert may_fail.wait(60)
            return True
        return False

    manager = CheckpointManager(FaultyStorage(storage, Fault(puts)), save_interval_steps=10)
    manager.save(10, scenarios.tree(10))
    assert begun.wait(60)
    assert manager.save(11, scenarios.tree(11)) is False  # the save before is under way
    may_fail.set()
    assert manager.all_steps() == []
    with pytest.raises(SaveFailedError, match=r"The save of step 10 failed: .*injected fault"):
        manager.save(12, scenarios.tree(12))
    assert manager.save(13, scenarios.tree(13)) is False
    manager.close()


def test_without_a_thread_a_failure_is_raised_at_once_with_its_step(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage = FaultyStorage(LocalStorage(str(tmp_path)), Fault(_puts_step(1)))
    manager = scenarios.manager_of(storage)
    with pytest.raises(SaveFailedError, match="The save of step 1 failed") as caught:
        manager.save(1, scenarios.tree(1))
    assert caught.value.step == 1
    storage.faults = ()
    assert manager.save(1, scenarios.tree(1))
    assert manager.all_steps() == [1]


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_failed_deletion_after_a_save_says_that_the_step_was_saved(
    tmp_path: Path, scenarios: ModuleType, timeout: Any
) -> None:
    def prunes(call: Call) -> bool:
        return call.method == "delete" and "step_1/manifest.json" in call.keys

    storage = FaultyStorage(LocalStorage(str(tmp_path)), Fault(prunes))
    manager = CheckpointManager(storage, max_to_keep=1, async_timeout_secs=timeout)
    manager.save(1, scenarios.tree(1))
    with pytest.raises(SaveFailedError, match=r"^Step 2 was saved, but deleting older") as caught:  # noqa: PT012 - the block is what is tested
        manager.save(2, scenarios.tree(2))
        manager.wait()
    assert caught.value.step == 2
    assert isinstance(caught.value.__cause__, OSError)
    assert manager.all_steps() == [1, 2]
    storage.faults = ()
    manager.save(3, scenarios.tree(3))
    assert manager.all_steps() == [3]


def test_a_step_that_another_writer_commits_first_is_told_as_such(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage = LocalStorage(str(tmp_path))

    def commits(call: Call) -> bool:
        if _commits_step(1)(call):
            scenarios.save(scenarios.manager_of(storage), 1, 77)
        return False

    manager = CheckpointManager(FaultyStorage(storage, Fault(commits)))
    manager.save(1, scenarios.tree(1))
    with pytest.raises(StepAlreadyExistsError, match="step 1 is already in"):
        manager.wait()
    manager.wait()
    assert scenarios.held(storage, 1) == 77


def test_a_storage_that_repeats_its_own_create_does_not_take_the_step_for_anothers(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    repeated = Fault(_commits_step(1), "after", error=lambda: FileExistsError("exists"))
    manager = scenarios.manager_of(FaultyStorage(storage, repeated))
    scenarios.save(manager, 1, 1)
    assert scenarios.held(storage, 1) == 1
    assert scenarios.garbage(storage) == set()


def test_a_save_that_takes_longer_than_it_may_is_an_error_and_goes_on(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    slow = Fault(_commits_step(1), "delay", seconds=0.5)
    manager = CheckpointManager(FaultyStorage(LocalStorage(str(tmp_path)), slow), async_timeout_secs=0.05)
    manager.save(1, scenarios.tree(1))
    with pytest.raises(SaveTimeoutError, match=r"step 1 has not finished within 0\.05 seconds"):
        manager.wait()
    with pytest.raises(SaveTimeoutError):
        manager.save(2, scenarios.tree(2))
    time.sleep(0.6)
    assert manager.all_steps() == [1]
    manager.close()


def test_a_failure_that_nobody_is_left_to_be_told_of_is_logged(
    tmp_path: Path, scenarios: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(FaultyStorage(LocalStorage(str(tmp_path)), Fault(_puts_step(1))))
    manager.save(1, scenarios.tree(1))
    assert manager.all_steps() == []
    with caplog.at_level(logging.ERROR, "vibe_store"):
        del manager
        gc.collect()
    assert [message for message in caplog.messages if "The save of step 1 failed" in message]


def test_an_interrupt_in_a_save_leaves_nothing_and_the_next_save_works(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    faulty = FaultyStorage(storage, Fault(_commits_step(1), error=KeyboardInterrupt))
    manager = scenarios.manager_of(faulty)
    with pytest.raises(KeyboardInterrupt):
        scenarios.save(manager, 1, 1)
    assert manager.all_steps() == []
    assert scenarios.garbage(storage) == set()
    faulty.faults = ()
    scenarios.save(manager, 1, 1)
    assert scenarios.held(storage, 1) == 1


def test_an_interrupt_while_waiting_leaves_the_save_going_on(tmp_path: Path, processes: Any) -> None:
    code = """
    import os, signal, threading
    from vibe_store.storage.local import LocalStorage
    from vibe_store.testing import Fault, FaultyStorage

    slow = Fault(lambda call: call.method == "put", "delay", seconds=0.5)
    manager = CheckpointManager(FaultyStorage(LocalStorage(arguments["root"]), slow))
    manager.save(1, tree(1))
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        manager.wait()
    except KeyboardInterrupt:
        assert not Path(arguments["root"], "step_1", "manifest.json").exists()
        assert manager.save(2, tree(2))
        manager.wait()
        print("interrupted", manager.all_steps())
    """
    assert processes.run(code, root=str(tmp_path)).strip() == "interrupted [1, 2]"


def test_a_save_under_way_when_the_interpreter_ends_is_finished(tmp_path: Path, processes: Any) -> None:
    code = """
    from vibe_store.storage.local import LocalStorage
    from vibe_store.testing import Fault, FaultyStorage

    slow = Fault(lambda call: call.method == "put", "delay", seconds=0.3)
    manager = CheckpointManager(FaultyStorage(LocalStorage(arguments["root"]), slow))
    manager.save(1, tree(1))
    assert manager.last_committed is None
    """
    assert processes.run(code, root=str(tmp_path)) == ""
    assert CheckpointManager(tmp_path).all_steps() == [1]


def test_a_failure_that_a_script_ends_without_hearing_of_is_on_its_standard_error(
    tmp_path: Path, processes: Any
) -> None:
    code = """
    from vibe_store.storage.local import LocalStorage
    from vibe_store.testing import Fault, FaultyStorage

    fault = Fault(lambda call: call.method == "put")
    manager = CheckpointManager(FaultyStorage(LocalStorage(arguments["root"]), fault))
    manager.save(1, tree(1))
    """
    assert "The save of step 1 failed: " in processes.run(code, root=str(tmp_path))


@pytest.mark.parametrize("failing", ["list", "read"])
def test_where_reading_fails_nothing_is_deleted(
    storage: StorageBackend, scenarios: ModuleType, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    with scenarios.manager_of(storage) as earlier:
        earlier.save(1, scenarios.tree(1), metrics={"loss": 1.0})
    faulty = FaultyStorage(storage)
    manager = scenarios.manager_of(faulty, max_to_keep=1, best_fn=lambda metrics: metrics["loss"])

    def fails(call: Call) -> bool:
        committed = any(change.keys == ("step_2/manifest.json",) for change in faulty.calls)
        return committed and call.method == failing and call.keys[0].startswith("step_")

    faulty.faults = (Fault(fails),)
    manager.save(2, scenarios.tree(2), metrics={"loss": 0.5})
    faulty.faults = ()
    assert manager.all_steps() == [1, 2]
    assert "No checkpoint in" in caplog.text
    manager.save(3, scenarios.tree(3), metrics={"loss": 0.1})
    assert manager.all_steps() == [3]


def test_a_step_whose_manifest_is_damaged_is_left_alone_and_stops_no_pruning(
    tmp_path: Path, scenarios: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    storage = LocalStorage(str(tmp_path))
    scenarios.prepare(storage)
    (tmp_path / "step_2" / "manifest.json").write_bytes(b"{}")
    manager = scenarios.manager_of(storage, max_to_keep=1)
    scenarios.save(manager, 4, 4)
    assert manager.all_steps() == [2, 4]
    assert "Step 2 is left alone" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system failed: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no small file system can be mounted here")
def test_on_a_full_disk_earlier_checkpoints_stay_and_the_next_save_works_once_there_is_room(
    small_disk: Path, scenarios: ModuleType
) -> None:
    (small_disk / "ballast").write_bytes(bytes(700_000))
    big = {"w": np.arange(100_000, dtype=np.float64)}
    with CheckpointManager(small_disk / "checkpoints") as manager:
        manager.save(1, big)
        manager.wait()
        manager.save(2, big)
        with pytest.raises(SaveFailedError, match=r"step 2 failed: .*No space left") as caught:
            manager.save(3, big)
        assert caught.value.step == 2
        assert manager.all_steps() == [1]
        (small_disk / "ballast").unlink()
        assert manager.save(3, big)
        assert manager.all_steps() == [1, 3]
        for step in (1, 3):
            assert np.array_equal(manager.restore(step, {"w": np.zeros(100_000)})["w"], big["w"])
        with pytest.raises(CheckpointNotFoundError):
            manager.restore(2, big)
    assert scenarios.garbage(LocalStorage(str(small_disk / "checkpoints"))) == set()
