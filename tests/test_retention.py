"""Which checkpoints go, as a pure decision."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo
from vibe_store.retention import best, keep_period_steps, latest, steps_to_delete


def _info(step: int, *, loss: float | None = None, pinned: bool = False) -> CheckpointInfo:
    metrics = None if loss is None else {"loss": loss}
    return CheckpointInfo(step, datetime(2026, 1, 1, tzinfo=UTC), 1, "eqx", metrics=metrics, pinned=pinned)


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


def _everything(checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
    return frozenset(info.step for info in checkpoints if info.step is not None)


_step_sets = st.sets(st.integers(0, 50), max_size=20)
_infos = _step_sets.flatmap(
    lambda steps: st.tuples(
        *(st.builds(_info, st.just(step), pinned=st.booleans()) for step in sorted(steps))
    )
)


@given(_step_sets, st.integers(1, 10))
def test_latest_keeps_the_highest_steps_and_deletes_every_other(steps: set[int], count: int) -> None:
    deleted = latest(count)([_info(step) for step in sorted(steps)])
    kept = steps - deleted
    assert len(kept) == min(count, len(steps))
    assert not deleted or not kept or max(deleted) < min(kept)


@given(_infos, st.frozensets(st.none() | st.integers(0, 50)))
def test_no_policy_can_delete_the_highest_a_pinned_or_a_protected_step(
    infos: tuple[CheckpointInfo, ...], protected: frozenset[int | None]
) -> None:
    deleted = steps_to_delete(infos, _everything, protected=protected)
    highest = {info.step for info in infos[-1:]}
    spared = {info.step for info in infos if info.pinned} | protected | highest
    assert deleted == {info.step for info in infos} - spared


def test_a_policy_that_names_a_step_which_is_not_there_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match=r"asks to delete the steps \[7\], .* shown \(\[1, 2\]\)"):
        steps_to_delete([_info(1), _info(2)], lambda _: frozenset({1, 7}), protected=())


def test_a_policy_sees_the_checkpoints_sorted_by_step() -> None:
    seen: list[int | None] = []

    def policy(checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        seen.extend(info.step for info in checkpoints)
        return frozenset()

    steps_to_delete([_info(3), _info(0), _info(2)], policy, protected=())
    assert seen == [0, 2, 3]


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "3", None])
def test_a_number_to_keep_below_one_is_refused(count: Any) -> None:
    with pytest.raises(InvalidValueError, match="max_to_keep is the number of recent checkpoints"):
        latest(count)


@pytest.mark.parametrize(("mode", "step"), [("min", 3), ("max", 2)])
def test_the_best_is_the_lowest_or_the_highest_and_the_earliest_of_equals(
    mode: Literal["min", "max"], step: int
) -> None:
    losses = {1: 5.0, 2: 9.0, 3: 1.0, 4: 1.0, 5: 9.0}
    assert best([_info(step, loss=loss) for step, loss in losses.items()], _loss, mode) == step


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_and_missing_metrics_are_never_best(mode: Literal["min", "max"]) -> None:
    unranked = [_info(1, loss=float("nan")), _info(2)]
    assert best(unranked, _loss, mode) is None
    assert best(unranked, lambda metrics: metrics["return"], mode) is None
    assert best([*unranked, _info(3, loss=7.0)], _loss, mode) == 3


def test_infinity_is_a_number_that_ranks() -> None:
    infos = [_info(1, loss=float("inf")), _info(2, loss=0.0)]
    assert best(infos, _loss, "max") == 1
    assert best(infos, _loss, "min") == 2


@given(_step_sets, st.none() | st.integers(1, 10))
def test_the_period_keeps_every_multiple_of_it_zero_too(steps: set[int], period: int | None) -> None:
    kept = keep_period_steps(steps, period)
    assert kept == {step for step in steps if period is not None and step % period == 0}
