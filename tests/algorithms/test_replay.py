"""The replay buffer against a Python list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.algorithms.replay import ReplayBuffer
from vibe_store.errors import InvalidValueError

EXAMPLE = {"obs": jax.ShapeDtypeStruct((2,), jnp.uint8), "reward": jax.ShapeDtypeStruct((), jnp.bfloat16)}


def rows(start: int, width: int) -> dict[str, jax.Array]:
    numbers = jnp.arange(start, start + width)
    return {
        "obs": jnp.stack([numbers, numbers + 1], axis=1).astype(jnp.uint8),
        "reward": numbers.astype(jnp.bfloat16),
    }


@settings(deadline=None, max_examples=25)
@given(width=st.sampled_from([1, 3]), capacity=st.sampled_from([3, 7]), writes=st.integers(0, 12))
def test_the_ring_holds_the_last_rows_as_a_list_would(width: int, capacity: int, writes: int) -> None:
    buffer = ReplayBuffer.create(EXAMPLE, capacity=capacity, width=width)
    n_rows = -(-capacity // width)
    model: list[list[int]] = []
    for i in range(writes):
        buffer = buffer.add(rows(i * width, width))
        model = [*model, list(range(i * width, (i + 1) * width))][-n_rows:]

    assert buffer.capacity == n_rows * width >= capacity
    assert int(buffer.size) == len(model) * width
    held = np.asarray(buffer.storage["obs"])[: len(model), :, 0].tolist()
    assert sorted(held) == sorted(model)
    assert int(buffer.row) == writes % n_rows
    assert buffer.storage["obs"].dtype == jnp.uint8
    assert buffer.storage["reward"].dtype == jnp.bfloat16


def test_a_sample_holds_whole_transitions_of_the_filled_part_only() -> None:
    buffer = ReplayBuffer.create(EXAMPLE, capacity=100, width=2)
    for i in range(1, 4):
        buffer = buffer.add(rows(10 * i, 2))

    batch = jax.jit(ReplayBuffer.sample, static_argnums=2)(buffer, jax.random.key(0), 200)

    first = np.asarray(batch["obs"])[:, 0].astype(int)
    assert set(first) == {10, 11, 20, 21, 30, 31}
    assert (np.asarray(batch["obs"])[:, 1] == first + 1).all()
    assert (np.asarray(batch["reward"], np.float32) == first).all()
    assert batch["obs"].dtype == jnp.uint8
    assert batch["reward"].dtype == jnp.bfloat16


def test_a_write_of_another_dtype_or_shape_is_refused_instead_of_cast() -> None:
    buffer = ReplayBuffer.create(EXAMPLE, capacity=4, width=2)
    with pytest.raises(InvalidValueError, match=r"takes rows of uint8\[2, 2\]; it was given float32"):
        buffer.add({"obs": jnp.zeros((2, 2), jnp.float32), "reward": jnp.zeros(2, jnp.bfloat16)})
    with pytest.raises(InvalidValueError, match=r"given uint8\[3, 2\]"):
        buffer.add(rows(0, 3))


def test_a_buffer_smaller_than_one_row_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="3 transitions cannot take 4 at a time"):
        ReplayBuffer.create(EXAMPLE, capacity=3, width=4)
