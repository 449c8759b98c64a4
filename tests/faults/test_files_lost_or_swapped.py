"""Files of a checkpoint that are cut, gone, emptied, longer or another's are found, by name."""

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vibe_store.checkpoint import CheckpointManager, list_checkpoints, verify_checkpoint
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, DamagedCheckpointWarning

STEP = 2
dice = random.Random(7)


@pytest.fixture(scope="module")
def root(serializer: str, fast_path: Path, writing: ModuleType) -> Path:
    """Two steps with all that a step can have."""
    root: Path = fast_path / serializer / "run" / "checkpoints"
    writing.prepare(root, serializer, {1: 1, STEP: 2})
    return root


@pytest.fixture(scope="module")
def manager(root: Path, serializer: str) -> CheckpointManager:
    return CheckpointManager(root, serializer=serializer)


@pytest.fixture(autouse=True)
def whole_again(root: Path, writing: ModuleType) -> Iterator[None]:
    """See that each test starts from, and leaves, what was saved."""
    assert verify_checkpoint(root) == []
    yield
    assert verify_checkpoint(root) == []
    assert writing.stray(root) == set()


def files_of(root: Path, *steps: int) -> list[Path]:
    folders = [root / f"step_{step}" for step in steps]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def is_refused(manager: CheckpointManager, writing: ModuleType, step: int, path: Path) -> bool:
    """Whether asking for what a file is of, metadata or items, raises an error that names the file."""
    like = writing.tree(0)
    asked: list[Callable[[], object]] = [
        lambda: manager.metadata(step),
        lambda: manager.restore(step, like, items={"aux": like}),
    ]
    raised = []
    for ask in asked:
        try:
            ask()
        except CorruptCheckpointError as error:
            raised.append(str(error))
    return bool(raised) and all(path.name in message for message in raised)


def check_found(
    manager: CheckpointManager, writing: ModuleType, root: Path, path: Path, *, newest: bool = True
) -> None:
    """Check that a damaged file of the newer step is named by all who look, and the older step restores."""
    assert is_refused(manager, writing, STEP, path)
    faults = verify_checkpoint(root, step=STEP)
    assert [fault.file for fault in faults] == [str(path.relative_to(root))]
    if newest:
        like = writing.tree(0)
        with pytest.warns(DamagedCheckpointWarning, match=rf"Step {STEP} .*{path.name}"):
            state, items = manager.restore(None, like, items={"aux": like})
        assert writing.same(state, writing.tree(1))
        assert writing.same(items["aux"], writing.tree(1001))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda _: b"",
    "cut by a byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "cut anywhere": lambda data: data[: dice.randrange(max(1, len(data)))],
    "cut anywhere else": lambda data: data[: dice.randrange(max(1, len(data)))],
    "its first byte lost": lambda data: data[1:],
    "a zero longer": lambda data: data + b"\0",
    "a line longer": lambda data: data + b"\n",
    "something longer": lambda data: data + dice.randbytes(1 + dice.randrange(5000)),
    "twice as long": lambda data: data + data,
    "zeros": lambda data: bytes(len(data)),
    "something else": lambda data: dice.randbytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_longer_shorter_or_another_is_found_and_the_step_before_restores(
    damage: str, root: Path, manager: CheckpointManager, writing: ModuleType, serializer: str
) -> None:
    damaged = 0
    for path in files_of(root, STEP):
        data = path.read_bytes()
        if (other := DAMAGES[damage](data)) == data:
            continue  # an empty file, cut
        path.write_bytes(other)
        newest = serializer == "eqx" or path.suffix == ".json" or dice.random() < 0.2
        check_found(manager, writing, root, path, newest=newest)
        path.write_bytes(data)
        damaged += 1
    assert damaged >= 4


@pytest.mark.parametrize("instead", ["nothing", "a folder", "a link to nothing", "a link to itself"])
def test_a_file_that_is_gone_is_found_and_the_step_before_restores(
    instead: str, root: Path, manager: CheckpointManager, writing: ModuleType, serializer: str
) -> None:
    for path in files_of(root, STEP):
        if path.name == "manifest.json":
            continue  # its own test, below
        data = path.read_bytes()
        path.unlink()
        if instead == "a folder":
            path.mkdir()
        elif instead != "nothing":
            path.symlink_to("nowhere" if instead == "a link to nothing" else path.name)
        newest = serializer == "eqx" or path.suffix == ".json" or dice.random() < 0.2
        check_found(manager, writing, root, path, newest=newest)
        path.rmdir() if instead == "a folder" else path.unlink(missing_ok=True)
        path.write_bytes(data)


