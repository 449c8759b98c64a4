"""The highest step, found with three requests however many steps there are."""

from collections.abc import Iterator
from itertools import islice
from types import ModuleType

import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    find_checkpoint,
    initialize_checkpoint_dir,
    save_checkpoint,
)
from vibe_store.checkpoint.step_index import INDEX, mark_key, marked_step
from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import FaultyStorage


class Paged(FaultyStorage):
    """Counts requests as a bucket does: one for each thousand keys that are listed."""

    requests = 0

    def list(self, prefix: str = "") -> Iterator[Blob]:
        self.requests += 1
        found = iter(list(self.inner.list(prefix)))
        while page := list(islice(found, 1000)):
            yield from page
            if len(page) == 1000:
                self.requests += 1

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.requests += 1
        return super().read(key, start, end)


def _bucket_of(steps: int, name: str, *, marked: bool = True) -> MemoryStorage:
    bucket = MemoryStorage(f"memory://{name}")
    for step in range(steps):
        bucket.write(f"step_{step}/manifest.json", b"{}")
        if marked:
            bucket.write(mark_key(step), b"")
    return bucket


def _latest(bucket: StorageBackend) -> tuple[int | None, int]:
    paged = Paged(bucket)
    return CheckpointManager(paged).latest_step(), paged.requests


@pytest.mark.parametrize("steps", [0, 1, 12, 999, 1000, 1001, 3000])
def test_three_requests_are_enough(steps: int) -> None:
    latest, requests = _latest(_bucket_of(steps, f"enough-{steps}"))
    assert latest == (steps - 1 if steps else None)
    assert requests <= 3


def test_a_mark_of_a_step_that_was_never_committed_is_passed_over() -> None:
    bucket = _bucket_of(1500, "never")
    bucket.write(mark_key(9999), b"")
    assert _latest(bucket)[0] == 1499


def test_where_no_mark_helps_all_steps_are_listed() -> None:
    assert _latest(_bucket_of(1500, "unmarked", marked=False))[0] == 1499


def test_a_step_that_was_copied_there_without_its_mark_is_what_a_run_resumes_from(
    scenarios: ModuleType,
) -> None:
    bucket = _bucket_of(1500, "by-hand")
    for step in (200_000, 900_000):
        save_checkpoint(bucket, scenarios.tree(step), step=step)
    for number in range(1000):  # of steps that sort before it
        bucket.write(f"step_1000{number}/foreign", b"")
    bucket.delete([mark_key(900_000)])
    assert find_checkpoint(bucket) == (bucket, 900_000)
    manager, resuming = initialize_checkpoint_dir(bucket, resume=True)
    assert resuming
    assert manager.latest_step() == 900_000
    manager.close()


def test_a_step_that_the_first_page_shows_is_found_without_a_mark() -> None:
    bucket = _bucket_of(1500, "lost")
    bucket.write("step_1000000/manifest.json", b"{}")  # sorts among the first
    assert _latest(bucket)[0] == 1_000_000


def test_what_was_copied_into_a_directory_is_marked_by_its_next_writer(scenarios: ModuleType) -> None:
    bucket = MemoryStorage("memory://copied")
    for step in (1, 2):
        save_checkpoint(bucket, scenarios.tree(step), step=step)
    bucket.delete([blob.key for blob in bucket.list(INDEX)])
    bucket.write(f"{INDEX}notes", b"")
    sweep_unnamed(bucket, older_than=1e9)
    assert {marked_step(blob.key) for blob in bucket.list(INDEX)} == {1, 2, None}


def test_marks_go_with_their_steps(scenarios: ModuleType) -> None:
    bucket = MemoryStorage("memory://pruned")
    with CheckpointManager(bucket, max_to_keep=2) as manager:
        for step in range(5):
            manager.save(step, scenarios.tree(step))
    assert {marked_step(blob.key) for blob in bucket.list(INDEX)} == {3, 4}
