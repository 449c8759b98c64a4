"""Links, pointers and lists in a directory lead no reader out of it, and no sweep to what is committed."""

import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    list_checkpoints,
    load_checkpoint,
    load_eqx,
    load_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.checkpoint.pending import declare
from vibe_store.cli import main
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    VibeStoreError,
)
from vibe_store.run_dir import RunDir
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage


@pytest.fixture
def outside(original: Path, tmp_path: Path) -> Path:
    """Good checkpoints that are somebody else's."""
    shutil.copytree(original, tmp_path / "outside")
    return tmp_path / "outside"


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """What waits for ever fails instead."""

    def late(*_: object) -> None:
        raise AssertionError("it takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _everything(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "writer.lock" not in path.name
    }


@pytest.mark.parametrize(
    "name", ["step_5/state.eqx", "step_5/manifest.json", "step_5/metadata.json", "step_5"]
)
def test_a_link_out_of_the_root_is_not_followed(
    name: str, tampering: Any, outside: Path, tree: Any, watch: Any, is_sentence: Any
) -> None:
    root = tampering.root
    place = root / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(outside / name)
    with watch() as seen:
        for door in (
            lambda: load_checkpoint(root, tree, step=5) if "metadata" not in name else None,
            lambda: load_manifest(root, step=5),
            lambda: CheckpointManager(root).metadata(5),
        ):
            try:
                door()
            except VibeStoreError as error:
                is_sentence(error)
        assert list_checkpoints(root)[0].status == "committed"
    assert not [path for path in seen.outside(root) if "outside" in path]


def test_a_step_behind_a_link_out_of_the_root_is_passed_over_and_named_as_a_fault(
    tampering: Any, outside: Path, tree: Any
) -> None:
    state = tampering.root / "step_5" / "state.eqx"
    state.unlink()
    state.symlink_to(outside / "step_5" / "state.eqx")
    manager = CheckpointManager(tampering.root)
    with pytest.warns(DamagedCheckpointWarning, match="Step 5 .* leads out"):
        manager.restore(None, tree)
    (fault,) = verify_checkpoint(tampering.root)
    assert (fault.step, fault.file) == (5, "step_5/state.eqx")


@pytest.mark.parametrize(
    "target", ["{outside}/step_5", "../outside/step_5", "/etc", "step_5/..", ".", "step_05"]
)
def test_best_leads_nowhere_but_to_a_step_beside_it(
    target: str, tampering: Any, outside: Path, tree: Any, watch: Any, is_sentence: Any
) -> None:
    root = tampering.root
    (root / "best").symlink_to(target.format(outside=outside))
    run = RunDir(base_dir=root.parent.parent, run_id=root.parent.name)
    with watch() as seen:
        for door in (
            lambda: load_checkpoint(root / "best", tree),
            lambda: load_manifest(root / "best"),
            lambda: run.best_checkpoint,
            lambda: list_checkpoints(root),
            lambda: RunDir(base_dir=root.parent.parent, run_id=root.parent.name).cleanup_checkpoints(1),
        ):
            with pytest.raises(InvalidValueError, match="no step_N beside it") as caught:
                door()
            is_sentence(caught.value)
    assert not [path for path in seen.outside(root) if "outside" in path]
    assert len(_everything(root)) == 6


def test_best_is_not_followed_through_a_step_that_is_a_link(
    tampering: Any, outside: Path, tree: Any, watch: Any
) -> None:
    root = tampering.root
    (root / "step_6").symlink_to(outside / "step_5")
    (root / "best").symlink_to("step_6")
    with watch() as seen, pytest.raises((InvalidValueError, CheckpointNotFoundError)):
        load_checkpoint(root / "best", tree)
    assert not [path for path in seen.outside(root) if "outside" in path]


@pytest.mark.parametrize(
    "pointer", [b"../../x", b"/etc", b"step_5/../..", b"\xff\xfe", b"", b"step_" + b"9" * 5000, b"step_5\0"]
)
def test_a_pointer_that_names_no_step_is_refused(pointer: bytes) -> None:
    storage = MemoryStorage(f"memory://{uuid.uuid4().hex}")
    save_checkpoint(storage, 1, step=5)
    storage.write("best", pointer)
    with pytest.raises(InvalidValueError, match="no step_N beside it") as caught:
        list_checkpoints(storage)
    assert len(str(caught.value)) < 1000


