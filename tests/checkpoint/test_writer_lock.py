"""One writing process for each local directory, and nobody locked out by the dead."""

import fcntl
import json
import os
import shutil
import threading
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import CheckpointManager, load_checkpoint, save_checkpoint
from vibe_store.errors import WriterLockedError

_HOLDS = """
import time
manager = CheckpointManager(arguments["root"])
manager.save(1, tree(1))
manager.wait()
Path(arguments["root"], "ready").touch()
time.sleep(60)
"""


def test_a_second_process_that_writes_is_refused_at_once_and_reading_is_not(
    tmp_path: Path, scenarios: ModuleType, processes: Any, until: Any
) -> None:
    holder = processes.start(_HOLDS, root=str(tmp_path))
    until((tmp_path / "ready").exists)
    began = time.monotonic()
    manager = CheckpointManager(tmp_path)
    with pytest.raises(WriterLockedError, match=f"written to by process {holder.pid} on .* Reading is not"):
        manager.save(2, scenarios.tree(2))
    with pytest.raises(WriterLockedError, match=str(holder.pid)):
        save_checkpoint(tmp_path, scenarios.tree(2), step=2)
    assert time.monotonic() - began < 5.0
    assert manager.all_steps() == [1]
    assert scenarios.same(manager.restore(None, scenarios.tree(0)), scenarios.tree(1))
    holder.kill()
    assert manager.save(2, scenarios.tree(2))
    assert manager.all_steps() == [1, 2]
    manager.close()


def test_a_writer_that_was_killed_in_the_middle_of_a_save_blocks_nobody(
    tmp_path: Path, scenarios: ModuleType, processes: Any, until: Any
) -> None:
    code = """
    import time
    from vibe_store.storage.local import LocalStorage
    from vibe_store.testing import Fault, FaultyStorage

    slow = Fault(lambda call: call.method == "put" and "step_2" in call.keys[0], "delay", seconds=60)
    manager = CheckpointManager(FaultyStorage(LocalStorage(arguments["root"]), slow))
    manager.save(1, tree(1))
    manager.save(2, tree(2))
    Path(arguments["root"], "ready").touch()
    manager.wait()
    """
    writer = processes.start(code, root=str(tmp_path))
    until((tmp_path / "ready").exists)
    writer.kill()
    with CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [1]
        assert manager.save(2, scenarios.tree(22))
        assert scenarios.same(manager.restore(2, scenarios.tree(0)), scenarios.tree(22))


