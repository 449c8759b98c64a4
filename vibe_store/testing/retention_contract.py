"""RetentionContract: every promise of RetentionPolicy, as tests that the author of a policy subclasses."""

from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.interfaces import CheckpointInfo, RetentionPolicy
from vibe_store.testing.promise import promised_by

__all__ = ["RetentionContract", "checkpoint_records"]

_START = datetime(2026, 1, 1, tzinfo=UTC)
_DAY_SECS = 86_400
_NUMBERS = (float("nan"), float("inf"), float("-inf"), 0.0, 1.0, 2.0)
_METRICS: list[dict[str, float] | None] = [
    None,
    {},
    *({name: number} for name in ("loss", "return") for number in _NUMBERS),
    {"loss": 0.5, "return": 3.0},
]


def _record(step: int, seconds: float, metrics: dict[str, float] | None, *, pinned: bool) -> CheckpointInfo:
    created = _START + timedelta(seconds=seconds)
    return CheckpointInfo(step, created, 1, "eqx", metrics=metrics, pinned=pinned)


@st.composite
def checkpoint_records(draw: st.DrawFn) -> tuple[CheckpointInfo, ...]:
    """Records of up to 12 checkpoints, sorted by step; the clock may have gone back between two of them.

    Up to two months lie between the earliest and the latest. Some have metrics, ``"loss"`` or others, which
    may be NaN or infinite; some are pinned.
    """
    metrics = st.sampled_from(_METRICS)
    seconds = st.integers(-50, 200) | st.floats(-50, 200) | st.integers(0, 60 * _DAY_SECS)
    steps = draw(st.sets(st.integers(0, 60) | st.integers(0, 10**9), max_size=12))
    return tuple(
        _record(step, draw(seconds), draw(metrics), pinned=draw(st.booleans())) for step in sorted(steps)
    )


class RetentionContract:
    """Every promise of :class:`~vibe_store.interfaces.RetentionPolicy`. Subclass it, override ``policy``::

    class TestMyPolicy(RetentionContract):
        @pytest.fixture
        def policy(self):
            return my_policy(hourly=24)
    """

    examples: ClassVar[int] = 40
    """How many generated sequences of checkpoints to try."""

    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        """The policy under test. Override this."""
        raise NotImplementedError(f"{type(self).__name__} has to override the fixture 'policy'.")

    @promised_by("RetentionPolicy")
    def test_of_no_checkpoints_none_is_deleted(self, policy: RetentionPolicy) -> None:
        """Shown nothing, a policy returns an empty frozenset."""
        assert policy(()) == frozenset()
        assert isinstance(policy(()), frozenset)

    @promised_by("RetentionPolicy")
    def test_only_steps_that_were_shown_are_deleted(self, policy: RetentionPolicy) -> None:
        """A policy returns a frozenset of steps, whole numbers, each of a checkpoint that it was shown."""

        def check(infos: tuple[CheckpointInfo, ...]) -> None:
            deleted = policy(infos)
            assert isinstance(deleted, frozenset)
            assert [step for step in deleted if type(step) is not int] == []
            assert deleted - {info.step for info in infos} == frozenset()

        self._of_any_records(check)

    @promised_by("RetentionPolicy")
    def test_a_policy_deletes_nothing_more_of_what_it_left(self, policy: RetentionPolicy) -> None:
        """Of the checkpoints that it has left, a policy deletes none."""

        def check(infos: tuple[CheckpointInfo, ...]) -> None:
            deleted = policy(infos)
            left = tuple(info for info in infos if info.step not in deleted)
            assert policy(left) == frozenset()

        self._of_any_records(check)

    @promised_by("RetentionPolicy")
    def test_a_policy_has_no_side_effects(self, policy: RetentionPolicy) -> None:
        """A policy changes nothing that it is shown, and remembers nothing: alike again, it says the same."""
        others = tuple(_record(step, step, {"loss": 1.0}, pinned=False) for step in range(70, 90))

        def check(infos: tuple[CheckpointInfo, ...]) -> None:
            shown = [*deepcopy(infos)]
            deleted = policy(shown)
            assert repr(shown) == repr([*infos])
            policy(others)
            policy(infos[: len(infos) // 2])
            assert policy(infos) == deleted

        self._of_any_records(check)

    def _of_any_records(self, check: Callable[[tuple[CheckpointInfo, ...]], None]) -> None:
        of_any = given(checkpoint_records())(check)
        settings(max_examples=self.examples, deadline=None, suppress_health_check=list(HealthCheck))(of_any)()
