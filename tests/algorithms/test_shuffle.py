"""Random orders: every one of them a permutation, and each number as likely in each place."""

import jax
import numpy as np
import pytest

from vibe_store.algorithms.shuffle import shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 64, 1000, 2**16, 2**16 + 1])
def test_every_number_is_there_once(n: int) -> None:
    order = np.asarray(shuffled(jax.random.key(7), n))
    assert order.dtype == np.int32
    assert np.array_equal(np.sort(order), np.arange(n))
    assert n < 64 or not np.array_equal(order, np.arange(n))


def test_each_number_is_as_likely_in_each_place() -> None:
    n, draws = 6, 6_000
    orders = np.asarray(jax.vmap(lambda key: shuffled(key, n))(jax.random.split(jax.random.key(0), draws)))
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    expected = draws / n
    # Chi-squared of 25 degrees of freedom is below 60 in all but one of ten thousand tables.
    assert ((counts - expected) ** 2 / expected).sum() < 60
