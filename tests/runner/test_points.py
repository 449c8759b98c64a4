"""At which steps a run stops."""

from hypothesis import given
from hypothesis import strategies as st

from vibe_store.runner.points import due, first_multiple, next_point


def test_with_16_environments_5000_is_saved_at_5008() -> None:
    assert next_point(0, 5_000, 16) == 5_008
    assert next_point(5_008, 5_000, 16) == 10_000
    assert [step for step in range(0, 15_100, 16) if due(step, 5_000, 16)] == [5_008, 10_000, 15_008]


def test_without_an_interval_nothing_is_due() -> None:
    assert not any(due(step, None, 4) for step in range(0, 100, 4))


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 50))
def test_the_next_point_is_the_first_step_after_this_one_that_is_due(
    num_envs: int, interval: int, steps: int
) -> None:
    here = steps * num_envs
    ahead = next(
        step
        for step in range(here + num_envs, here + interval + 3 * num_envs, num_envs)
        if due(step, interval, num_envs)
    )
    assert next_point(here, interval, num_envs) == ahead
    multiples = {first_multiple(k * interval, num_envs) for k in range(1, here + 200)}
    assert due(here, interval, num_envs) == (here in multiples)
