"""Copying checkpoints between storages: whole ones, verified, and again where it stopped."""

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import numpy as np
import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    CopyProgress,
    copy_checkpoints,
    list_checkpoints,
    load_checkpoint,
    load_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.checkpoint.layout import attempt_of, read_best, write_best
from vibe_store.checkpoint.manifest import Manifest, encode, same_content
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidValueError,
    NewerFormatError,
    StepAlreadyExistsError,
    WriterLockedError,
)
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import EXIT_STATUS, Call, Fault, FaultyStorage

Place = Callable[[str], StorageBackend]


@pytest.fixture
def place(request: pytest.FixtureRequest, fast_path: Path) -> Place:
    """``place("s3")`` is a new directory there."""

    def new(kind: str) -> StorageBackend:
        name = uuid.uuid4().hex
        if kind == "local":
            return LocalStorage(str(fast_path / name))
        if kind == "memory":
            return MemoryStorage(f"memory://{name}")
        bucket: Any = request.getfixturevalue(kind)
        return bucket.open(name)

    return new


@pytest.fixture
def source(scenarios: ModuleType) -> StorageBackend:
    """A directory with the steps 1, 2 and 3, of two items and metadata each."""
    storage = MemoryStorage(f"memory://{uuid.uuid4().hex}")
    scenarios.prepare(storage)
    return storage


def _steps(storage: StorageBackend) -> list[int]:
    return [entry.step for entry in list_checkpoints(storage)]


def _keys(storage: StorageBackend) -> set[str]:
    return {blob.key for blob in storage.list()}


