"""Prioritised replay against a few lines of NumPy."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.algorithms.dqn import DQN, DQNConfig
from vibe_store.algorithms.prioritized import PrioritizedReplay
from vibe_store.algorithms.replay import ReplayBuffer, Transition

EXAMPLE = {"number": jax.ShapeDtypeStruct((), jnp.int32)}


def filled(capacity: int, width: int, writes: int) -> PrioritizedReplay:
    buffer = PrioritizedReplay.create(EXAMPLE, capacity=capacity, width=width)
    for i in range(writes):
        buffer = buffer.add({"number": jnp.arange(i * width, (i + 1) * width)})
    return buffer


def with_priorities(priorities: Any, width: int = 1) -> PrioritizedReplay:
    """A full buffer in which the transition ``i`` holds the number ``i``."""
    values = jnp.asarray(priorities, jnp.float32).reshape(-1, width)
    return filled(values.size, width, len(values))._replace(priorities=values)


sample = jax.jit(PrioritizedReplay.sample, static_argnames=("batch_size", "importance_exponent"))


# Whole numbers are added up without any rounding, so the places are those of NumPy exactly.
@settings(deadline=None, max_examples=60)
@given(
    priorities=st.sampled_from([1, 5, 8, 9, 40, 64, 300]).flatmap(
        lambda n: st.lists(st.integers(0, 50), min_size=n, max_size=n)
    ),
    seed=st.integers(0, 2**16),
)
def test_one_transition_is_drawn_from_each_equal_range_of_the_running_sum(
    priorities: list[int], seed: int
) -> None:
    priorities[seed % len(priorities)] = 7
    buffer = with_priorities(priorities)
    drawn = sample(buffer, jax.random.key(seed), batch_size=8, importance_exponent=0.5)

    running = np.cumsum(priorities)
    uniform = np.asarray(jax.random.uniform(jax.random.key(seed), (8,), jnp.float32))
    target = (np.arange(8, dtype=np.float32) + uniform) / np.float32(8) * np.float32(running[-1])
    expected = np.searchsorted(running, target, side="right")
    np.testing.assert_array_equal(drawn.places, np.minimum(expected, np.flatnonzero(priorities)[-1]))
    np.testing.assert_array_equal(drawn.transitions["number"], drawn.places)

    share = np.asarray(priorities)[np.asarray(drawn.places)] / running[-1]
    weights = (len(priorities) * share) ** -0.5
    np.testing.assert_allclose(drawn.weights, weights / weights.max(), rtol=1e-5)


def test_a_transition_is_drawn_as_often_as_its_priority_says() -> None:
    rng = np.random.default_rng(0)
    priorities = rng.gamma(0.5, size=1_000).astype(np.float32)
    buffer = with_priorities(priorities, width=4)
    counts = np.zeros(1_000)
    for seed in range(40):
        drawn = sample(buffer, jax.random.key(seed), batch_size=500, importance_exponent=0.0)
        counts += np.bincount(drawn.places, minlength=1_000)
        np.testing.assert_array_equal(drawn.weights, np.ones(500))
    expected = 20_000 * priorities / priorities.sum()
    # Stratified draws scatter no more than independent ones would.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())
    assert np.corrcoef(counts, expected)[0, 1] > 0.99


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]))
def test_nothing_without_a_priority_is_ever_drawn(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    priorities = np.where(rng.random(300) < 0.05, rng.random(300) * scale, 0).astype(np.float32)
    priorities[rng.integers(300)] = scale
    drawn = sample(with_priorities(priorities), jax.random.key(seed), batch_size=64, importance_exponent=0.4)
    assert (priorities[np.asarray(drawn.places)] > 0).all()


def test_a_target_that_rounding_moves_to_the_very_end_leads_to_the_last_that_has_a_priority() -> None:
    size = 2**20
    rounded = (
        seed
        for seed in range(1_000)
        if np.float32(size - 1) + jax.random.uniform(jax.random.key(seed), (size,))[-1] == size
    )
    priorities = np.where(np.arange(20) < 3, 1, 0)
    drawn = sample(
        with_priorities(priorities), jax.random.key(next(rounded)), batch_size=size, importance_exponent=0.4
    )
    assert int(drawn.places[-1]) == 2
    assert int(drawn.places.max()) == 2


@settings(deadline=None, max_examples=25)
@given(width=st.sampled_from([1, 3]), capacity=st.sampled_from([3, 7]), writes=st.integers(1, 12))
def test_the_ring_is_that_of_uniform_replay_and_holds_a_priority_where_it_holds_a_transition(
    width: int, capacity: int, writes: int
) -> None:
    buffer = filled(capacity, width, writes)
    plain = ReplayBuffer.create(EXAMPLE, capacity=capacity, width=width)
    for i in range(writes):
        plain = plain.add({"number": jnp.arange(i * width, (i + 1) * width)})
    np.testing.assert_array_equal(buffer.storage["number"], plain.storage["number"])
    assert (int(buffer.row), int(buffer.filled)) == (int(plain.row), int(plain.filled))
    assert (buffer.capacity, int(buffer.size)) == (plain.capacity, int(plain.size))
    held = np.arange(plain.capacity // width) < int(plain.filled)
    np.testing.assert_array_equal(buffer.priorities, np.repeat(held[:, None], width, axis=1))


def test_new_transitions_get_the_largest_priority_so_far() -> None:
    buffer = filled(4, 2, 2)
    index, errors = jnp.array([0, 3]), jnp.array([-4.0, 0.0])
    buffer = buffer.learned(index, errors, priority_exponent=0.5)
    np.testing.assert_allclose(buffer.priorities, [[2, 1], [1, 1e-3]], rtol=1e-3)
    buffer = buffer.learned(jnp.array([0, 1]), jnp.array([1.0, 1.0]), priority_exponent=0.5)
    assert float(buffer.largest) == pytest.approx(2)
    # The ring is full, so the oldest row goes.
    buffer = buffer.add({"number": jnp.array([9, 9])})
    np.testing.assert_allclose(buffer.priorities, [[2, 2], [1, 1e-3]], rtol=1e-3)


def test_an_exponent_of_zero_makes_all_alike() -> None:
    buffer = filled(4, 2, 2).learned(jnp.array([1, 2]), jnp.array([100.0, 0.1]), priority_exponent=0.0)
    np.testing.assert_array_equal(buffer.priorities, np.ones((2, 2)))


CONFIG = DQNConfig(hidden_sizes=(5,), gamma=0.9)


@pytest.fixture
def batch() -> Transition:
    rng = np.random.default_rng(0)
    return Transition(
        obs=jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        action=jnp.asarray([0, 1, 1, 0, 1, 0], jnp.int32),
        reward=jnp.asarray(5 * rng.normal(size=6), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        terminated=jnp.asarray([False, True, False, True, False, False]),
    )


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_loss_is_the_weighted_mean_and_the_errors_are_those_of_each_transition(
    batch: Transition, loss: Any
) -> None:
    config = replace(CONFIG, loss=loss)
    state = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=config)
    weights = jnp.asarray([1, 0.5, 0.25, 0, 1, 0.1], jnp.float32)
    _, metrics, errors = DQN.update_weighted(state, batch, weights, config=config)

    taken = np.asarray(state.params(batch.obs))[np.arange(6), np.asarray(batch.action)]
    expected = taken - np.asarray(DQN.targets(state, batch, config=config))
    np.testing.assert_allclose(errors, expected, rtol=1e-5)
    size = np.abs(expected)
    each = size**2 / 2 if loss == "mse" else np.where(size <= 1, size**2 / 2, size - 0.5)
    np.testing.assert_allclose(metrics["loss"], (np.asarray(weights) * each).mean(), rtol=1e-5)


def test_a_transition_of_weight_zero_is_not_learned_from(batch: Transition) -> None:
    state = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=CONFIG)
    weights = jnp.asarray([0, 1, 1, 1, 1, 1], jnp.float32)
    other = batch._replace(reward=batch.reward.at[0].set(100))
    learned, *_ = DQN.update_weighted(state, batch, weights, config=CONFIG)
    same, *_ = DQN.update_weighted(state, other, weights, config=CONFIG)
    different, *_ = DQN.update_weighted(state, other, jnp.ones(6), config=CONFIG)
    np.testing.assert_array_equal(learned.params.layers[0].weight, same.params.layers[0].weight)
    assert not np.array_equal(learned.params.layers[0].weight, different.params.layers[0].weight)


@pytest.mark.parametrize(
    ("steps", "step", "exponent"), [(None, 10**6, 0.4), (1_000, 0, 0.4), (1_000, 500, 0.7), (1_000, 10**6, 1)]
)
def test_the_exponent_of_the_weights_is_constant_or_rises_over_its_own_horizon(
    steps: int | None, step: int, exponent: float
) -> None:
    config = DQNConfig(importance_steps=steps)
    assert float(DQN.importance(jnp.int32(step), config=config)) == pytest.approx(exponent)
