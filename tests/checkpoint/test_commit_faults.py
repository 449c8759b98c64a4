"""Every call of a save, a replacement, a deletion and a wipe fails or dies once, and nothing else suffers."""

import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.interfaces import StorageBackend
from vibe_store.run_dir import RunDir
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import EXIT_STATUS, Fault, FaultyStorage

_SCENARIOS = ["save", "replace", "prune", "wipe"]


def _fresh(kind: str, folder: Path) -> StorageBackend:
    name = uuid.uuid4().hex
    if kind == "memory":
        return MemoryStorage(f"memory://{name}/checkpoints")
    return LocalStorage(str(folder / name / "checkpoints"))


def _prepared(kind: str, folder: Path, scenarios: ModuleType) -> StorageBackend:
    """A directory that holds the old steps; each but the first is a copy of the first."""
    inner, original = _fresh(kind, folder), folder / "original"
    if kind == "memory":
        scenarios.prepare(inner)
    else:
        if not original.exists():
            scenarios.prepare(LocalStorage(str(original)))
        shutil.copytree(original, inner.url)
    return inner


def _run_dir_agrees(storage: StorageBackend, scenarios: ModuleType) -> None:
    root = storage.local_path("")
    if root is not None:
        run = RunDir(base_dir=root.parents[1], run_id=root.parent.name)
        listed = [step for step, _ in run.list_checkpoints()]
        assert listed == scenarios.manager_of(storage).all_steps()


@pytest.mark.usefixtures("dead_at_once")
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("scenario", _SCENARIOS)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_whichever_call_fails_each_step_stays_old_or_becomes_new_and_the_next_writer_sweeps(
    kind: str, scenario: str, how: Any, scenarios: ModuleType, fast_path: Path
) -> None:
    index, failures, reached = 0, 0, True
    while reached:
        inner = _prepared(kind, fast_path, scenarios)
        faulty = FaultyStorage(inner, Fault(index, how))
        said: str | None = None
        try:
            scenarios.SCENARIOS[scenario](faulty)
        except (OSError, RuntimeError) as error:
            said = str(error)
        if said is not None:
            assert "injected fault" in said
            failures += 1
        scenarios.check(scenario, inner)
        _run_dir_agrees(inner, scenarios)
        scenarios.check_next_writer(inner)
        index, reached = index + 1, len(faulty.calls) > index
    assert failures >= 4


_CRASH = """
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Fault, FaultyStorage

index = arguments["index"]
half_a_deletion = Fault(lambda call: call.index == index and call.method == "delete", "cut", error=None)
storage = FaultyStorage(LocalStorage(arguments["root"]), half_a_deletion, Fault(index, error=None))
SCENARIOS[arguments["scenario"]](storage)
"""


@pytest.mark.parametrize("scenario", _SCENARIOS)
def test_whichever_call_a_writer_is_killed_in_each_step_stays_old_or_becomes_new_and_the_next_writer_sweeps(
    scenario: str, scenarios: ModuleType, fast_path: Path, processes: Any
) -> None:
    index, status, outcomes = 0, EXIT_STATUS, set()
    while status == EXIT_STATUS:
        inner = _prepared("local", fast_path, scenarios)
        child = processes.start(_CRASH, root=inner.url, scenario=scenario, index=index)
        status = child.wait()
        assert status in {0, EXIT_STATUS}, child.output
        outcomes.add(scenarios.check(scenario, inner))
        _run_dir_agrees(inner, scenarios)
        scenarios.check_next_writer(inner)
        index += 1
    assert outcomes == {False, True}
    assert index > 4


class _StopsDeleting(FaultyStorage):
    """Deletes so many keys, and then fails."""

    left = 0

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        for key in keys:
            if self.left == 0:
                raise OSError("injected fault")
            self.left -= 1
            super().delete([key], durable=durable)


@pytest.mark.usefixtures("dead_at_once")
@pytest.mark.parametrize("scenario", ["prune", "wipe"])
def test_a_deletion_that_stops_after_any_number_of_objects_leaves_no_half_a_checkpoint(
    scenario: str, scenarios: ModuleType, fast_path: Path
) -> None:
    count, done = 0, False
    while not done:
        inner = _prepared("memory", fast_path, scenarios)
        stopping = _StopsDeleting(inner)
        stopping.left = count
        try:
            scenarios.SCENARIOS[scenario](stopping)
            done = True
        except (OSError, RuntimeError):
            count += 1
            assert count < 100  # else something else goes wrong every time
        scenarios.check(scenario, inner)
        scenarios.check_next_writer(inner)
    assert count > 10
