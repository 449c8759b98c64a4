"""DQN against a few lines of NumPy."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.algorithms.dqn import DQN, DQNConfig, DQNState
from vibe_store.algorithms.networks import MLP
from vibe_store.algorithms.replay import Transition
from vibe_store.errors import InvalidValueError

CONFIG = DQNConfig(hidden_sizes=(5,), gamma=0.9, batch_size=6, target_update_interval=2)


@pytest.fixture
def state() -> DQNState:
    """A state whose target network differs from the online one."""
    fresh = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=CONFIG)
    return fresh._replace(target_params=jax.tree.map(jnp.negative, fresh.params))


@pytest.fixture
def batch() -> Transition:
    rng = np.random.default_rng(0)
    return Transition(
        obs=jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        action=jnp.asarray([0, 1, 1, 0, 1, 0], jnp.int32),
        reward=jnp.asarray(5 * rng.normal(size=6), jnp.float32),
        next_obs=jnp.asarray(4 * rng.normal(size=(6, 3)), jnp.float32),
        terminated=jnp.asarray([False, True, False, True, False, False]),
    )


def q_values(params: MLP, obs: Any) -> np.ndarray:
    first, last = params.layers
    hidden = np.maximum(np.asarray(obs) @ np.asarray(first.weight).T + np.asarray(first.bias), 0)
    return hidden @ np.asarray(last.weight).T + np.asarray(last.bias)


def expected_targets(state: DQNState, batch: Transition, *, double: bool) -> np.ndarray:
    of_target = q_values(state.target_params, batch.next_obs)
    chooser = q_values(state.params, batch.next_obs) if double else of_target
    value = of_target[np.arange(6), chooser.argmax(axis=1)]
    return np.asarray(batch.reward) + 0.9 * (1 - np.asarray(batch.terminated, float)) * value


@pytest.mark.parametrize("double", [True, False])
def test_targets_bootstrap_except_where_the_episode_terminated(
    state: DQNState, batch: Transition, double: bool
) -> None:
    targets = DQN.targets(state, batch, config=replace(CONFIG, double=double))
    np.testing.assert_allclose(targets, expected_targets(state, batch, double=double), rtol=1e-5)


def test_the_two_kinds_of_targets_differ_here(state: DQNState, batch: Transition) -> None:
    assert not np.allclose(
        expected_targets(state, batch, double=True), expected_targets(state, batch, double=False)
    )


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_the_loss_is_the_mean_over_the_actions_taken(state: DQNState, batch: Transition, loss: Any) -> None:
    _, metrics = DQN.update(state, batch, config=replace(CONFIG, loss=loss))

    taken = q_values(state.params, batch.obs)[np.arange(6), np.asarray(batch.action)]
    error = np.abs(taken - expected_targets(state, batch, double=True))
    each = error**2 / 2 if loss == "mse" else np.where(error <= 1, error**2 / 2, error - 0.5)
    assert (error > 1).any()
    np.testing.assert_allclose(metrics["loss"], each.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q_mean"], taken.mean(), rtol=1e-5)


def test_the_first_update_is_a_step_of_adam_down_the_gradient(state: DQNState, batch: Transition) -> None:
    updated, _ = DQN.update(state, batch, config=CONFIG)

    # Adam's first step is the learning rate times the sign of the gradient; here by finite differences.
    targets = expected_targets(state, batch, double=True)

    def loss(bias: np.ndarray) -> float:
        layers = (state.params.layers[0], eqx.tree_at(lambda layer: layer.bias, state.params.layers[1], bias))
        params = eqx.tree_at(lambda network: network.layers, state.params, layers)
        taken = q_values(params, batch.obs)[np.arange(6), np.asarray(batch.action)]
        return float(((taken - targets) ** 2).mean() / 2)

    bias = np.asarray(state.params.layers[1].bias, np.float64)
    for i in range(2):
        nudge = 1e-3 * np.eye(2)[i]
        slope = (loss(bias + nudge) - loss(bias - nudge)) / 2e-3
        moved = float(updated.params.layers[1].bias[i]) - bias[i]
        np.testing.assert_allclose(moved, -CONFIG.learning_rate * np.sign(slope), rtol=1e-3)


def test_clipping_limits_the_gradient_before_adam(state: DQNState, batch: Transition) -> None:
    del state
    clipping = replace(CONFIG, max_grad_norm=1e-3)
    state = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=clipping)
    updated, _ = DQN.update(state, batch, config=clipping)
    first_moments = jax.tree.leaves(eqx.filter(updated.opt_state[1][0].mu, eqx.is_array))
    norm = np.sqrt(sum(float(jnp.sum(m**2)) for m in first_moments))
    np.testing.assert_allclose(norm, 0.1 * 1e-3, rtol=1e-3)


def test_a_hard_target_is_copied_at_each_interval_and_left_alone_between(
    state: DQNState, batch: Transition
) -> None:
    once, _ = DQN.update(state, batch, config=CONFIG)
    assert eqx.tree_equal(once.target_params, state.target_params)
    twice, _ = DQN.update(once, batch, config=CONFIG)
    assert eqx.tree_equal(twice.target_params, twice.params)
    assert int(twice.updates) == 2


def test_a_soft_target_moves_by_tau(state: DQNState, batch: Transition) -> None:
    config = replace(CONFIG, tau=0.25, target_update_interval=1)
    updated, _ = DQN.update(state, batch, config=config)
    before = np.asarray(state.target_params.layers[0].weight)
    online = np.asarray(updated.params.layers[0].weight)
    np.testing.assert_allclose(
        updated.target_params.layers[0].weight, before + 0.25 * (online - before), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("step", "epsilon"), [(0, 1.0), (250, 0.775), (500, 0.55), (1_000, 0.1), (10_000_000, 0.1)]
)
def test_epsilon_falls_in_a_line_over_its_own_horizon(step: int, epsilon: float) -> None:
    config = DQNConfig(epsilon_start=1.0, epsilon_end=0.1, exploration_steps=1_000)
    assert float(DQN.epsilon(jnp.int32(step), config=config)) == pytest.approx(epsilon)


def test_a_horizon_of_no_steps_explores_at_the_final_share_at_once() -> None:
    config = DQNConfig(epsilon_end=0.1, exploration_steps=0)
    assert float(DQN.epsilon(jnp.int32(0), config=config)) == pytest.approx(0.1)


def test_greedy_actions_are_the_best_ones_and_leave_the_state_alone(
    state: DQNState, batch: Transition
) -> None:
    actions, same = DQN.act(state, batch.obs, config=CONFIG, explore=False)
    assert same is state
    assert actions.dtype == jnp.int32
    np.testing.assert_array_equal(actions, q_values(state.params, batch.obs).argmax(axis=1))
    one, _ = DQN.act(state, batch.obs[2], config=CONFIG, explore=False)
    assert one.shape == ()
    assert one == actions[2]


def test_exploring_takes_random_actions_at_the_share_of_the_schedule(state: DQNState) -> None:
    config = replace(CONFIG, epsilon_start=0.5, epsilon_end=0.5)
    obs = jnp.ones((4_000, 3))
    greedy, _ = DQN.act(state, obs, config=config, explore=False)
    actions, after = DQN.act(state, obs, config=config, explore=True)
    assert float(jnp.mean(actions != greedy)) == pytest.approx(0.25, abs=0.03)
    assert int(after.step) == 4_000
    again, _ = DQN.act(after, obs, config=config, explore=True)
    assert not jnp.array_equal(actions, again)


def test_one_draw_of_exploration_holds_for_as_many_steps_as_it_is_repeated(state: DQNState) -> None:
    config = replace(CONFIG, epsilon_start=0.5, epsilon_end=0.5, exploration_repeat=3)
    obs, taken = jnp.ones((200, 3)), []
    for _ in range(9):
        action, state = DQN.act(state, obs, config=config)
        taken.append(action.tolist())
    assert [taken[turn] == taken[turn + 1] for turn in range(8)] == 2 * [True, True, False] + [True, True]
    assert len({tuple(actions) for actions in taken}) == 3


def test_raw_and_typed_keys_give_the_same_state_with_strong_array_leaves() -> None:
    raw = DQN.init(jax.random.PRNGKey(3), obs_shape=(3,), n_actions=2, config=CONFIG)
    typed = DQN.init(jax.random.key(3), obs_shape=(3,), n_actions=2, config=CONFIG)
    assert eqx.tree_equal(raw, typed)
    leaves = jax.tree.leaves(typed)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert not any(leaf.weak_type for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def test_a_new_state_can_be_donated(state: DQNState) -> None:
    del state
    fresh = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=CONFIG)
    donated = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf, s), donate_argnums=0)(fresh)
    assert eqx.tree_equal(donated.params, donated.target_params)


def test_byte_observations_of_any_shape_are_flattened(batch: Transition) -> None:
    del batch
    state = DQN.init(jax.random.key(0), obs_shape=(4, 4, 2), n_actions=3, config=CONFIG)
    images = jnp.ones((7, 4, 4, 2), jnp.uint8)
    actions, _ = DQN.act(state, images, config=CONFIG, explore=False)
    assert actions.shape == (7,)


def test_networks_see_observations_scaled_by_all_that_were_acted_on(
    state: DQNState, batch: Transition
) -> None:
    config = replace(CONFIG, normalize_observations=True)
    knowing = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=config)
    assert knowing.obs_stats is not None
    seen = 100 + 7 * jax.random.normal(jax.random.key(1), (50, 3))
    _, knowing = DQN.act(knowing, seen, config=config)
    np.testing.assert_allclose(knowing.obs_stats.mean, seen.mean(axis=0), rtol=1e-5)
    knowing = knowing._replace(target_params=state.target_params)

    def scaled(obs: jax.Array) -> jax.Array:
        return jnp.clip((obs - seen.mean(axis=0)) / seen.std(axis=0), -10, 10)

    raw = batch._replace(obs=100 + batch.obs, next_obs=100 + batch.next_obs)
    by_hand = batch._replace(obs=scaled(raw.obs), next_obs=scaled(raw.next_obs))
    learned, metrics = DQN.update(knowing, raw, config=config)
    expected, expected_metrics = DQN.update(state, by_hand, config=CONFIG)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-4)
    for one, other in zip(jax.tree.leaves(learned.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    greedy, after = DQN.act(knowing, raw.obs, config=config, explore=False)
    assert after is knowing
    np.testing.assert_array_equal(greedy, DQN.act(state, scaled(raw.obs), config=CONFIG, explore=False)[0])


def test_an_observation_of_another_shape_is_refused(state: DQNState) -> None:
    with pytest.raises(InvalidValueError, match=r"takes observations of shape \(3,\).*shape \(4,\)"):
        DQN.act(state, jnp.ones(4), config=CONFIG, explore=False)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (5,)])
def test_observations_of_another_shape_are_refused_where_they_are_scaled(shape: tuple[int, ...]) -> None:
    config = replace(CONFIG, normalize_observations=True)
    scaled = DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=2, config=config)
    with pytest.raises(InvalidValueError, match=r"takes observations of shape \(3,\)"):
        DQN.act(scaled, jnp.ones(shape), config=config, explore=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_sizes", (64, 0)),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("gamma", 1.5),
        ("buffer_size", 0),
        ("batch_size", 1.5),
        ("learning_starts", -1),
        ("train_interval", 0),
        ("target_update_interval", True),
        ("tau", 0.0),
        ("epsilon_start", -0.1),
        ("epsilon_end", 2.0),
        ("exploration_steps", -1),
        ("exploration_repeat", 0),
        ("loss", "l1"),
        ("max_grad_norm", 0.0),
        ("priority_exponent", 1.5),
        ("importance_exponent", -0.1),
        ("importance_steps", 0),
        ("network", "rnn"),
    ],
)
def test_a_bad_hyperparameter_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}=.*it must be"):
        DQNConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("gamma", "0.9", "a number"),
        ("gamma", np.float32(0.9), "a number, a float of Python"),
        ("tau", None, "a number"),
        ("epsilon_end", [1], "a number"),
        ("max_grad_norm", True, "a number, a float of Python, or None"),
        ("double", "false", "True or False"),
        ("hidden_sizes", 64, "a tuple of whole numbers"),
    ],
)
def test_a_hyperparameter_of_another_kind_is_refused(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}=.*: it must be {wanted}"):
        DQNConfig(**{field: value})


def test_a_buffer_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="buffer_size=10 is smaller than batch_size=20"):
        DQNConfig(buffer_size=10, batch_size=20)


def test_no_actions_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="n_actions=0"):
        DQN.init(jax.random.key(0), obs_shape=(3,), n_actions=0, config=CONFIG)
