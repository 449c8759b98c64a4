"""What grandfather-father-son keeps."""

import itertools
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vibe_store_gfs.policy import GrandfatherFatherSon

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo

NONE = {"hourly": 0, "daily": 0, "weekly": 0, "monthly": 0, "yearly": 0}
NOON = datetime(2026, 3, 4, 12, tzinfo=UTC)  # a Wednesday

PERIODS = {
    "hourly": "%Y %m %d %H",
    "daily": "%Y %m %d",
    "weekly": "%G %V",
    "monthly": "%Y %m",
    "yearly": "%Y",
}
"""The period that a time lies in, as text that sorts like time."""


def saved(*times: datetime) -> tuple[CheckpointInfo, ...]:
    """Checkpoints that were committed at these times, as steps 0, 1 and so on."""
    return tuple(CheckpointInfo(step, time, 1, "eqx") for step, time in enumerate(times))


def kept(infos: tuple[CheckpointInfo, ...], **counts: int) -> list[int]:
    """The steps that stay with these counts, and 0 for the others."""
    deleted = GrandfatherFatherSon(**{**NONE, **counts})(infos)
    return [info.step for info in infos if info.step is not None and info.step not in deleted]


def after(**amounts: float) -> datetime:
    return NOON + timedelta(**amounts)


def test_the_newest_of_each_of_the_last_hours_stays() -> None:
    infos = saved(NOON, after(minutes=59), after(hours=1), after(hours=1.5), after(hours=2))
    assert kept(infos, hourly=2) == [3, 4]
    assert kept(infos, hourly=3) == [1, 3, 4]
    assert kept(infos, hourly=99) == [1, 3, 4]


def test_hours_without_a_checkpoint_do_not_count() -> None:
    infos = saved(NOON, after(days=7), after(days=100))
    assert kept(infos, hourly=2) == [1, 2]


def test_days_end_at_midnight_in_utc_whatever_the_zone_of_the_clock() -> None:
    east = timezone(timedelta(hours=9))
    infos = saved(datetime(2026, 3, 5, 8, 59, tzinfo=east), datetime(2026, 3, 5, 9, 1, tzinfo=east))
    assert kept(infos, daily=2) == [0, 1]
    assert kept(infos, daily=1) == [1]
    assert kept(saved(after(hours=11.9), after(hours=12.1)), daily=2) == [0, 1]
    assert kept(saved(after(hours=-12), after(hours=11.9)), daily=2) == [1]


def test_weeks_are_those_of_iso_8601_across_the_new_year() -> None:
    infos = saved(
        datetime(2026, 12, 27, 23, 59, tzinfo=UTC),  # Sunday
        datetime(2026, 12, 28, tzinfo=UTC),  # Monday of week 53
        datetime(2027, 1, 3, 23, tzinfo=UTC),  # Sunday of week 53
        datetime(2027, 1, 4, tzinfo=UTC),  # Monday of week 1
    )
    assert kept(infos, weekly=9) == [0, 2, 3]
    assert kept(infos, weekly=2) == [2, 3]
    assert kept(infos, monthly=9) == [1, 3]
    assert kept(infos, yearly=1) == [3]


def test_a_checkpoint_stays_that_any_of_the_options_keeps() -> None:
    infos = saved(*(after(hours=hours) for hours in range(0, 200, 5)))
    hours, days, weeks = (kept(infos, **{name: 3}) for name in ("hourly", "daily", "weekly"))
    assert kept(infos, hourly=3, daily=3, weekly=3) == sorted({*hours, *days, *weeks})


def test_the_newest_goes_by_the_clock_and_among_equals_by_the_step() -> None:
    infos = saved(after(minutes=5), after(minutes=1), NOON)
    assert kept(infos, hourly=1) == [0]
    assert kept(saved(NOON, NOON), hourly=1) == [1]


def test_a_checkpoint_without_a_step_is_left_alone() -> None:
    infos = (CheckpointInfo(None, after(minutes=5), 1, "eqx"), *saved(NOON))
    assert kept(infos, hourly=1) == [0]


@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None])
def test_a_count_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidValueError, match=rf"^weekly is a whole number, 0 or more; got {value!r}"):
        GrandfatherFatherSon(weekly=value)


def test_counts_that_keep_nothing_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"^With hourly=0, daily=0, .* nothing would be kept"):
        GrandfatherFatherSon(**NONE)


def test_its_repr_says_each_count() -> None:
    policy = GrandfatherFatherSon(hourly=3, yearly=1)
    assert repr(policy) == "GrandfatherFatherSon(hourly=3, daily=7, weekly=4, monthly=12, yearly=1)"


COUNTS = st.fixed_dictionaries({}, optional={name: st.integers(1, 3) for name in PERIODS}).filter(bool)
TIMES = st.lists(
    st.integers(0, 72).map(lambda hours: after(hours=hours / 2))
    | st.integers(0, 900).map(lambda days: after(days=days)),
    max_size=25,
)


@given(TIMES, COUNTS)
def test_it_keeps_what_the_words_say(times: list[datetime], counts: dict[str, int]) -> None:
    infos = saved(*times)
    wanted = set()
    for name, count in counts.items():
        by_period = itertools.groupby(
            sorted(infos, key=lambda info: (info.created, info.step)),
            key=lambda info: info.created.strftime(PERIODS[name]),
        )
        wanted.update([list(group)[-1].step for _, group in by_period][-count:])
    assert set(kept(infos, **counts)) == wanted


@given(TIMES, COUNTS, st.randoms(use_true_random=False))
def test_pruned_after_every_save_in_any_order_the_same_stay_as_pruned_once(
    times: list[datetime], counts: dict[str, int], random: Any
) -> None:
    infos = saved(*times)
    policy = GrandfatherFatherSon(**{**NONE, **counts})
    shuffled, left = list(infos), list[CheckpointInfo]()
    random.shuffle(shuffled)
    for info in shuffled:
        left = sorted([*left, info], key=lambda info: info.step or 0)
        deleted = policy(left)
        left = [info for info in left if info.step not in deleted]
    assert [info.step for info in left] == kept(infos, **counts)


@given(TIMES.filter(bool), COUNTS)
def test_the_newest_of_all_stays(times: list[datetime], counts: dict[str, int]) -> None:
    infos = saved(*times)
    newest = max(infos, key=lambda info: (info.created, info.step or 0))
    assert newest.step in kept(infos, **counts)
