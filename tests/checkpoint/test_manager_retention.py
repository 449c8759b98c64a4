"""What CheckpointManager deletes, and what it never does."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.checkpoint import CheckpointManager
from vibe_store.errors import CheckpointNotFoundError, SaveFailedError
from vibe_store.interfaces import CheckpointInfo, StorageBackend
from vibe_store.run_dir import RunDir
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage

_TREE = {"a": np.zeros(1)}


def _everything(checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
    return frozenset(info.step for info in checkpoints if info.step is not None)


def _save(manager: CheckpointManager, *steps: int, **options: Any) -> None:
    for step in steps:
        manager.save(step, _TREE, **options)


def test_the_highest_steps_and_the_multiples_of_the_period_stay(storage: StorageBackend) -> None:
    with CheckpointManager(storage, max_to_keep=2, keep_period=4, async_timeout_secs=None) as manager:
        _save(manager, *range(11))
        assert manager.all_steps() == [0, 4, 8, 9, 10]


def test_the_best_stays_however_old_and_goes_when_another_is_better(storage: StorageBackend) -> None:
    with CheckpointManager(storage, max_to_keep=1, best_fn=lambda metrics: metrics["loss"]) as manager:
        for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 1.5]):
            manager.save(step, _TREE, metrics={"loss": loss})
        assert manager.all_steps() == [1, 4]
        manager.save(5, _TREE, metrics={"loss": 0.5})
        manager.save(6, _TREE)
        assert manager.all_steps() == [5, 6]
        assert manager.best_step() == 5


def test_a_policy_is_named_with_its_options(storage: StorageBackend) -> None:
    with CheckpointManager(storage, retention="every_steps:interval=4", async_timeout_secs=None) as manager:
        _save(manager, *range(1, 7))
        assert manager.all_steps() == [4, 6]


def test_pinned_steps_stay_until_they_are_unpinned(storage: StorageBackend) -> None:
    with CheckpointManager(storage, max_to_keep=1) as manager:
        _save(manager, 1)
        manager.pin(1)
        assert manager.info(1).pinned
        _save(manager, 2, 3)
        assert manager.all_steps() == [1, 3]
        manager.unpin(1)
        assert not manager.info(1).pinned
        _save(manager, 4)
        assert manager.all_steps() == [4]
        with pytest.raises(CheckpointNotFoundError):
            manager.pin(9)


def test_the_target_of_best_stays_even_where_it_was_marked_before_it_was_committed(tmp_path: Path) -> None:
    run = RunDir("run", base_dir=tmp_path)
    run.mark_best(2)
    with CheckpointManager(run.checkpoints, max_to_keep=1) as manager:
        _save(manager, 1, 2, 3, 4)
        assert manager.all_steps() == [2, 4]
        run.mark_best(4)
        _save(manager, 5)
        assert manager.all_steps() == [4, 5]


def test_what_was_restored_stays_until_a_higher_step_is_committed(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, retention=lambda _: frozenset()) as before:
        _save(before, 10, 20, 30)
    manager = CheckpointManager(tmp_path, max_to_keep=1)
    manager.restore(20, _TREE)
    _save(manager, 15)
    assert manager.all_steps() == [15, 20, 30]
    _save(manager, 25)
    assert manager.all_steps() == [25, 30]
    manager.close()


def test_the_step_saved_last_stays_even_below_the_highest(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        _save(manager, 50, 7)
        assert manager.all_steps() == [7, 50]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_policy_that_deletes_everything_deletes_nothing_that_is_protected(data: st.DataObject) -> None:
    storage = MemoryStorage(f"memory://{uuid.uuid4().hex}")
    steps = sorted(data.draw(st.sets(st.integers(0, 30), min_size=3, max_size=8)))
    losses = {step: data.draw(st.sampled_from([1.0, 2.0, float("nan")])) for step in steps}
    with CheckpointManager(storage, retention=lambda _: frozenset(), async_timeout_secs=None) as before:
        for step in steps:
            before.save(step, _TREE, metrics={"loss": losses[step]})
        pinned = data.draw(st.sampled_from(steps))
        before.pin(pinned)
    marked = data.draw(st.sampled_from(steps))
    storage.write("best", f"step_{marked}\n".encode())
    period = data.draw(st.none() | st.integers(1, 9))
    restored = data.draw(st.sampled_from(steps))
    manager = CheckpointManager(
        storage,
        retention=_everything,
        keep_period=period,
        best_fn=lambda metrics: metrics["loss"],
        async_timeout_secs=None,
    )
    manager.restore(restored, _TREE)
    new = data.draw(st.integers(0, 40).filter(lambda step: step not in steps))
    manager.save(new, _TREE)
    ranked = [step for step in steps if losses[step] == losses[step]]
    best = min(ranked, key=lambda step: (losses[step], step), default=None)
    kept = {new, pinned, marked, best, max(steps[-1], new)} | ({restored} if new <= restored else set())
    kept |= {step for step in steps if period is not None and step % period == 0}
    assert manager.all_steps() == sorted(step for step in kept if step is not None)


def test_a_policy_that_names_an_unknown_step_is_an_error_and_deletes_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, retention=lambda _: frozenset({1, 99}), async_timeout_secs=None)
    with pytest.raises(SaveFailedError, match=r"Step 1 was saved, but .* the steps \[99\]"):
        manager.save(1, _TREE)
    with pytest.raises(SaveFailedError, match=r"Step 2 was saved, but .* the steps \[99\]"):
        manager.save(2, _TREE)
    assert manager.all_steps() == [1, 2]


def test_a_policy_is_shown_every_checkpoint_with_its_metrics_and_pins(tmp_path: Path) -> None:
    shown: list[Sequence[CheckpointInfo]] = []

    def policy(checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        shown.append(checkpoints)
        return frozenset()

    with CheckpointManager(tmp_path, retention=policy) as manager:
        manager.save(1, _TREE, metrics={"loss": 1.0})
        manager.pin(1)
        manager.save(2, _TREE)
    assert [(info.step, info.metrics, info.pinned) for info in shown[-1]] == [
        (1, {"loss": 1.0}, True),
        (2, None, False),
    ]


def test_a_best_that_leads_elsewhere_stops_deletion_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").symlink_to(tmp_path)
    with CheckpointManager(tmp_path / "checkpoints", max_to_keep=1) as manager:
        _save(manager, 1, 2)
        assert manager.all_steps() == [1, 2]
    assert "No checkpoint in" in caplog.text
    assert (tmp_path / "checkpoints" / "best").readlink() == tmp_path


def test_hand_written_checkpoints_are_neither_counted_nor_deleted(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    by_hand = tmp_path / "step_0"
    by_hand.mkdir()
    (by_hand / "state.eqx").write_bytes((tmp_path / "step_1" / "state.eqx").read_bytes())
    with CheckpointManager(tmp_path, max_to_keep=1) as manager:
        _save(manager, 4)
        assert manager.all_steps() == [4]
    assert (by_hand / "state.eqx").exists()


def test_a_step_that_retention_deleted_can_be_saved_again(storage: StorageBackend) -> None:
    with CheckpointManager(storage, max_to_keep=1, async_timeout_secs=None) as manager:
        for step in (1, 2, 1):
            manager.save(step, {"step": step})
        assert manager.all_steps() == [1, 2]  # the highest, and the one saved last
        assert manager.restore(1, {"step": 0}) == {"step": 1}