def test_a_folder_that_a_file_replaced_is_found_and_the_step_before_restores(
    root: Path, manager: CheckpointManager, writing: ModuleType, serializer: str
) -> None:
    folders = [path for path in (root / f"step_{STEP}").rglob("*") if path.is_dir()]
    assert bool(folders) == (serializer == "orbax")
    for folder in folders:
        aside = folder.rename(root.parent / "aside")
        folder.touch()
        with pytest.warns(DamagedCheckpointWarning, match=rf"Step {STEP} .*is missing"):
            assert writing.same(
                manager.restore(None, writing.tree(0), items={"aux": writing.tree(0)})[0], writing.tree(1)
            )
        assert verify_checkpoint(root, step=STEP) != []
        folder.unlink()
        aside.rename(folder)


def test_a_step_whose_manifest_is_gone_is_none_any_more(
    root: Path, manager: CheckpointManager, writing: ModuleType
) -> None:
    path = root / f"step_{STEP}" / "manifest.json"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"step {STEP}"):
        manager.restore(STEP, writing.tree(0))
    assert writing.same(manager.restore(None, writing.tree(0)), writing.tree(1))
    assert [(each.step, each.status) for each in list_checkpoints(root)] == [
        (1, "committed"),
        (STEP, "unverified"),
    ]
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    beside = one.with_name("beside")
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def test_files_that_two_steps_exchanged_are_found_in_both(
    root: Path, manager: CheckpointManager, writing: ModuleType, serializer: str
) -> None:
    exchanged = 0
    for one, other in itertools.product(files_of(root, 1), files_of(root, STEP)):
        same_place = one.relative_to(root / "step_1") == other.relative_to(root / f"step_{STEP}")
        unlike = one.read_bytes() == other.read_bytes()
        manifests = (one.name == "manifest.json") + (other.name == "manifest.json")
        if unlike or (manifests == 1) or not (same_place or dice.random() < 0.2):
            continue
        swap(one, other)
        assert is_refused(manager, writing, STEP, other)
        assert is_refused(manager, writing, 1, one)
        swap(one, other)
        exchanged += 1
    assert exchanged >= 4
    assert serializer == "eqx" or exchanged >= 20


def test_files_that_two_items_exchanged_are_found(
    root: Path, manager: CheckpointManager, writing: ModuleType
) -> None:
    files = files_of(root, STEP)
    state, aux = (
        [path for path in files if name in str(path.relative_to(root))] for name in ("state", "aux")
    )
    exchanged = 0
    for one, other in itertools.product(state, aux):
        if one.read_bytes() != other.read_bytes():
            swap(one, other)
            assert is_refused(manager, writing, STEP, one)
            faults = {fault.file for fault in verify_checkpoint(root, step=STEP)}
            assert faults == {str(path.relative_to(root)) for path in (one, other)}
            swap(one, other)
            exchanged += 1
    assert exchanged >= 1


def test_the_manifest_of_another_step_is_found(
    root: Path, manager: CheckpointManager, writing: ModuleType
) -> None:
    path = root / f"step_{STEP}" / "manifest.json"
    data = path.read_bytes()
    path.write_bytes((root / "step_1" / "manifest.json").read_bytes())
    check_found(manager, writing, root, path)
    path.write_bytes(data)


def test_folders_that_two_steps_exchanged_are_found(
    root: Path, manager: CheckpointManager, writing: ModuleType
) -> None:
    swap(root / "step_1", root / f"step_{STEP}")
    for step in (1, STEP):
        assert is_refused(manager, writing, step, root / f"step_{step}" / "manifest.json")
    with (
        pytest.warns(DamagedCheckpointWarning, match="Step"),
        pytest.raises(CorruptCheckpointError, match=r"None of the steps \[1, 2\]"),
    ):
        manager.restore(None, writing.tree(0))
    swap(root / "step_1", root / f"step_{STEP}")


def test_a_step_under_the_name_of_another_is_found(
    root: Path, manager: CheckpointManager, writing: ModuleType
) -> None:
    shutil.copytree(root / "step_1", root / "step_7")
    with pytest.raises(CorruptCheckpointError, match=r"step 1; it was moved or copied"):
        manager.restore(7, writing.tree(0))
    with pytest.warns(DamagedCheckpointWarning, match="Step 7 "):
        assert writing.same(manager.restore(None, writing.tree(0)), writing.tree(2))
    shutil.rmtree(root / "step_7")


def test_with_every_step_damaged_nothing_is_restored_and_each_is_named(
    root: Path, manager: CheckpointManager, writing: ModuleType
) -> None:
    paths = [next(path for path in files_of(root, step) if "state" in str(path)) for step in (1, STEP)]
    contents = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"")
    with (
        pytest.warns(DamagedCheckpointWarning) as warned,
        pytest.raises(CorruptCheckpointError, match=r"None of the steps \[1, 2\]"),
    ):
        manager.restore(None, writing.tree(0))
    assert [str(each.message).partition(" in ")[0] for each in warned] == [f"Step {STEP}", "Step 1"]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