def test_a_manager_that_is_made_again_in_the_same_process_is_not_locked_out(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    first, second = CheckpointManager(tmp_path), CheckpointManager(tmp_path)
    first.save(1, scenarios.tree(1))
    second.save(2, scenarios.tree(2))
    first.save(3, scenarios.tree(3))
    first.close()
    second.save(4, scenarios.tree(4))
    save_checkpoint(tmp_path, scenarios.tree(5), step=5)
    assert second.all_steps() == [1, 2, 3, 4, 5]


def test_the_last_manager_that_goes_unlocks_the_directory_closed_or_not(
    tmp_path: Path, scenarios: ModuleType, processes: Any, until: Any
) -> None:
    other = """
    with CheckpointManager(arguments["root"]) as manager:
        manager.save(arguments["step"], tree(1))
    """
    closed, collected = CheckpointManager(tmp_path), CheckpointManager(tmp_path)
    closed.save(1, scenarios.tree(1))
    collected.save(2, scenarios.tree(2))
    closed.close()
    collected.wait()
    assert "WriterLockedError" in _fails(processes, other, root=str(tmp_path), step=3)
    gone = weakref.ref(collected)
    del collected
    until(lambda: gone() is None)  # the thread of its save lets go of it a moment after the save is done
    processes.run(other, root=str(tmp_path), step=4)
    assert closed.all_steps() == [1, 2, 4]


def _fails(processes: Any, code: str, **arguments: Any) -> str:
    child = processes.start(code, **arguments)
    assert child.wait() == 1
    return str(child.output)


@pytest.mark.parametrize("way", ["os.fork", "multiprocessing"])
def test_a_forked_child_is_refused_while_its_parent_lives_and_holds_no_lock_after_it(
    tmp_path: Path, scenarios: ModuleType, processes: Any, until: Any, way: str
) -> None:
    code = """
    import multiprocessing, os, sys, time

    root = Path(arguments["root"])
    manager = CheckpointManager(root)
    manager.save(1, tree(1))

    def child():
        try:
            manager.save(2, tree(2))
        except Exception as error:
            (root / "child.tmp").write_text(f"{type(error).__name__} {os.getppid()} {error}")
        else:
            (root / "child.tmp").write_text("it could save")
        manager.all_steps()
        (root / "child.tmp").rename(root / "child")
        while not (root / "end").exists():
            time.sleep(0.005)

    if arguments["way"] == "os.fork":
        if os.fork() == 0:
            child()
            os._exit(0)
    else:
        multiprocessing.get_context("fork").Process(target=child).start()
    while not (root / "child").exists():
        time.sleep(0.005)
    manager.save(3, tree(3))
    manager.wait()
    (root / "parent").touch()
    sys.stdout.flush()
    time.sleep(60)
    """
    parent = processes.start(code, root=str(tmp_path), way=way)
    try:
        until((tmp_path / "parent").exists)
        said = (tmp_path / "child").read_text()
        assert said.startswith(f"WriterLockedError {parent.pid} ")
        assert f"process {parent.pid} on" in said
        parent.kill()
        with CheckpointManager(tmp_path) as manager:
            assert manager.save(4, scenarios.tree(4))
            assert manager.all_steps() == [1, 3, 4]
    finally:
        (tmp_path / "end").touch()


def test_a_manager_whose_directory_was_removed_locks_the_new_one(
    tmp_path: Path, scenarios: ModuleType, processes: Any
) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    manager.save(1, scenarios.tree(1))
    manager.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    manager.save(2, scenarios.tree(2))
    assert manager.all_steps() == [2]
    other = "save_checkpoint(arguments['root'], tree(3), step=3)"
    assert "WriterLockedError" in _fails(processes, other, root=str(tmp_path / "checkpoints"))
    manager.close()
    processes.run(other, root=str(tmp_path / "checkpoints"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists open files, in /proc")
def test_a_lock_whose_directory_was_removed_is_closed(tmp_path: Path, scenarios: ModuleType) -> None:
    with CheckpointManager(tmp_path / "checkpoints", async_timeout_secs=None) as manager:
        manager.save(1, scenarios.tree(1))
        before = len([*Path("/proc/self/fd").iterdir()])
        for step in (2, 3, 4):
            shutil.rmtree(tmp_path / "checkpoints")
            manager.save(step, scenarios.tree(step))
        assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_one_save_waits_for_another_one_of_another_process(
    tmp_path: Path, scenarios: ModuleType, processes: Any, until: Any
) -> None:
    code = """
    import time
    from vibe_store.storage.local import LocalStorage
    from vibe_store.testing import Fault, FaultyStorage

    def ready(call):
        if call.method == "put":
            Path(arguments["root"], "ready").touch()
        return call.method == "put"

    slow = Fault(ready, "delay", seconds=0.5)
    save_checkpoint(FaultyStorage(LocalStorage(arguments["root"]), slow), tree(1), step=1)
    """
    other = processes.start(code, root=str(tmp_path))
    until((tmp_path / "ready").exists)
    save_checkpoint(tmp_path, scenarios.tree(2), step=2)
    assert other.wait() == 0
    for step in (1, 2):
        assert scenarios.same(load_checkpoint(tmp_path, scenarios.tree(0), step=step), scenarios.tree(step))


def test_what_a_manager_signed_long_ago_does_not_turn_away_who_may_wait(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(1), step=1)
    path = tmp_path / ".vibe_store" / "writer.lock"
    path.write_text(json.dumps({"pid": 1, "host": "x", "since": "long ago", "purpose": "manager"}))
    # Another one-shot save has just taken the lock (a lock of its own open file) and is about to sign.
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)

    def sign_and_finish() -> None:
        path.write_text(json.dumps({"pid": 2, "host": "x", "since": "now", "purpose": "one-shot"}))
        time.sleep(0.1)
        os.close(descriptor)

    thread = threading.Timer(0.01, sign_and_finish)
    thread.start()
    save_checkpoint(tmp_path, scenarios.tree(2), step=2)
    thread.join()
    assert CheckpointManager(tmp_path).all_steps() == [1, 2]


def test_a_damaged_list_of_a_pending_attempt_stops_neither_writers_nor_readers(
    tmp_path: Path, scenarios: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(1), step=1)
    contents = ["", "{}", "[" * 100_000, '{"keys": [5]}', '{"keys": ["../../x"]}', '{"keys": ["\\ud800"]}']
    for number, content in enumerate(contents):
        (tmp_path / ".vibe_store" / f"pending-{number}.json").write_text(content)
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(2, scenarios.tree(2))
        assert manager.all_steps() == [1, 2]
    assert caplog.text.count("stays for now") == len(contents)
    assert scenarios.list_checkpoints(tmp_path)[0].status == "committed"


def test_what_was_set_aside_is_not_swept_with_what_a_dead_writer_left(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(1), step=1)
    save_checkpoint(tmp_path, scenarios.tree(2), step=2)
    pending = tmp_path / ".vibe_store" / "pending-20200101T000000-0123456789.json"
    pending.write_text('{"keys": ["step_2/state.eqx", "step_3/x"]}')
    (tmp_path / "step_2" / "manifest.json").write_text("{}")
    with pytest.warns(UserWarning, match="Step 2"):
        manager, _ = scenarios.initialize_checkpoint_dir(tmp_path, resume=True)
    with manager:
        manager.save(5, scenarios.tree(5))
    assert (tmp_path / "step_2" / "state.eqx").exists()
