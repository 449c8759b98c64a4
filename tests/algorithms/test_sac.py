"""SAC against a few lines of NumPy."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.algorithms.networks import MLP
from vibe_store.algorithms.replay import Transition
from vibe_store.algorithms.sac import SAC, SACConfig, SACState
from vibe_store.errors import InvalidValueError

CONFIG = SACConfig(hidden_sizes=(5,), gamma=0.9, tau=0.25, batch_size=6, initial_temperature=0.3)


def a_state() -> SACState:
    """A state whose target critics differ from the online ones, for actions from -1 to 3."""
    fresh = SAC.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=CONFIG)
    fresh = fresh._replace(target_critics=jax.tree.map(jnp.negative, fresh.critics))
    return SAC.bounded(fresh, jnp.float32(-1), jnp.float32(3))


@pytest.fixture
def state() -> SACState:
    return a_state()


def a_batch(seed: int, terminated: Any = (False, True, False, True, False, False)) -> Transition:
    rng = np.random.default_rng(seed)
    n = len(terminated)
    return Transition(
        obs=jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
        action=jnp.asarray(rng.uniform(-1, 3, size=(n, 2)), jnp.float32),
        reward=jnp.asarray(5 * rng.normal(size=n), jnp.float32),
        next_obs=jnp.asarray(4 * rng.normal(size=(n, 3)), jnp.float32),
        terminated=jnp.asarray(terminated),
    )


@pytest.fixture
def batch() -> Transition:
    return a_batch(0)


def forward(network: MLP, x: Any) -> np.ndarray:
    first, last = network.layers
    hidden = np.maximum(np.asarray(x) @ np.asarray(first.weight).T + np.asarray(first.bias), 0)
    return hidden @ np.asarray(last.weight).T + np.asarray(last.bias)


def smaller_q(critics: Any, obs: Any, action: Any) -> np.ndarray:
    pairs = np.concatenate([obs, action], axis=1)
    return np.minimum(forward(critics.first, pairs), forward(critics.second, pairs))[:, 0]


def sample(actor: MLP, obs: Any, key: Any) -> tuple[np.ndarray, np.ndarray]:
    """Actions from -1 to 1 and the logarithms of their densities, by the change of variables."""
    mean, log_std = np.split(forward(actor, obs).astype(np.float64), 2, axis=1)
    noise = np.asarray(jax.random.normal(key, mean.shape, jnp.float32), np.float64)
    u = mean + np.exp(log_std) * noise
    normal = np.exp(-((u - mean) ** 2) / (2 * np.exp(2 * log_std))) / (np.exp(log_std) * np.sqrt(2 * np.pi))
    return np.tanh(u), np.log(normal / (1 - np.tanh(u) ** 2)).sum(axis=1)


def expected_targets(state: SACState, batch: Transition, key: Any) -> np.ndarray:
    action, log_density = sample(state.actor, batch.next_obs, key)
    value = smaller_q(state.target_critics, batch.next_obs, action)
    value = value - np.exp(float(state.log_temperature)) * log_density
    return np.asarray(batch.reward) + 0.9 * (1 - np.asarray(batch.terminated, float)) * value


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), terminated=st.lists(st.booleans(), min_size=4, max_size=4))
def test_targets_are_soft_values_except_where_the_episode_terminated(
    seed: int, terminated: list[bool]
) -> None:
    state, batch, key = a_state(), a_batch(seed, terminated), jax.random.key(seed)
    targets = SAC.targets(state, batch, key, config=CONFIG)
    np.testing.assert_allclose(targets, expected_targets(state, batch, key), rtol=1e-3, atol=1e-3)


def test_the_critics_loss_is_that_of_both_on_the_actions_taken(state: SACState, batch: Transition) -> None:
    _, metrics = SAC.update(state, batch, config=CONFIG)

    _, target_key, _ = jax.random.split(state.key, 3)
    targets = expected_targets(state, batch, target_key)
    taken = (np.asarray(batch.action) - 1) / 2  # from -1 to 3 back to -1 to 1
    pairs = np.concatenate([batch.obs, taken], axis=1)
    losses = [
        ((forward(q, pairs)[:, 0] - targets) ** 2).mean() / 2
        for q in (state.critics.first, state.critics.second)
    ]
    np.testing.assert_allclose(metrics["critic_loss"], sum(losses), rtol=1e-3)


def test_the_actor_is_judged_by_the_critics_that_were_just_updated(
    state: SACState, batch: Transition
) -> None:
    after, metrics = SAC.update(state, batch, config=CONFIG)

    _, _, actor_key = jax.random.split(state.key, 3)
    action, log_density = sample(state.actor, batch.obs, actor_key)
    value = smaller_q(after.critics, batch.obs, action)
    np.testing.assert_allclose(metrics["actor_loss"], (0.3 * log_density - value).mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["entropy"], -log_density.mean(), rtol=1e-3)


@pytest.mark.parametrize(("target", "direction"), [(-100.0, -1), (100.0, 1)])
def test_the_temperature_falls_where_there_is_more_entropy_than_wanted_and_rises_where_less(
    state: SACState, batch: Transition, target: float, direction: int
) -> None:
    config = replace(CONFIG, target_entropy=target)
    after, _ = SAC.update(state, batch, config=config)
    # Adam's first step is the learning rate times the sign of the gradient.
    moved = float(after.log_temperature - state.log_temperature)
    assert moved == pytest.approx(direction * config.temperature_learning_rate, rel=1e-3)


def test_a_fixed_temperature_stays(state: SACState, batch: Transition) -> None:
    after, _ = SAC.update(state, batch, config=replace(CONFIG, learn_temperature=False))
    assert float(jnp.exp(after.log_temperature)) == pytest.approx(0.3)


def test_the_target_critics_move_by_tau(state: SACState, batch: Transition) -> None:
    after, _ = SAC.update(state, batch, config=CONFIG)
    before = np.asarray(state.target_critics.first.layers[0].weight)
    online = np.asarray(after.critics.first.layers[0].weight)
    np.testing.assert_allclose(
        after.target_critics.first.layers[0].weight, before + 0.25 * (online - before), rtol=1e-5
    )
    assert int(after.updates) == 1


def test_greedy_actions_are_the_scaled_mean_and_leave_the_state_alone(
    state: SACState, batch: Transition
) -> None:
    action, same = SAC.act(state, batch.obs, config=CONFIG, explore=False)
    assert same is state
    mean = forward(state.actor, batch.obs)[:, :2]
    np.testing.assert_allclose(action, 1 + 2 * np.tanh(mean), rtol=1e-5)
    one, _ = SAC.act(state, batch.obs[2], config=CONFIG, explore=False)
    assert one.shape == (2,)
    np.testing.assert_allclose(one, action[2], rtol=1e-5)


def test_before_learning_starts_actions_are_uniform_within_their_bounds(state: SACState) -> None:
    action, after = SAC.act(state, jnp.ones((20_000, 3)), config=CONFIG)
    assert int(after.step) == 20_000
    assert float(jnp.min(action)) >= -1
    assert float(jnp.max(action)) <= 3
    shares, _ = np.histogram(np.asarray(action), bins=8, range=(-1, 3))
    np.testing.assert_allclose(shares / action.size, 1 / 8, atol=0.01)


def test_an_action_before_learning_starts_is_held_for_as_many_steps_as_it_is_repeated(
    state: SACState,
) -> None:
    config = replace(CONFIG, learning_starts=6 * 50, exploration_repeat=3)
    obs, taken = jnp.ones((50, 3)), []
    for _ in range(9):
        action, state = SAC.act(state, obs, config=config)
        taken.append(action.tolist())
    changes = [True, True, False, True, True, False, False, False]
    assert [taken[turn] == taken[turn + 1] for turn in range(8)] == changes


def test_the_first_update_draws_anew_where_an_action_is_still_held(
    state: SACState, batch: Transition
) -> None:
    config = replace(CONFIG, learning_starts=6, exploration_repeat=2)
    _, draw_key = jax.random.split(state.key)
    _, state = SAC.act(state, jnp.ones((6, 3)), config=config)
    targets = SAC.targets(state, batch, draw_key, config=config)
    taken = (batch.action - state.action_bias) / state.action_scale
    errors = state.critics(batch.obs, taken) - targets
    _, metrics = SAC.update(state, batch, config=config)
    assert float(metrics["critic_loss"]) != pytest.approx(float(jnp.sum(jnp.mean(errors**2 / 2, axis=-1))))


def test_after_it_actions_follow_the_policy(state: SACState) -> None:
    obs = jnp.ones((20_000, 3))
    state = state._replace(step=jnp.int32(CONFIG.learning_starts))
    action, after = SAC.act(state, obs, config=CONFIG)
    mean, log_std = np.split(forward(state.actor, obs[0]), 2)
    u = np.arctanh((np.asarray(action) - 1) / 2)
    np.testing.assert_allclose(np.mean(u, axis=0), mean, atol=0.05)
    np.testing.assert_allclose(np.std(u, axis=0), np.exp(log_std), rtol=0.05)
    again, _ = SAC.act(after, obs, config=CONFIG)
    assert not jnp.array_equal(action, again)


def test_networks_see_observations_scaled_by_all_that_were_acted_on(
    state: SACState, batch: Transition
) -> None:
    config = replace(CONFIG, normalize_observations=True)
    seen = 100 + 7 * jax.random.normal(jax.random.key(1), (50, 3))
    knowing = SAC.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=config)
    _, knowing = SAC.act(knowing, seen, config=config)
    assert knowing.obs_stats is not None
    np.testing.assert_allclose(knowing.obs_stats.mean, seen.mean(axis=0), rtol=1e-5)
    knowing = state._replace(obs_stats=knowing.obs_stats)

    def scaled(obs: jax.Array) -> jax.Array:
        return jnp.clip((obs - seen.mean(axis=0)) / seen.std(axis=0), -10, 10)

    raw = batch._replace(obs=100 + batch.obs, next_obs=100 + batch.next_obs)
    by_hand = batch._replace(obs=scaled(raw.obs), next_obs=scaled(raw.next_obs))
    _, metrics = SAC.update(knowing, raw, config=config)
    _, expected = SAC.update(state, by_hand, config=CONFIG)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3)
    greedy, after = SAC.act(knowing, raw.obs, config=config, explore=False)
    assert after is knowing
    expected_greedy, _ = SAC.act(state, scaled(raw.obs), config=CONFIG, explore=False)
    np.testing.assert_allclose(greedy, expected_greedy, atol=1e-5)


def test_densities_of_extreme_actions_are_finite(batch: Transition) -> None:
    fresh = SAC.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=CONFIG)
    far = fresh._replace(actor=jax.tree.map(lambda leaf: 1e3 * leaf, fresh.actor))
    after, metrics = SAC.update(far, batch, config=CONFIG)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(after.actor))


def test_raw_and_typed_keys_give_the_same_state_with_strong_array_leaves() -> None:
    raw = SAC.init(jax.random.PRNGKey(3), obs_shape=(3,), n_actions=1, config=CONFIG)
    typed = SAC.init(jax.random.key(3), obs_shape=(3,), n_actions=1, config=CONFIG)
    assert eqx.tree_equal(raw, typed)
    leaves = [leaf for leaf in jax.tree.leaves(typed) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert not any(leaf.weak_type for leaf in leaves)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_sizes", (0,)),
        ("actor_learning_rate", 0.0),
        ("critic_learning_rate", float("inf")),
        ("temperature_learning_rate", -1.0),
        ("initial_temperature", 0.0),
        ("target_entropy", float("nan")),
        ("gamma", 1.5),
        ("tau", 0.0),
        ("buffer_size", 0),
        ("batch_size", 1.5),
        ("learning_starts", -1),
        ("train_interval", 0),
        ("exploration_repeat", 0),
    ],
)
def test_a_bad_hyperparameter_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}=.*it must be"):
        SACConfig(**{field: value})


def test_a_buffer_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="buffer_size=10 is smaller than batch_size=20"):
        SACConfig(buffer_size=10, batch_size=20)