def _declare(root: Path, content: bytes) -> None:
    """Write what the list of a dead writer's keys would be."""
    attempt = "20200101T000000-0000000000"
    declare(LocalStorage(str(root)), attempt, ["garbage"])
    [path] = (root / ".vibe_store").rglob(f"*{attempt}*")
    path.write_bytes(content)


def test_a_sweep_removes_what_a_list_names_and_no_manifest_does(tampering: Any, tree: Any) -> None:
    (tampering.root / "step_5/garbage").touch()
    _declare(tampering.root, b'{"attempt": "x", "keys": ["step_5/garbage", "step_5/state.eqx"]}')
    save_checkpoint(tampering.root, tree, step=6)
    assert not (tampering.root / "step_5/garbage").exists()
    assert (tampering.root / "step_5/state.eqx").exists()


PENDING: dict[str, Any] = {
    "a way out": ["../../outside/step_5/state.eqx"],
    "an absolute path": ["/etc/passwd"],
    "a committed manifest": ["step_5/manifest.json"],
    "a committed file": ["step_5/state.eqx", "step_4/state.eqx"],
    "a pin": ["step_5/pinned"],
    "the pointer": ["best"],
    "the lock": [".vibe_store/writer.lock"],
    "a manifest under another spelling": ["step_5//manifest.json", "./step_5/manifest.json"],
    "the root's manifest": ["manifest.json"],
    "a file of a damaged step": ["step_4/metadata.json", "step_4/state.eqx"],
    "no text": [5],
    "no list": "step_5/manifest.json",
    "nothing": None,
}


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("keys", PENDING.values(), ids=PENDING)
def test_a_sweep_removes_nothing_that_is_committed_or_elsewhere(keys: Any, tampering: Any, tree: Any) -> None:
    root = tampering.root
    (root / "step_5/pinned").touch()
    (root / "best").symlink_to("step_5")
    if "step_4/metadata.json" in (keys or []):
        (root / "step_4/manifest.json").write_bytes(b"damaged")
    _declare(root, json.dumps({"attempt": "x", "keys": keys}).encode())
    before = _everything(root.parent)
    save_checkpoint(root, tree, step=6)
    after = _everything(root.parent)
    assert {name: data for name, data in before.items() if "/pending" not in name}.items() <= after.items()
    assert (root / "best").readlink() == Path("step_5")
    assert (root / ".vibe_store/writer.lock").exists()


@pytest.mark.parametrize(
    "content", [b"[" * 10_000, b"\xff\xfe", b"", b"null", b'{"keys": 1' + b"0" * 10_000 + b"}"]
)
def test_a_list_that_cannot_be_read_stops_nobody(content: bytes, tampering: Any, tree: Any) -> None:
    _declare(tampering.root, content)
    save_checkpoint(tampering.root, tree, step=6)
    assert [each.step for each in list_checkpoints(tampering.root)] == [4, 5, 6]


def test_a_staging_folder_that_is_a_link_is_not_swept(tampering: Any, tree: Any) -> None:
    root = tampering.root
    shutil.rmtree(root / ".vibe_store/staging", ignore_errors=True)
    (root / ".vibe_store/staging").symlink_to("..")
    CheckpointManager(root).pin(5)
    assert load_checkpoint(root, tree, step=5)["text"] == "hello"


def test_what_is_no_folder_in_the_staging_folder_is_swept_as_well(
    tampering: Any, tree: Any, tmp_path: Path
) -> None:
    staging = tampering.root / ".vibe_store/staging"
    staging.mkdir(exist_ok=True)
    (staging / "file").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (staging / "link").symlink_to(tmp_path / "kept")
    save_checkpoint(tampering.root, tree, step=6)
    assert not list(staging.iterdir())
    assert (tmp_path / "kept/file").exists()


def test_a_lock_file_that_is_a_link_is_not_written_through(tampering: Any, tree: Any) -> None:
    lock = tampering.root / ".vibe_store/writer.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to("../step_5/state.eqx")
    with pytest.raises(OSError, match="Could not write"):
        save_checkpoint(tampering.root, tree, step=6)
    assert load_checkpoint(tampering.root, tree, step=5)["text"] == "hello"


