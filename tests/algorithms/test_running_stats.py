"""The running mean and variance against those of all that was seen."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.algorithms.running_stats import RunningStats


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    far=st.sampled_from([0.0, 1e3]),
)
def test_batches_add_up_to_the_mean_and_variance_of_all(seed: int, sizes: list[int], far: float) -> None:
    rng = np.random.default_rng(seed)
    batches = [far + rng.normal(size=(size, 2, 3)) for size in sizes]
    stats = RunningStats.create((3,))
    for batch in batches:
        stats = stats.update(jnp.asarray(batch, jnp.float32))
    everything = np.concatenate(batches).reshape(-1, 3)
    assert int(stats.seen) == len(everything)
    np.testing.assert_allclose(stats.mean, everything.mean(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.variance, everything.var(axis=0), rtol=1e-2, atol=1e-3)


def test_values_are_given_in_standard_deviations_from_the_mean() -> None:
    stats = RunningStats.create(()).update(jnp.asarray([1.0, 5.0]))
    np.testing.assert_allclose(stats.normalize(jnp.asarray([3.0, 5.0, -1.0])), [0, 1, -2], rtol=1e-5)


def test_values_far_out_are_clipped_and_what_never_varied_is_not_divided_by_zero() -> None:
    stats = RunningStats.create(()).update(jnp.asarray([2.0, 2.0]))
    np.testing.assert_allclose(stats.normalize(jnp.asarray([2.0, 3.0, -1e9])), [0, 10, -10])


def test_before_the_first_value_nothing_is_scaled() -> None:
    stats = RunningStats.create((2,))
    np.testing.assert_allclose(stats.normalize(jnp.asarray([[1, -2]])), [[1, -2]], rtol=1e-6)


def test_bytes_are_taken_as_numbers() -> None:
    stats = RunningStats.create(()).update(jnp.asarray([0, 255], jnp.uint8))
    np.testing.assert_allclose(stats.mean, 127.5)
