"""Pruning outside a run: what goes, what is protected, and that a run beside it goes on."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import list_checkpoints, prune_checkpoints, verify_checkpoint
from vibe_store.checkpoint.layout import attempt_key, is_local, new_attempt, write_best
from vibe_store.checkpoint.step_index import committed_steps
from vibe_store.errors import InvalidValueError, WriterLockedError
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.retention import latest
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import Fault, FaultyStorage

_RETURNS = {1: 5.0, 2: 9.0, 3: float("nan"), 4: 9.0, 5: 7.0, 6: 1.0, 7: None}


@pytest.fixture
def filled(storage: StorageBackend, scenarios: ModuleType) -> StorageBackend:
    """A directory with the steps 1 to 7, of which the last has no metrics."""
    with scenarios.manager_of(storage, max_to_keep=100) as manager:
        for step, number in _RETURNS.items():
            metrics = None if number is None else {"r": number}
            manager.save(step, scenarios.tree(step), metrics=metrics)
    return storage


def _steps(storage: StorageBackend) -> list[int]:
    return [entry.step for entry in list_checkpoints(storage)]


def _contents(storage: StorageBackend) -> dict[str, bytes]:
    return {blob.key: storage.read(blob.key) for blob in storage.list()}


def test_all_but_the_highest_steps_go_with_all_their_files(
    filled: StorageBackend, scenarios: ModuleType
) -> None:
    done = prune_checkpoints(filled, latest(2))
    assert [info.step for info in done.deleted] == [1, 2, 3, 4, 5]
    assert [info.step for info in done.kept] == _steps(filled) == [6, 7]
    assert verify_checkpoint(filled) == []
    assert scenarios.garbage(filled) == set()


def test_a_dry_run_says_what_would_go_and_changes_nothing(filled: StorageBackend) -> None:
    before = _contents(filled)
    asked = {"keep_period": 3, "best_metric": "r", "best_mode": "max"}
    would = prune_checkpoints(filled, latest(1), dry_run=True, **asked)
    assert _contents(filled) == before
    assert would.deleted
    assert prune_checkpoints(filled, latest(1), **asked) == would


def test_a_dry_run_makes_nothing_but_reads(filled: StorageBackend) -> None:
    watched = FaultyStorage(filled)
    prune_checkpoints(watched, latest(1), dry_run=True)
    assert watched.calls == []


def test_what_is_protected_stays_whatever_the_policy(filled: StorageBackend, scenarios: ModuleType) -> None:
    write_best(filled, 1)
    scenarios.manager_of(filled).pin(4)
    prune_checkpoints(filled, latest(1), keep_period=3, best_metric="r", best_mode="max")
    assert _steps(filled) == [
        1,
        2,
        3,
        4,
        6,
        7,
    ]  # `best`, the best, of the period, pinned, of the period, the last


@pytest.mark.parametrize(("mode", "kept"), [("max", 2), ("min", 6)])
def test_the_best_is_by_the_mode_the_earliest_of_equals_and_never_nan(
    filled: StorageBackend, mode: Any, kept: int
) -> None:
    prune_checkpoints(filled, latest(1), best_metric="r", best_mode=mode)
    assert _steps(filled) == [kept, 7]


def test_a_metric_that_no_checkpoint_has_deletes_nothing(filled: StorageBackend) -> None:
    with pytest.raises(InvalidValueError, match=r"metric 'q'.* There are: r\. Nothing was deleted"):
        prune_checkpoints(filled, latest(1), best_metric="q", best_mode="max")
    assert len(_steps(filled)) == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"best_metric": "r"}, "best_mode says which is best"),
        ({"best_metric": "r", "best_mode": "most"}, "got 'most'"),
        ({"best_mode": "max"}, "give that too"),
        ({"keep_period": 0}, "keep_period"),
        ({"dead_after_secs": -1}, "dead_after_secs"),
        ({"dead_after_secs": "1"}, "dead_after_secs is a number of seconds, 0 or more; got '1'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused(
    storage: StorageBackend, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValueError, match=said):
        prune_checkpoints(storage, latest(1), **arguments)


def test_where_there_is_nothing_nothing_is_made(storage: StorageBackend) -> None:
    done = prune_checkpoints(storage, latest(1))
    assert (done.deleted, done.kept) == ((), ())
    root = storage.local_path("")
    assert list(storage.list()) == [] if root is None else not root.exists()


def test_a_step_whose_manifest_is_damaged_stays(
    filled: StorageBackend, caplog: pytest.LogCaptureFixture
) -> None:
    filled.write("step_1/manifest.json", b"{}")
    prune_checkpoints(filled, latest(1))
    assert _steps(filled) == [1, 7]
    assert any("Step 1 is left alone" in record.message for record in caplog.records)


def test_where_best_cannot_be_read_nothing_goes(filled: StorageBackend) -> None:
    if is_local(filled):
        root = filled.local_path("")
        assert root is not None
        (root / "best").symlink_to("elsewhere")
    else:
        filled.write("best", b"elsewhere")
    with pytest.raises(InvalidValueError, match="`best`"):
        prune_checkpoints(filled, latest(1))
    assert len(committed_steps(filled)) == 7


# A local directory is locked instead.
_NOT_LOCAL = pytest.mark.parametrize(
    "storage",
    ["memory", *(pytest.param(kind, marks=pytest.mark.proof) for kind in ("s3", "gcs"))],
    indirect=True,
)


@_NOT_LOCAL
def test_a_run_in_a_bucket_goes_on_beside_it(filled: StorageBackend, scenarios: ModuleType) -> None:
    with scenarios.manager_of(filled, max_to_keep=100) as manager:
        scenarios.save(manager, 8, 8)
        writer = list(filled.list(".vibe_store/writer.json"))
        prune_checkpoints(filled, latest(2))
        assert list(filled.list(".vibe_store/writer.json")) == writer
        scenarios.save(manager, 9, 9)
    assert _steps(filled) == [7, 8, 9]
    assert verify_checkpoint(filled) == []


def test_a_local_directory_that_another_process_writes_to_is_left_alone(
    fast_path: Any, scenarios: ModuleType, processes: Any, until: Any
) -> None:
    storage = LocalStorage(str(fast_path / "run"))
    scenarios.prepare(storage)
    processes.start(
        "import time\n"
        "from vibe_store import open_storage\n"
        "with manager_of(open_storage(arguments['root'])) as manager:\n"
        "    save(manager, 9, 9)\n"
        "    time.sleep(60)\n",
        root=storage.url,
    )
    until(lambda: 9 in _steps(storage))
    with pytest.raises(WriterLockedError):
        prune_checkpoints(storage, latest(1))
    assert _steps(storage) == [1, 2, 3, 9]
    would = prune_checkpoints(storage, latest(1), dry_run=True)
    assert [info.step for info in would.deleted] == [1, 2, 3]


@_NOT_LOCAL
def test_what_a_dead_writer_left_is_swept_when_it_is_old_enough(
    filled: StorageBackend, scenarios: ModuleType
) -> None:
    left = f"step_5/{attempt_key('state.eqx', new_attempt())}"
    filled.write(left, b"half a save")
    prune_checkpoints(filled, latest(100))
    assert filled.read(left) == b"half a save"
    prune_checkpoints(filled, latest(100), dead_after_secs=0)
    assert scenarios.garbage(filled) == set()
    assert len(_steps(filled)) == 7


def test_what_dead_writers_left_is_swept_where_no_step_was_ever_committed(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    attempt = new_attempt()
    folder = f".vibe_store/staging/{attempt}" if is_local(storage) else "step_1"
    storage.write(f"{folder}/{attempt_key('state.eqx', attempt)}", b"half a save")
    prune_checkpoints(storage, latest(1), dead_after_secs=0)
    assert scenarios.keys_of(storage) <= {".vibe_store/writer.lock"}


class _Clock(FaultyStorage):
    """Says that everything was written when the run began, and what a prune writes so many seconds later."""

    later = 0.0

    def list(self, prefix: str = "") -> Iterator[Blob]:
        for blob in super().list(prefix):
            yield replace(blob, modified=self.later if blob.key == ".vibe_store/clock" else 0.0)


def test_age_is_by_the_storages_own_clock_however_long_ago_the_run_began(scenarios: ModuleType) -> None:
    storage = _Clock(MemoryStorage(f"memory://{uuid.uuid4().hex}"))
    scenarios.prepare(storage)
    left = f"step_2/{attempt_key('state.eqx', new_attempt())}"
    storage.write(left, b"half a save")
    storage.later = 3599.0
    prune_checkpoints(storage, latest(100), dead_after_secs=3600)
    assert left in _contents(storage)
    storage.later = 3600.0
    prune_checkpoints(storage, latest(100), dead_after_secs=3600)
    assert left not in _contents(storage)
    assert ".vibe_store/clock" not in _contents(storage)
    assert len(_steps(storage)) == 3


@pytest.mark.usefixtures("dead_at_once")
def test_whichever_call_fails_no_half_a_step_is_left_and_the_next_prune_completes_it(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    index, failed = 0, True
    while failed:
        if 4 in _steps(storage):
            prune_checkpoints(storage, latest(1))
        with scenarios.manager_of(storage, max_to_keep=100) as manager:
            for step in {1, 2, 3, 4}.difference(manager.all_steps()):
                scenarios.save(manager, step, step)
        said, faulty = None, FaultyStorage(storage, Fault(index, "cut"))
        try:
            prune_checkpoints(faulty, latest(1))
        except OSError as error:
            said = str(error)
        assert said is None or "injected fault" in said
        failed = said is not None
        assert all(scenarios.held(storage, step) == step for step in _steps(storage))
        prune_checkpoints(storage, latest(1), dead_after_secs=0)
        assert _steps(storage) == [4]
        index += 1
    assert index > 3