def _flip_a_bit(storage: StorageBackend, key: str) -> None:
    data = bytearray(storage.read(key))
    data[len(data) // 2] ^= 1
    storage.write(key, bytes(data))


def _key_of(storage: StorageBackend, step: int, name: str) -> str:
    files = load_manifest(storage, step=step).items["state"].files
    return f"step_{step}/{files[name].key}"


_PAIRS = [
    ("local", "local"),
    ("local", "memory"),
    ("memory", "local"),
    ("memory", "memory"),
    *(
        pytest.param(one, other, marks=pytest.mark.proof)
        for one, other in (
            ("s3", "local"),
            ("local", "s3"),
            ("gcs", "local"),
            ("local", "gcs"),
            ("s3", "gcs"),
        )
    ),
]


@pytest.mark.parametrize(("one", "other"), _PAIRS)
def test_a_copy_holds_what_its_source_holds_on_any_two_storages(
    one: str, other: str, place: Place, scenarios: ModuleType
) -> None:
    origin, goal = place(one), place(other)
    scenarios.prepare(origin)
    done = copy_checkpoints(origin, goal)
    assert (done.copied, done.skipped) == ((1, 2, 3), ())
    assert verify_checkpoint(goal) == []
    for step in scenarios.OLD_STEPS:
        assert scenarios.held(goal, step) == step
        was, now = load_manifest(origin, step=step), load_manifest(goal, step=step)
        assert (now.created, now.versions) == (was.created, was.versions)
        assert same_content(was, now)
        assert [item.distribution for item in now.items.values()] == [
            item.distribution for item in was.items.values()
        ]
    assert done.size == sum(load_manifest(goal, step=step).size for step in done.copied)
    again = copy_checkpoints(origin, goal)
    assert (again.copied, again.skipped, again.size) == ((), (1, 2, 3), 0)
    scenarios.check_next_writer(goal)


def test_a_copy_on_a_disk_has_plain_names_and_plain_equinox_loads_it(place: Place) -> None:
    bucket, disk = place("memory"), place("local")
    tree = {"w": np.arange(6.0).reshape(2, 3), "n": np.int32(7)}
    save_checkpoint(bucket, tree, step=5, metadata={"env": "x"}, metrics={"r": float("nan")})
    assert all(attempt_of(file.key) for file in load_manifest(bucket, step=5).files)
    copy_checkpoints(bucket, disk)
    assert {key for key in _keys(disk) if key.startswith("step_")} == {
        "step_5/manifest.json",
        "step_5/metadata.json",
        "step_5/state.eqx",
    }
    folder = Path(disk.url, "step_5")
    loaded = eqx.tree_deserialise_leaves(folder / "state.eqx", {"w": np.zeros((2, 3)), "n": np.int32(0)})
    np.testing.assert_array_equal(loaded["w"], tree["w"])
    assert loaded["n"] == 7


def test_plain_orbax_loads_a_copy_on_a_disk(place: Place) -> None:
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    from orbax.checkpoint import v1 as ocp

    bucket, disk = place("memory"), place("local")
    tree = {"w": np.arange(6.0, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    save_checkpoint(bucket, tree, step=5, serializer="orbax")
    copy_checkpoints(bucket, disk)
    loaded = ocp.load(Path(disk.url, "step_5"))
    np.testing.assert_array_equal(loaded["w"], tree["w"])
    np.testing.assert_array_equal(loaded["b"], tree["b"])
    np.testing.assert_array_equal(load_checkpoint(disk, tree, step=5)["w"], tree["w"])


def test_a_copy_in_a_bucket_has_names_of_its_own(place: Place, scenarios: ModuleType) -> None:
    disk, bucket = place("local"), place("memory")
    scenarios.prepare(disk)
    copy_checkpoints(disk, bucket)
    assert all(attempt_of(file.key) for file in load_manifest(bucket, step=1).files)


def test_a_checkpoint_without_a_step_is_copied_with_all_the_others_but_not_with_chosen_ones(
    place: Place, source: StorageBackend
) -> None:
    save_checkpoint(source, {"a": 1})
    everything, chosen = place("local"), place("local")
    assert copy_checkpoints(source, everything).copied == (None, 1, 2, 3)
    assert load_checkpoint(everything, {"a": 0}) == {"a": 1}
    assert copy_checkpoints(source, everything).skipped == (None, 1, 2, 3)
    assert copy_checkpoints(source, chosen, steps=[3, 1, 3]).copied == (1, 3)
    assert _steps(chosen) == [1, 3]


def test_one_steps_own_folder_is_copied_alone(place: Place, scenarios: ModuleType) -> None:
    disk, goal = place("local"), place("memory")
    scenarios.prepare(disk)
    assert copy_checkpoints(f"{disk.url}/step_2", goal).copied == (2,)
    with pytest.raises(InvalidValueError, match=r"folder of step 2 .* steps=\[3\]"):
        copy_checkpoints(f"{disk.url}/step_2", goal, steps=[3])


def test_the_folder_of_a_step_is_no_target(source: StorageBackend, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="The target is the folder of step 7"):
        copy_checkpoints(source, tmp_path / "step_7")
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_no_list_are_refused(source: StorageBackend, tmp_path: Path) -> None:
    wrong: Any = 5
    with pytest.raises(InvalidValueError, match="steps is a list of steps, or None for all; got 5"):
        copy_checkpoints(source, tmp_path, steps=wrong)


def test_a_step_that_is_not_there_is_refused_before_anything_is_copied(
    place: Place, source: StorageBackend
) -> None:
    goal = place("local")
    with pytest.raises(CheckpointNotFoundError, match=r"of step 8, 9 in .*; committed are: 1, 2, 3"):
        copy_checkpoints(source, goal, steps=[1, 9, 8])
    with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
        copy_checkpoints(place("memory"), goal)
    assert not Path(goal.url).exists()


def test_a_step_with_another_content_is_refused_before_anything_is_copied(
    place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    goal = place("local")
    save_checkpoint(goal, scenarios.tree(99), step=2)
    with pytest.raises(
        StepAlreadyExistsError, match="already holds step 2, with another content than memory"
    ):
        copy_checkpoints(source, goal)
    assert _steps(goal) == [2]
    assert copy_checkpoints(source, goal, steps=[1, 3]).copied == (1, 3)


def test_a_damaged_manifest_in_the_target_counts_as_another_content(
    place: Place, source: StorageBackend
) -> None:
    goal = place("local")
    copy_checkpoints(source, goal)
    _flip_a_bit(goal, "step_2/manifest.json")
    with pytest.raises(StepAlreadyExistsError, match="step 2"):
        copy_checkpoints(source, goal)


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("what", ["file", "manifest", "missing", "metadata"])
def test_a_damaged_step_is_left_out_whole_and_raised_when_the_others_are_copied(
    kind: str, what: str, place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    manifest = load_manifest(source, step=2)
    assert manifest.metadata is not None
    key = {
        "file": _key_of(source, 2, "state.eqx"),
        "missing": _key_of(source, 2, "state.eqx"),
        "manifest": "step_2/manifest.json",
        "metadata": f"step_2/{manifest.metadata.key}",
    }[what]
    if what == "missing":
        source.delete([key])
    else:
        _flip_a_bit(source, key)
    goal = place(kind)
    with pytest.raises(CorruptCheckpointError, match=f"step 2 in .* was not copied.*{key}"):
        copy_checkpoints(source, goal)
    assert _steps(goal) == [1, 3]
    assert not any(key.startswith("step_2/") for key in _keys(goal))
    assert scenarios.garbage(goal) == set()


def test_two_files_of_one_name_are_no_checkpoint(place: Place, source: StorageBackend) -> None:
    manifest = load_manifest(source, step=1)
    items = {**manifest.items, "other": manifest.items["state"]}
    source.write("step_1/manifest.json", encode(dataclasses.replace(manifest, items=items)))
    with pytest.raises(CorruptCheckpointError, match="gives one name to two files"):
        copy_checkpoints(source, place("local"), steps=[1])


def test_a_step_of_a_newer_format_is_refused_before_anything_is_copied(
    place: Place, source: StorageBackend
) -> None:
    newer = dataclasses.replace(load_manifest(source, step=3), format=2)
    source.write("step_3/manifest.json", encode(newer))
    goal = place("local")
    with pytest.raises(NewerFormatError):
        copy_checkpoints(source, goal)
    assert not Path(goal.url).exists()


def test_files_without_a_manifest_are_named_and_not_copied(
    place: Place, source: StorageBackend, caplog: pytest.LogCaptureFixture
) -> None:
    source.write("step_7/state.eqx", b"by hand")
    goal = place("local")
    assert copy_checkpoints(source, goal).copied == (1, 2, 3)
    assert [record.message for record in caplog.records if "Step 7" in record.message]


def test_pins_go_along_and_are_completed_by_the_next_copy(place: Place, source: StorageBackend) -> None:
    with CheckpointManager(source) as manager:
        manager.pin(2)
    goal = place("local")
    copy_checkpoints(source, goal)
    assert [entry.step for entry in list_checkpoints(goal) if entry.info and entry.info.pinned] == [2]
    goal.delete(["step_2/pinned"])  # as if the copy had died before it
    copy_checkpoints(source, goal)
    assert "step_2/pinned" in _keys(goal)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_best_goes_along_with_its_step_where_there_is_none_yet(
    kind: str, place: Place, source: StorageBackend
) -> None:
    write_best(source, 2)
    without, other, own = place(kind), place(kind), place(kind)
    copy_checkpoints(source, without, steps=[1])
    assert read_best(without) is None
    copy_checkpoints(source, other)
    assert read_best(other) == 2
    copy_checkpoints(source, own, steps=[1])
    write_best(own, 1)
    copy_checkpoints(source, own)
    assert read_best(own) == 1
    marked = place(kind)
    copy_checkpoints(_Meanwhile(source, lambda: write_best(marked, 3)), marked)
    assert read_best(marked) == 3


def _fails(copy: Callable[[], object]) -> bool:
    said = None
    try:
        copy()
    except OSError as error:
        said = str(error)
    assert said is None or "injected fault" in said
    return said is not None


class _Counting(FaultyStorage):
    """Remembers every call, those that only read too."""

    def __init__(self, inner: StorageBackend) -> None:
        self.seen: list[Call] = []
        super().__init__(inner, Fault(self._see))

    def _see(self, call: Call) -> bool:
        self.seen.append(call)
        return False


def test_to_copy_what_is_there_already_reads_each_manifest_once_and_writes_nothing(
    place: Place, source: StorageBackend
) -> None:
    write_best(source, 2)
    goal = place("memory")
    copy_checkpoints(source, goal)
    one, other = _Counting(source), _Counting(goal)
    copy_checkpoints(one, other)
    manifests = [f"step_{step}/manifest.json" for step in (1, 2, 3)]
    for storage in (one, other):
        assert sorted(call.keys[0] for call in storage.seen if call.method == "read") == ["best", *manifests]
        assert sum(call.method == "list" for call in storage.seen) <= 3
        assert {call.method for call in storage.seen} == {"read", "list"}


def test_a_chosen_step_is_copied_without_reading_any_other(place: Place, source: StorageBackend) -> None:
    origin = _Counting(source)
    copy_checkpoints(origin, place("memory"), steps=[2])
    read = [call.keys[0] for call in origin.seen if call.method == "read"]
    assert all(key == "best" or key.startswith("step_2/") for key in read)


@pytest.mark.usefixtures("dead_at_once")
@pytest.mark.parametrize("how", ["before", "after", "cut"])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_whichever_call_to_the_target_fails_no_half_a_step_is_seen_and_the_next_copy_completes_it(
    kind: str, how: Any, place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    with CheckpointManager(source) as manager:
        manager.pin(1)
    write_best(source, 3)
    index, failures, reached = 0, 0, True
    while reached:
        goal = place(kind)
        # Half a small object is never seen on any storage.
        never_half = "before" if how == "cut" else how
        faulty = FaultyStorage(
            goal, Fault(lambda call, at=index: call.index == at and call.method != "write", how),
            Fault(index, never_half),
        )  # fmt: skip
        failures += _fails(lambda to=faulty: copy_checkpoints(source, to))
        assert all(scenarios.held(goal, step) == step for step in _steps(goal))
        done = copy_checkpoints(source, goal)
        assert sorted([*done.copied, *done.skipped]) == [1, 2, 3]
        assert [scenarios.held(goal, step) for step in (1, 2, 3)] == [1, 2, 3]
        assert read_best(goal) == 3
        assert "step_1/pinned" in _keys(goal)
        goal.delete(["step_1/pinned"])
        if kind == "local":
            Path(goal.url, "best").unlink()
        else:
            goal.delete(["best"])
        scenarios.check_next_writer(goal)
        index, reached = index + 1, len(faulty.calls) > index
    assert failures > 6


def _at_call(number: int) -> Callable[[Call], bool]:
    """A predicate that meets one call, whether it changes something or only reads."""
    calls = itertools.count()
    return lambda _: next(calls) == number


def test_whichever_call_to_the_source_fails_the_copy_ends_and_goes_on_when_it_is_repeated(
    place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    number, failed = 0, True
    while failed:
        goal = place("local")
        faulty = FaultyStorage(source, Fault(_at_call(number)))
        failed = _fails(lambda of=faulty, to=goal: copy_checkpoints(of, to))
        assert all(scenarios.held(goal, step) == step for step in _steps(goal))
        copy_checkpoints(source, goal)
        assert [scenarios.held(goal, step) for step in (1, 2, 3)] == [1, 2, 3]
        assert scenarios.garbage(goal) == set()
        number += 1
    assert number > 10


_KILLED = """
from vibe_store.checkpoint import copy_checkpoints
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Fault, FaultyStorage

target = FaultyStorage(LocalStorage(arguments["target"]), Fault(arguments["index"], error=None))
copy_checkpoints(arguments["source"], target, steps=[1, 2])
"""


def test_whichever_call_a_copy_is_killed_in_the_next_one_completes_it(
    place: Place, scenarios: ModuleType, processes: Any
) -> None:
    origin = place("local")
    scenarios.prepare(origin)
    index, status, killed = 0, EXIT_STATUS, 0
    while status == EXIT_STATUS:
        goal = place("local")
        child = processes.start(_KILLED, source=origin.url, target=goal.url, index=index)
        status = child.wait()
        assert status in {0, EXIT_STATUS}, child.output
        assert all(scenarios.held(goal, step) == step for step in _steps(goal))
        copy_checkpoints(origin, goal)
        assert [scenarios.held(goal, step) for step in (1, 2, 3)] == [1, 2, 3]
        assert scenarios.garbage(goal) == set()
        index, killed = index + 1, killed + (status == EXIT_STATUS)
    assert killed > 6


class _Meanwhile(FaultyStorage):
    """Does something once, when a file that is no manifest is about to be read: the first, or a later one."""

    def __init__(self, inner: StorageBackend, act: Callable[[], object], *, after: int = 0) -> None:
        self._act, self._left = act, after + 1
        super().__init__(inner, Fault(self._at_file))

    def _at_file(self, call: Call) -> bool:
        if call.method == "read" and not call.keys[0].endswith("manifest.json") and "/" in call.keys[0]:
            self._left -= 1
            if self._left == 0:
                self._act()
        return False


def test_a_step_that_is_replaced_while_it_is_copied_is_copied_as_it_is_then(
    place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    goal, said = place("local"), list[CopyProgress]()
    replaced = _Meanwhile(source, lambda: scenarios.replace(source), after=1)
    done = copy_checkpoints(replaced, goal, steps=[3], on_progress=said.append)
    assert scenarios.held(goal, 3) == 33
    assert said[-1].bytes_read == done.size  # what was read in vain does not count


def test_a_step_that_is_deleted_while_it_is_copied_is_left_out_unless_it_was_asked_for(
    place: Place, source: StorageBackend, caplog: pytest.LogCaptureFixture
) -> None:
    def delete(step: int) -> Callable[[], None]:
        return lambda: source.delete([key for key in _keys(source) if key.startswith(f"step_{step}/")])

    goal = place("local")
    assert copy_checkpoints(_Meanwhile(source, delete(1)), goal).copied == (2, 3)
    assert any("deleted meanwhile" in record.message for record in caplog.records)
    with pytest.raises(CheckpointNotFoundError, match="of step 2"):
        copy_checkpoints(_Meanwhile(source, delete(2)), place("local"), steps=[2])


def test_a_step_that_another_process_copied_meanwhile_is_skipped_if_it_is_the_same(
    place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    goal = place("memory")
    done = copy_checkpoints(_Meanwhile(source, lambda: copy_checkpoints(source, goal, steps=[1])), goal)
    assert (done.copied, done.skipped) == ((2, 3), (1,))
    other = place("memory")
    saves = _Meanwhile(source, lambda: save_checkpoint(other, scenarios.tree(99), step=1))
    with pytest.raises(StepAlreadyExistsError):
        copy_checkpoints(saves, other)
    assert scenarios.garbage(other) == set()


def test_a_directory_that_another_process_writes_to_is_refused_on_a_disk(
    place: Place, source: StorageBackend, processes: Any, until: Callable[..., None]
) -> None:
    goal = place("local")
    write_best(source, 2)
    copy_checkpoints(source, goal, steps=[1, 2])
    processes.start(
        "with manager_of(__import__('vibe_store').open_storage(arguments['root'])) as manager:\n"
        "    save(manager, 9, 9)\n"
        "    import time\n"
        "    time.sleep(60)\n",
        root=goal.url,
    )
    until(lambda: 9 in _steps(goal))
    with pytest.raises(WriterLockedError):
        copy_checkpoints(source, goal)
    assert _steps(goal) == [1, 2, 9]
    assert copy_checkpoints(source, goal, steps=[1, 2]).skipped == (1, 2)  # which needs no lock


def test_a_run_that_writes_to_a_bucket_is_not_disturbed(
    place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    goal = place("memory")
    with scenarios.manager_of(goal, max_to_keep=9) as manager:
        scenarios.save(manager, 10, 10)
        writer = list(goal.list(".vibe_store/writer.json"))
        copy_checkpoints(source, goal)
        assert list(goal.list(".vibe_store/writer.json")) == writer
        scenarios.save(manager, 11, 11)
    assert _steps(goal) == [1, 2, 3, 10, 11]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_progress_counts_every_byte_and_step_once(kind: str, place: Place, source: StorageBackend) -> None:
    said: list[CopyProgress] = []
    done = copy_checkpoints(source, place(kind), on_progress=said.append)
    assert said == sorted(said, key=lambda each: (each.bytes_read, each.copied))
    assert {each.steps for each in said} == {3}
    assert {each.size for each in said} == {done.size}
    last = said[-1]
    assert (last.step, last.copied, last.bytes_read) == (3, 3, done.size)


def test_a_copy_that_is_interrupted_leaves_whole_steps_only(
    place: Place, source: StorageBackend, scenarios: ModuleType
) -> None:
    def interrupt(progress: CopyProgress) -> None:
        if progress.step == 2 and progress.bytes_read:
            raise KeyboardInterrupt

    goal = place("local")
    with pytest.raises(KeyboardInterrupt):
        copy_checkpoints(source, goal, on_progress=interrupt)
    assert _steps(goal) == [1]
    assert scenarios.garbage(goal) == set()
    assert copy_checkpoints(source, goal).skipped == (1,)


def test_contents_are_the_same_whatever_the_keys_the_time_and_a_nan(place: Place) -> None:
    one, other = place("memory"), place("memory")
    for storage in (one, other):
        save_checkpoint(storage, {"a": 1}, step=1, metrics={"r": float("nan"), "s": 1.0})
    assert same_content(load_manifest(one, step=1), load_manifest(other, step=1))


def _changed(manifest: Manifest) -> Iterator[Manifest]:
    state = manifest.items["state"]
    (name, file), *_ = state.files.items()
    for change in (
        {"serializer": "other"},
        {"leaves": state.leaves[1:]},
        {"files": {name: dataclasses.replace(file, checksum="0" * 32)}},
        {"files": {name: dataclasses.replace(file, size=file.size + 1)}},
        {"files": {f"{name}x": file}},
    ):
        yield dataclasses.replace(
            manifest, items={**manifest.items, "state": dataclasses.replace(state, **change)}
        )
    assert manifest.metadata is not None
    yield dataclasses.replace(manifest, metadata=dataclasses.replace(manifest.metadata, checksum="0" * 32))
    yield dataclasses.replace(manifest, metadata=None)
    yield dataclasses.replace(manifest, metrics={"r": 1.0})
    yield dataclasses.replace(manifest, items={"state": state})
    yield dataclasses.replace(manifest, step=4)


def test_contents_differ_where_anything_of_them_does(source: StorageBackend) -> None:
    manifest = load_manifest(source, step=1)
    assert same_content(manifest, dataclasses.replace(manifest, attempt="another"))
    assert not any(same_content(manifest, other) for other in _changed(manifest))
