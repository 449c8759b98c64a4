"""What each retention policy keeps, that policies compose, and what holds of all of them."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.checkpoint import CheckpointManager
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo, RetentionPolicy
from vibe_store.registry import get_retention
from vibe_store.retention import best, best_n, every_seconds, every_steps, keep_any, latest, steps_to_delete

_START = datetime(2026, 1, 1, tzinfo=UTC)
_NAN, _INF = float("nan"), float("inf")


def _info(
    step: int, *, loss: float | None = None, seconds: float = 0.0, pinned: bool = False
) -> CheckpointInfo:
    metrics = None if loss is None else {"loss": loss}
    return CheckpointInfo(step, _START + timedelta(seconds=seconds), 1, "eqx", metrics=metrics, pinned=pinned)


def _kept(policy: RetentionPolicy, infos: Sequence[CheckpointInfo]) -> list[int]:
    deleted = policy(infos)
    return [info.step for info in infos if info.step is not None and info.step not in deleted]


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics["loss"]


_records = st.lists(st.integers(0, 60), unique=True, max_size=14).flatmap(
    lambda steps: st.tuples(
        *(
            st.builds(
                _info,
                st.just(step),
                loss=st.none() | st.sampled_from([_NAN, _INF, -_INF, 0.0, 1.0, 2.0]),
                seconds=st.floats(-50, 200) | st.integers(0, 50),
                pinned=st.booleans(),
            )
            for step in steps
        )
    )
)
"""Records in the order in which they were saved, which need not be that of their steps or their clocks."""

_single = st.one_of(
    st.builds(latest, st.integers(1, 5)),
    st.builds(every_steps, st.integers(1, 9)),
    st.builds(every_seconds, st.integers(1, 60) | st.floats(1, 60)),
    st.builds(
        best_n,
        st.integers(1, 4),
        st.sampled_from(["loss", "return", _loss]),
        mode=st.sampled_from(["min", "max"]),
    ),
)
_policies = st.recursive(
    _single,
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: keep_any(*parts)),
    max_leaves=4,
)


def test_every_steps_keeps_the_multiples_zero_too() -> None:
    assert _kept(every_steps(10), [_info(step) for step in (0, 5, 9, 10, 19, 30)]) == [0, 10, 30]


def test_every_seconds_keeps_the_first_checkpoint_of_each_interval_of_the_clock() -> None:
    saved = {1: 0, 2: 3599, 3: 3600, 4: 3601, 5: 10_000, 6: 10_800, 7: 10_799.999999}
    infos = [_info(step, seconds=seconds) for step, seconds in saved.items()]
    assert _kept(every_seconds(3600), infos) == [1, 3, 5, 6]


def test_every_seconds_counts_alike_in_every_time_zone_and_before_1970() -> None:
    hour = timedelta(hours=1)
    times = [datetime(1969, 12, 31, 22, 30, tzinfo=UTC) + k * hour / 2 for k in range(6)]
    infos = [CheckpointInfo(step, time.astimezone(), 1, "eqx") for step, time in enumerate(times)]
    assert _kept(every_seconds(3600), infos) == [0, 1, 3, 5]


def test_every_seconds_keeps_what_it_kept_when_a_checkpoint_is_replaced_or_the_clock_was_wrong() -> None:
    infos = [_info(step, seconds=100 * step) for step in range(5)]
    replaced = [_info(0, seconds=450), *infos[1:]]
    ahead = [*infos, _info(5, seconds=10**9), _info(6, seconds=600)]
    assert _kept(every_seconds(100), replaced) == [1, 2, 3, 4]
    assert _kept(every_seconds(100), ahead) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("mode", "kept"), [("min", [4, 2]), ("max", [1, 5])])
@pytest.mark.parametrize("metric", ["loss", _loss])
def test_best_n_keeps_the_best_by_name_or_function_and_the_earlier_of_equals(
    metric: Any, mode: Any, kept: list[int]
) -> None:
    losses = {1: 9.0, 2: 2.0, 3: 2.0, 4: 1.0, 5: 3.0, 6: 3.0}
    infos = [_info(step, loss=loss) for step, loss in losses.items()]
    assert _kept(best_n(2, metric, mode=mode), infos) == sorted(kept)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_missing_or_nan_metric_is_never_among_the_best_and_infinity_ranks(mode: Any) -> None:
    infos = [_info(1), _info(2, loss=_NAN), _info(3, loss=_INF), _info(4, loss=-_INF), _info(5)]
    assert _kept(best_n(9, "loss", mode=mode), infos) == [3, 4]
    assert _kept(best_n(1, "loss", mode=mode), infos) == [{"max": 3, "min": 4}[mode]]
    assert _kept(best_n(9, "return", mode=mode), infos) == []


@settings(deadline=None)
@given(_records, st.integers(1, 4), st.sampled_from(["min", "max"]))
def test_the_best_by_the_same_metric_is_among_the_best_n(
    infos: Sequence[CheckpointInfo], n: int, mode: Any
) -> None:
    first = best(infos, _loss, mode)
    kept = _kept(best_n(n, "loss", mode=mode), infos)
    assert (first is None and not kept) or first in kept


def test_a_best_fn_that_ranks_otherwise_than_best_n_keeps_its_own_best_besides() -> None:
    infos = [_info(step, loss=float(step)) for step in range(1, 7)]
    deleted = steps_to_delete(infos, best_n(2, "loss", mode="max"), protected={best(infos, _loss, "min")})
    assert deleted == {2, 3, 4}


@settings(deadline=None, max_examples=40)
@given(_records, _policies)
def test_what_a_policy_deletes_does_not_depend_on_the_order(
    infos: Sequence[CheckpointInfo], policy: RetentionPolicy
) -> None:
    by_step = sorted(infos, key=lambda info: info.step or 0)
    assert policy(infos) == policy(infos[::-1]) == policy(by_step)


@settings(deadline=None)
@given(_records, _policies, st.data())
def test_pruning_after_each_save_leaves_what_pruning_once_at_the_end_leaves(
    infos: Sequence[CheckpointInfo], policy: RetentionPolicy, data: st.DataObject
) -> None:
    left: list[CheckpointInfo] = []
    for info in infos:
        left.append(info)
        if data.draw(st.booleans()):
            deleted = policy(left)
            left = [info for info in left if info.step not in deleted]
    assert _kept(policy, left) == _kept(policy, infos)


@settings(deadline=None)
@given(_records, _policies)
def test_protection_of_the_highest_the_pinned_and_the_best_leaves_pruning_after_each_save_the_same(
    infos: Sequence[CheckpointInfo], policy: RetentionPolicy
) -> None:
    def pruned(shown: list[CheckpointInfo]) -> list[CheckpointInfo]:
        deleted = steps_to_delete(shown, policy, protected={best(shown, _loss, "min")})
        return [info for info in shown if info.step not in deleted]

    left: list[CheckpointInfo] = []
    for info in infos:
        left = pruned([*left, info])
    assert left == pruned(list(infos))


@settings(deadline=None)
@given(_records, _policies, _policies, _policies)
def test_keep_any_keeps_the_union_and_neither_order_nesting_nor_repetition_matters(
    infos: Sequence[CheckpointInfo], a: RetentionPolicy, b: RetentionPolicy, c: RetentionPolicy
) -> None:
    union = {*_kept(a, infos), *_kept(b, infos), *_kept(c, infos)}
    assert set(_kept(keep_any(a, b, c), infos)) == union
    assert keep_any(c, a, b)(infos) == keep_any(keep_any(a, b), c, a, a)(infos) == keep_any(a, b, c)(infos)
    assert keep_any(a)(infos) == a(infos)


def _hostile(seed: int) -> RetentionPolicy:
    """A policy that gives up anything at random, and meddles with what it is shown."""
    random = Random(seed)

    def policy(checkpoints: Any, /) -> frozenset[int]:
        steps = [info.step for info in checkpoints]
        if hasattr(checkpoints, "clear"):
            checkpoints.clear()
        return frozenset(step for step in steps if random.random() < 0.8)

    return policy


@settings(deadline=None)
@given(_records, st.integers(), st.frozensets(st.integers(0, 60), max_size=4), st.booleans())
def test_what_is_protected_stays_whatever_a_hostile_policy_says(
    infos: Sequence[CheckpointInfo], seed: int, protected: frozenset[int], composed: bool
) -> None:
    policy = keep_any(_hostile(seed), _hostile(seed + 1)) if composed else _hostile(seed)
    shown = list(infos)
    steps = {info.step for info in infos if info.step is not None}
    deleted = steps_to_delete(shown, policy, protected=protected)
    assert deleted <= steps
    assert not deleted & (protected | {info.step for info in infos if info.pinned} | {max(steps, default=0)})
    assert shown == list(infos)


def test_a_part_of_a_composition_that_names_an_unknown_step_is_an_error_even_if_another_part_keeps_it() -> (
    None
):
    def names_seven(_: Sequence[CheckpointInfo], /) -> frozenset[int]:
        return frozenset({1, 7})

    with pytest.raises(
        InvalidValueError, match=r"names_seven .* delete the steps \[7\], .* shown \(\[1, 2\]\)"
    ):
        keep_any(names_seven, latest(5))([_info(1), _info(2)])


def test_a_policy_that_raises_is_named() -> None:
    def by_loss(checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        return frozenset({(checkpoints[0].metrics or {})["loss"]})

    with pytest.raises(InvalidValueError, match=r"by_loss .* raised KeyError: 'loss'\. Nothing was"):
        keep_any(by_loss, latest(5))([_info(1), _info(2)])


def test_a_policy_that_returns_no_steps_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match="returned None; it has to return the steps to delete"):
        steps_to_delete([_info(1)], lambda _: None, protected=())  # type: ignore[arg-type] # what is refused


def test_a_policy_is_shown_as_the_call_that_makes_it() -> None:
    policy = keep_any(
        latest(3),
        every_steps(10_000),
        every_seconds(0.5e4),
        best_n(2, "eval_return", mode="max"),
        best_n(1, _loss, mode="min"),
    )
    assert repr(policy) == (
        "keep_any(latest(3), every_steps(10000), every_seconds(5000.0), "
        "best_n(2, 'eval_return', mode='max'), best_n(1, _loss, mode='min'))"
    )


_COUNTS: tuple[Any, ...] = (0, -1, True, 1.0, "3", None, np.array(2.0))
_REFUSED: list[tuple[Callable[[Any], object], tuple[Any, ...], str]] = [
    (every_steps, _COUNTS, "interval is the number of steps"),
    (lambda n: best_n(n, "loss", mode="min"), _COUNTS, "n is the number of best"),
    (every_seconds, (0, 0.5, -1, True, "3", None, _NAN, _INF, 10**30), "interval is the number of seconds"),
    (lambda metric: best_n(1, metric, mode="min"), ("", None, 3), "metric is the name"),
    (lambda mode: best_n(1, "loss", mode=mode), ("MAX", "", None, []), 'mode is "min" or "max"'),
    (keep_any, (None, 3, "latest"), r"keep_any\(\) takes retention policies"),
    (lambda policy: CheckpointManager("nowhere", retention=policy), (3, []), "retention is the name of"),
]


@pytest.mark.parametrize(
    ("make", "value", "message"), [(make, value, text) for make, values, text in _REFUSED for value in values]
)
def test_a_value_that_cannot_be_used_is_refused_with_the_value_in_the_message(
    make: Callable[[Any], object], value: Any, message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message) as caught:
        make(value)
    assert repr(value) in str(caught.value)


def test_keeping_any_of_no_policies_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="with none, nothing would be kept"):
        keep_any()


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("latest", {"max_to_keep": 2}, "latest(2)"),
        ("every_steps", {"interval": 10}, "every_steps(10)"),
        ("every_seconds", {"interval": 60}, "every_seconds(60)"),
        ("best_n", {"n": 2, "metric": "loss", "mode": "min"}, "best_n(2, 'loss', mode='min')"),
    ],
)
def test_the_policies_are_found_by_name_and_take_their_options(
    name: str, options: dict[str, Any], text: str
) -> None:
    assert repr(get_retention(name, **options)) == text


def test_a_policy_by_name_without_the_options_that_it_needs_says_which() -> None:
    with pytest.raises(
        InvalidValueError, match=r"'best_n' .* with no options: .*'n'.* It takes n, metric, mode"
    ):
        get_retention("best_n")