def test_a_folder_of_a_step_without_end_is_no_step() -> None:
    storage = MemoryStorage(f"memory://{uuid.uuid4().hex}")
    save_checkpoint(storage, 1, step=10**18 - 1)
    for number in ("9" * 19, "9" * 5000, "1" + "0" * 10_000):
        storage.write(f"step_{number}/manifest.json", b"{}")
    assert [each.step for each in list_checkpoints(storage)] == [10**18 - 1]
    assert not verify_checkpoint(storage)
    with pytest.raises(InvalidValueError, match="at most"):
        load_checkpoint(storage, 1, step=10**5000)


def test_thousands_of_folders_take_seconds_at_most(tampering: Any, tree: Any) -> None:
    for number in range(6, 3000):
        (tampering.root / f"step_{number}").mkdir()
        (tampering.root / f"step_{number}/manifest.json").write_bytes(b"{}")
    start = time.monotonic()
    found = list_checkpoints(tampering.root)
    assert len(found) == 2996
    assert load_checkpoint(tampering.root, tree, step=5)["text"] == "hello"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "name",
    [
        "state.eqx",
        "manifest.json",
        "metadata.json",
        "pinned",
    ],
)
def test_a_pipe_in_place_of_a_file_keeps_nobody_waiting(
    name: str, tampering: Any, tree: Any, is_sentence: Any
) -> None:
    (tampering.root / "step_5" / name).unlink(missing_ok=True)
    os.mkfifo(tampering.root / "step_5" / name)
    for door in (
        lambda: load_checkpoint(tampering.root, tree, step=5),
        lambda: CheckpointManager(tampering.root).metadata(5),
        lambda: verify_checkpoint(tampering.root, step=5),
        lambda: list_checkpoints(tampering.root),
    ):
        try:
            door()
        except VibeStoreError as error:
            is_sentence(error)


def test_a_file_in_place_of_a_folder_is_a_fault_that_is_named(tampering: Any, tree: Any) -> None:
    fields = tampering.manifest()
    fields["items"]["state"]["files"]["state.eqx"]["key"] = "metadata.json/state.eqx"
    tampering.write_manifest(fields)
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(tampering.root, tree, step=5)
    assert len(verify_checkpoint(tampering.root, step=5)) == 1


def test_load_eqx_does_not_follow_a_manifest_out_of_the_folder(
    tampering: Any, outside: Path, tree: Any, watch: Any
) -> None:
    step = tampering.root / "step_5"
    (step / "away").symlink_to(outside / "step_5")
    fields = tampering.manifest()
    fields["items"]["state"]["files"]["state.eqx"]["key"] = "away/state.eqx"
    tampering.write_manifest(fields)
    with watch() as seen, pytest.raises(VibeStoreError):
        load_eqx(step / "state.eqx", tree)
    assert not [path for path in seen.outside(tampering.root) if "outside" in path]


def test_folders_in_folders_without_end_are_listed(tampering: Any) -> None:
    here = os.open(tampering.root / "step_5", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        assert [each.step for each in list_checkpoints(tampering.root)] == [4, 5]
    finally:
        os.system(f"rm -rf '{tampering.root}/step_5/d'")  # noqa: S605 - what Python removes, it removes recursively


def test_a_link_with_the_name_of_an_unfinished_file_stops_no_writer(
    tampering: Any, tree: Any, outside: Path
) -> None:
    (tampering.root / "step_5/.vibe-store-tmp-x").symlink_to(outside / "step_5/state.eqx")
    save_checkpoint(tampering.root, tree, step=6)
    assert (outside / "step_5/state.eqx").exists()


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_the_command_prints_no_control_sequences(command: str, tampering: Any, capsys: Any) -> None:
    evil = "\x1b]0;pwned\x07\x1b[2J\x9b31m"
    fields = tampering.manifest()
    fields["versions"] = {evil: evil}
    fields["metrics"] = {evil: 1.0}
    fields["items"]["state"]["leaves"][0]["path"] = evil
    next(row for row in fields["items"]["state"]["leaves"] if row["kind"] == "str")["value"] = evil
    tampering.write_manifest(fields)
    arguments = [str(tampering.root), "5"] if command != "ls" else [str(tampering.root)]
    main([command, *arguments])
    shown = capsys.readouterr()
    for character in "\x1b\x07\x9b":
        assert character not in shown.out + shown.err


def test_the_watch_would_see_a_file_outside(watch: Any, tampering: Any, outside: Path) -> None:
    with watch() as seen:
        LocalStorage(str(outside)).read("step_5/manifest.json")
    assert [path for path in seen.outside(tampering.root) if "outside" in path]
