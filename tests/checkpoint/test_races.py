"""Two writers of one process at the same moment, and readers beside a writer."""

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    initialize_checkpoint_dir,
    list_checkpoints,
    load_checkpoint,
    load_manifest,
    load_metadata,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.errors import CorruptCheckpointError, SaveFailedError, StepAlreadyExistsError
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Call, Fault, FaultyStorage


def _between(index: int, act: Callable[[], None]) -> Callable[[Call], bool]:
    """A predicate that is never met, and does something just before one call that changes something."""

    def when(call: Call) -> bool:
        if call.index == index:
            act()
        return False

    return when


def _interrupted(
    storage: StorageBackend, index: int, act: Callable[[], None]
) -> tuple[FaultyStorage, list[None]]:
    """Return the storage, made to do something before one of its calls, and a list, empty until it did."""
    calls, done = itertools.count(), list[None]()

    def when(_: Call) -> bool:
        if next(calls) == index:
            done.append(None)
            act()
        return False

    return FaultyStorage(storage, Fault(when)), done


def test_a_save_of_the_same_new_step_between_any_two_calls_of_another_leaves_one_winner_that_verifies(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    winners = []
    reached, index, step = True, 0, 0
    while reached:
        step += 1
        other = scenarios.manager_of(storage, max_to_keep=100)
        outcomes = {}

        def save(name: str, manager: CheckpointManager, seed: int, step: int = step) -> None:
            try:
                scenarios.save(manager, step, seed)
                outcomes[name] = True  # noqa: B023 - called within this turn of the loop
            except StepAlreadyExistsError:
                outcomes[name] = False  # noqa: B023 - called within this turn of the loop

        faulty = FaultyStorage(storage)
        faulty.faults = (Fault(_between(index, lambda: save("second", other, 2000 + step))),)  # noqa: B023 - called within this turn of the loop
        save("first", scenarios.manager_of(faulty, max_to_keep=100), 1000 + step)
        reached = len(faulty.calls) > index
        if reached:
            assert sorted(outcomes.values()) == [False, True]
            winner = next(name for name, won in outcomes.items() if won)
            winners.append(winner)
            assert scenarios.held(storage, step) == {"first": 1000, "second": 2000}[winner] + step
            assert verify_checkpoint(storage) == []
        index += 1
    assert set(winners) == {"first", "second"}
    assert scenarios.garbage(storage) == set()


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_two_writers_that_put_a_step_in_place_at_once_leave_one_of_the_two_and_nothing_else(
    storage: StorageBackend, scenarios: ModuleType, there: bool
) -> None:
    winners = set()
    for index in itertools.count():
        step = 10 + index
        if there:
            save_checkpoint(storage, scenarios.tree(1), step=step)
        other = partial(save_checkpoint, storage, scenarios.tree(2), step=step)
        faulty, done = _interrupted(storage, index, other)
        save_checkpoint(faulty, scenarios.tree(3), step=step)
        if not done:
            break
        loaded = load_checkpoint(storage, scenarios.tree(0), step=step)
        winners.add(next(seed for seed in (2, 3) if scenarios.same(loaded, scenarios.tree(seed))))
        assert verify_checkpoint(storage, step=step) == []
        assert scenarios.garbage(storage) == set()
    # In a bucket there is no call after the one that puts a new step in place.
    assert winners == ({2, 3} if there or storage.local_path("") else {3})


def test_a_step_that_is_replaced_while_another_writer_deletes_it_is_there_whole_or_leaves_nothing(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    outcomes = set()
    for index in itertools.count():
        step = 10 * (index + 1)
        save_checkpoint(storage, scenarios.tree(1), step=step)
        replace = partial(save_checkpoint, storage, scenarios.tree(2), step=step)
        faulty, done = _interrupted(storage, index, replace)
        with scenarios.manager_of(faulty, max_to_keep=1) as manager:
            scenarios.save(manager, step + 1, 3)
        if not done:
            break
        outcomes.add(step in {found.step for found in list_checkpoints(storage)})
        assert verify_checkpoint(storage) == []
        assert scenarios.garbage(storage) == set()
    assert outcomes == {True, False}


def test_two_threads_that_save_the_same_new_step_at_once_leave_one_winner_that_verifies(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    for step, moment in enumerate(["state.eqx", "aux.eqx", "metadata", "manifest.json"] * 2):
        both = threading.Barrier(2, timeout=30)
        outcomes: dict[int, object] = {}

        def meet(call: Call, step: int = step, moment: str = moment, both: threading.Barrier = both) -> bool:
            key = call.keys[0] if call.keys else ""
            named = key.startswith(f"step_{step}/{moment.partition('.')[0]}")
            if named and call.method in {"write", "put"}:
                both.wait()
            return False

        def save(
            seed: int, step: int = step, meet: Callable[[Call], bool] = meet, to: dict[int, object] = outcomes
        ) -> None:
            manager = scenarios.manager_of(FaultyStorage(storage, Fault(meet)), max_to_keep=100)
            try:
                scenarios.save(manager, step, seed)
                to[seed] = "won"
            except Exception as error:  # noqa: BLE001 - looked at below
                to[seed] = type(error)

        threads = [threading.Thread(target=save, args=(seed,)) for seed in (1000 + step, 2000 + step)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(str, outcomes.values())) == sorted(["won", str(StepAlreadyExistsError)])
        assert outcomes[scenarios.held(storage, step)] == "won"
    assert scenarios.garbage(storage) == set()


def test_a_reader_of_a_step_that_is_replaced_meanwhile_gets_the_new_one(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    scenarios.prepare(storage)
    done: list[None] = []

    def replace_once(call: Call) -> bool:
        if call.method == "read" and not done:
            done.append(None)  # the manifest was read just before
            return False
        if len(done) == 1:
            done.append(None)
            scenarios.replace(storage)
        return False

    class Reading(FaultyStorage):
        def local_path(self, key: str) -> Path | None:
            if key.endswith("state.eqx") and len(done) == 1:
                done.append(None)
                scenarios.replace(storage)
            return super().local_path(key)

    loaded = load_checkpoint(Reading(storage, Fault(replace_once)), scenarios.tree(0), step=3)
    assert len(done) == 2
    assert scenarios.same(loaded, scenarios.tree(33))


def test_a_step_that_was_replaced_just_after_its_save_is_deleted_whole_by_whoever_saved_it(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage = LocalStorage(str(tmp_path))
    for index in itertools.count():
        first, second = 10 * index + 10, 10 * index + 11
        replace = partial(save_checkpoint, storage, scenarios.tree(2), step=first)
        faulty, done = _interrupted(storage, index, replace)
        manager = scenarios.manager_of(faulty, max_to_keep=1)
        with suppress(StepAlreadyExistsError):
            scenarios.save(manager, first, 1)

        def deletes_it(call: Call, manifest: str = f"step_{first}/manifest.json") -> bool:
            return call.method == "delete" and manifest in call.keys

        faulty.faults = (Fault(deletes_it, "after"),)
        with pytest.raises(SaveFailedError, match="deleting older checkpoints after it failed"):
            scenarios.save(manager, second, 3)
        with scenarios.manager_of(storage, max_to_keep=1) as next_writer:
            scenarios.save(next_writer, second + 1, 4)
        assert scenarios.garbage(storage) == set()
        if not done:
            break


@pytest.mark.parametrize("look", ["restore", "load the metadata", "verify", "resume"])
def test_whoever_looks_at_a_step_while_it_is_replaced_finds_the_old_one_or_the_new_one_whole(
    storage: StorageBackend, scenarios: ModuleType, look: str
) -> None:
    def is_whole(faulty: StorageBackend) -> bool:
        if look == "load the metadata":
            return load_metadata(faulty, step=2) in ({"seed": 2}, {"seed": 3})
        if look == "verify":
            return verify_checkpoint(faulty) == []
        if look == "resume":
            return initialize_checkpoint_dir(faulty, resume=True)[0].latest_step() == 2
        loaded = scenarios.manager_of(faulty).restore(None, scenarios.tree(0))
        return any(scenarios.same(loaded, scenarios.tree(seed)) for seed in (2, 3))

    for index in itertools.count():
        for step in (1, 2):
            save_checkpoint(storage, scenarios.tree(step), step=step, metadata={"seed": step})
        replace = partial(save_checkpoint, storage, scenarios.tree(3), step=2, metadata={"seed": 3})
        faulty, done = _interrupted(storage, index, replace)
        assert is_whole(faulty)
        if not done:
            break


def test_restoring_the_newest_while_a_writer_deletes_it_gives_the_newer_one(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage = LocalStorage(str(tmp_path))
    scenarios.save(scenarios.manager_of(storage), 1, 1)
    pruned: list[None] = []

    class Reading(FaultyStorage):
        def local_path(self, key: str) -> Path:
            if key == "step_1/state.eqx" and not pruned:
                pruned.append(None)
                scenarios.save(scenarios.manager_of(storage, max_to_keep=1), 2, 2)
            return Path(str(super().local_path(key)))

    restored = CheckpointManager(Reading(storage)).restore(None, scenarios.tree(0))
    assert pruned
    assert scenarios.same(restored, scenarios.tree(2))


def test_a_file_that_is_missing_and_stays_so_is_damage(tmp_path: Path, scenarios: ModuleType) -> None:
    storage = LocalStorage(str(tmp_path))
    scenarios.prepare(storage)
    (tmp_path / "step_3" / "state.eqx").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"step_3/state\.eqx is missing"):
        load_checkpoint(storage, scenarios.tree(0), step=3)


def test_the_sweep_of_a_new_manager_spares_what_a_save_under_way_has_stored(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage = LocalStorage(str(tmp_path))
    swept: list[None] = []

    def sweep(call: Call) -> bool:
        if call.method == "write" and call.keys == ("step_1/manifest.json",):
            swept.append(None)
            # A dead attempt wanted the same names, and the new manager sweeps what it left.
            storage.write(".vibe_store/pending-20200101T000000-0.json", b'{"keys": ["step_1/state.eqx"]}')
            scenarios.save(scenarios.manager_of(storage), 2, 2)
        return False

    scenarios.save(scenarios.manager_of(FaultyStorage(storage, Fault(sweep))), 1, 1)
    assert swept
    assert scenarios.held(storage, 1) == 1
    assert verify_checkpoint(storage) == []


def test_a_replacement_beside_another_without_a_step_leaves_no_files_of_either_loser(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage, reached, index = LocalStorage(str(tmp_path)), True, 0
    save = partial(save_checkpoint, metadata={"a": 1})
    while reached:
        save(storage, scenarios.tree(1))
        faulty = FaultyStorage(storage, Fault(_between(index, partial(save, storage, scenarios.tree(2)))))
        save(faulty, scenarios.tree(3))
        reached = len(faulty.calls) > index
        commits = next(call.index for call in faulty.calls if call.keys == ("manifest.json",))
        if index != commits:  # as above
            named = {file.key for file in load_manifest(storage).files}
            found = {blob.key for blob in storage.list() if not blob.key.startswith(".vibe_store/")}
            assert found == {"manifest.json", *named}
        index += 1
    assert index > 3


def test_a_replacement_beside_another_of_the_same_step_leaves_no_files_of_either_loser(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    reached, index = True, 0
    while reached:
        folder = f"step_{index}/"
        save_checkpoint(storage, scenarios.tree(1), step=index)

        def replace(step: int = index) -> None:
            save_checkpoint(storage, scenarios.tree(2), step=step)

        faulty = FaultyStorage(storage, Fault(_between(index, replace)))
        save_checkpoint(faulty, scenarios.tree(3), step=index)
        reached = len(faulty.calls) > index
        # Between its last look at what it replaces and its manifest there is no room for the other one here.
        commits = next(call.index for call in faulty.calls if call.keys == (f"{folder}manifest.json",))
        if index != commits:
            assert scenarios.garbage(storage) == set()
            assert verify_checkpoint(storage) == []
        storage.delete([blob.key for blob in storage.list(folder)])
        index += 1
    assert index > 3
