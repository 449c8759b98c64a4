"""PPO against a few lines of NumPy."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vibe_store.algorithms.networks import MLP
from vibe_store.algorithms.ppo import PPO, PPOConfig, PPOState, Rollout
from vibe_store.algorithms.running_stats import RunningStats
from vibe_store.errors import InvalidValueError

CONFIG = PPOConfig(hidden_sizes=(5,), gamma=0.9, gae_lambda=0.8, n_epochs=1, n_minibatches=1)
T, N = 5, 3


def a_state(*, continuous: bool = False) -> PPOState:
    fresh = PPO.init(jax.random.key(0), (3,), 2, config=CONFIG, continuous=continuous)
    # The last layer of the actor begins near zero; larger weights make its choices differ.
    last = fresh.params.actor.layers[-1]
    params = eqx.tree_at(lambda p: p.actor.layers[-1].weight, fresh.params, 100 * last.weight)
    return fresh._replace(params=params)


advantages = jax.jit(PPO.advantages, static_argnames="config")
update = jax.jit(PPO.update, static_argnames="config")


def a_rollout(seed: int, state: PPOState, *, ends: Any = None, terminated: Any = None) -> Rollout:
    """Steps whose recorded densities are those of another policy, so that ratios differ from 1."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(T + 1, N, 3)).astype(np.float32)
    if state.params.log_std is None:
        choice = jnp.asarray(rng.integers(0, 2, size=(T, N)), jnp.int32)
    else:
        choice = jnp.asarray(rng.normal(size=(T, N, 2)), jnp.float32)
    done = np.asarray(rng.random((T, N)) < 0.3 if ends is None else ends)
    natural = done & np.asarray(rng.random((T, N)) < 0.5 if terminated is None else terminated)
    # Where an episode ended, the observation after the step is not the one acted on next.
    next_obs = np.where(done[..., None], rng.normal(size=(T, N, 3)), obs[1:]).astype(np.float32)
    return Rollout(
        obs=jnp.asarray(obs[:-1]),
        choice=choice,
        log_density=jnp.asarray(np.log(rng.uniform(0.2, 0.8, size=(T, N))), jnp.float32),
        reward=jnp.asarray(rng.normal(size=(T, N)), jnp.float32),
        next_obs=jnp.asarray(next_obs),
        terminated=jnp.asarray(natural),
        done=jnp.asarray(done),
    )


def forward(network: MLP, x: Any) -> np.ndarray:
    first, last = network.layers
    hidden = np.tanh(np.asarray(x) @ np.asarray(first.weight).T + np.asarray(first.bias))
    return hidden @ np.asarray(last.weight).T + np.asarray(last.bias)


def expected_advantages(state: PPOState, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """The sum of discounted errors up to the end of each episode, term by term."""
    value = forward(state.params.critic, rollout.obs)[..., 0]
    after = forward(state.params.critic, rollout.next_obs)[..., 0]
    error = np.asarray(rollout.reward) + 0.9 * np.where(rollout.terminated, 0, after) - value
    advantage = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                advantage[t, n] += (0.9 * 0.8) ** (k - t) * error[k, n]
                if rollout.done[k, n]:
                    break
    return value, advantage


NOWHERE, EVERYWHERE = [[False] * N] * T, [[True] * N] * T
IN_THE_LAST_STEP = [*NOWHERE[1:], EVERYWHERE[0]]
flags = st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=T, max_size=T)


@settings(max_examples=25, deadline=None)
@example(seed=0, ends=EVERYWHERE, terminated=EVERYWHERE)
@example(seed=0, ends=IN_THE_LAST_STEP, terminated=NOWHERE)
@given(seed=st.integers(0, 2**16), ends=flags, terminated=flags)
def test_advantages_stop_at_each_end_and_bootstrap_at_a_time_limit(
    seed: int, ends: Any, terminated: Any
) -> None:
    state = a_state()
    rollout = a_rollout(seed, state, ends=ends, terminated=terminated)
    value, advantage = advantages(state, rollout, config=CONFIG)
    expected_value, expected = expected_advantages(state, rollout)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-4)


def densities(state: PPOState, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """The probability or density of each choice, and the entropy of the policy there."""
    output = forward(state.params.actor, rollout.obs).astype(np.float64)
    if state.params.log_std is None:
        shares = np.exp(output) / np.exp(output).sum(axis=-1, keepdims=True)
        chosen = np.take_along_axis(shares, np.asarray(rollout.choice)[..., None], axis=-1)[..., 0]
        return chosen, -(shares * np.log(shares)).sum(axis=-1)
    std = np.exp(np.asarray(state.params.log_std, np.float64))
    each = np.exp(-((np.asarray(rollout.choice) - output) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi))
    entropy = (0.5 * np.log(2 * np.pi * np.e * std**2)).sum()
    return each.prod(axis=-1), np.full((T, N), entropy)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), continuous=st.booleans(), scaled=st.booleans())
def test_the_losses_are_those_of_the_paper(seed: int, continuous: bool, scaled: bool) -> None:
    state = a_state(continuous=continuous)
    rollout = a_rollout(seed, state)
    config = replace(CONFIG, normalize_advantages=scaled)
    _, metrics = update(state, rollout, config=config)

    value, advantage = expected_advantages(state, rollout)
    target = value + advantage
    if scaled:
        advantage = (advantage - advantage.mean()) / advantage.std()
    density, entropy = densities(state, rollout)
    ratio = density / np.exp(np.asarray(rollout.log_density, np.float64))
    gain = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    np.testing.assert_allclose(metrics["policy_loss"], -gain.mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["value_loss"], ((value - target) ** 2).mean() / 2, rtol=1e-3)
    np.testing.assert_allclose(metrics["entropy"], entropy.mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["clipped"], (np.abs(ratio - 1) > 0.2).mean(), rtol=1e-3)


def test_a_clipped_value_counts_by_the_larger_error() -> None:
    state = a_state()
    rollout = a_rollout(1, state)
    # In the second epoch the values have moved away from those of the rollout.
    config = replace(CONFIG, n_epochs=20, learning_rate=0.05, clip_range=0.01)
    _, free = update(state, rollout, config=config)
    _, clipped = update(state, rollout, config=replace(config, clip_values=True))
    assert float(clipped["value_loss"]) > float(free["value_loss"])


def test_each_step_of_a_rollout_is_learnt_from_once_in_an_epoch() -> None:
    """With plain means, the losses of equal parts average to the loss of the whole, whatever the order."""
    state = a_state()
    rollout = a_rollout(2, state)
    still = replace(CONFIG, learning_rate=1e-12, normalize_advantages=False)
    _, whole = update(state, rollout, config=still)
    _, parts = update(state, rollout, config=replace(still, n_epochs=2, n_minibatches=5))
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-4, atol=1e-6)


def test_scaled_observations_are_what_the_networks_see_and_are_known_from_earlier_rounds_only() -> None:
    config = replace(CONFIG, normalize_observations=True)
    plain = a_state()
    stats = RunningStats.create((3,)).update(jnp.asarray([[0.0, 0, 0], [2, 4, 8]]))
    state = plain._replace(obs_stats=stats)
    rollout = a_rollout(3, plain)
    scaled = rollout._replace(obs=stats.normalize(rollout.obs), next_obs=stats.normalize(rollout.next_obs))

    after, metrics = PPO.update(state, rollout, config=config)
    expected_after, expected = PPO.update(plain, scaled, config=CONFIG)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-4
    )
    np.testing.assert_allclose(after.params.actor.layers[0].bias, expected_after.params.actor.layers[0].bias)
    assert after.obs_stats is not None
    assert int(after.obs_stats.seen) == 2 + T * N
    obs = rollout.obs[0]
    for explore in (True, False):
        action, _ = PPO.act(state, obs, config=config, explore=explore)
        same, _ = PPO.act(plain, stats.normalize(obs), config=CONFIG, explore=explore)
        np.testing.assert_array_equal(action, same)


def test_updates_count_the_gradient_steps_and_the_key_moves_on() -> None:
    state = a_state()
    after, _ = PPO.update(state, a_rollout(0, state), config=replace(CONFIG, n_epochs=2, n_minibatches=5))
    assert int(after.updates) == 10
    assert not eqx.tree_equal(after.key, state.key)


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (250, 0.75), (1_000, 0.0), (2_000, 0.0)])
def test_the_step_size_falls_in_a_line_from_the_start_of_the_first_round(step: int, share: float) -> None:
    config = replace(CONFIG, anneal_steps=1_000, learning_rate=0.1)
    state = a_state()
    rollout = a_rollout(0, state)
    state = state._replace(step=jnp.int32(step + rollout.reward.size))
    after, _ = PPO.update(state, rollout, config=config)
    moved = jnp.abs(after.params.critic.layers[-1].bias - state.params.critic.layers[-1].bias)
    # Adam's first step is the step size times the sign of the gradient.
    np.testing.assert_allclose(moved, 0.1 * share, rtol=1e-2, atol=1e-7)


def test_clipping_limits_the_gradient_before_adam() -> None:
    state = a_state()
    clipping = replace(CONFIG, max_grad_norm=1e-3)
    after, _ = PPO.update(state, a_rollout(0, state), config=clipping)
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim == 1]
    norms = sorted(float(jnp.linalg.norm(leaf)) for leaf in moments)
    np.testing.assert_allclose(norms[-1], 0.1 * 1e-3, rtol=1e-3)


def test_choices_are_drawn_by_their_probabilities() -> None:
    state = a_state()
    obs = jnp.ones((20_000, 3))
    action, after = PPO.act(state, obs, config=CONFIG)
    logits = forward(state.params.actor, obs[0])
    share = np.exp(logits[1]) / np.exp(logits).sum()
    assert action.dtype == jnp.int32
    assert float(jnp.mean(action)) == pytest.approx(share, abs=0.02)
    assert int(after.step) == 20_000


def test_continuous_actions_are_clipped_and_scaled_to_their_bounds() -> None:
    state = PPO.bounded(a_state(continuous=True), jnp.float32([-1, 0]), jnp.float32([3, 1]))
    obs = jnp.ones((5_000, 3))
    action, _ = PPO.act(state, obs, config=CONFIG)
    np.testing.assert_allclose(jnp.min(action, axis=0), [-1, 0])
    np.testing.assert_allclose(jnp.max(action, axis=0), [3, 1])
    greedy, same = PPO.act(state, obs[0], config=CONFIG, explore=False)
    mean = np.clip(forward(state.params.actor, obs[0]), -1, 1)
    np.testing.assert_allclose(greedy, [1, 0.5] + [2, 0.5] * mean, rtol=1e-4)
    assert same is state


def test_the_density_that_a_rollout_keeps_is_that_of_the_choice() -> None:
    for continuous in (False, True):
        state = a_state(continuous=continuous)
        rollout = a_rollout(0, state)
        choice, log_density, _ = PPO.draw(state, rollout.obs, config=CONFIG)
        expected, _ = densities(state, rollout._replace(choice=choice))
        np.testing.assert_allclose(log_density, np.log(expected), rtol=1e-4, atol=1e-5)


def test_greedy_discrete_actions_are_the_likeliest() -> None:
    state = a_state()
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)), jnp.float32)
    action, _ = PPO.act(state, obs, config=CONFIG, explore=False)
    np.testing.assert_array_equal(action, forward(state.params.actor, obs).argmax(axis=1))


def test_a_new_policy_is_undecided_and_its_weights_are_orthogonal() -> None:
    state = PPO.init(jax.random.key(1), (8,), 4, config=PPOConfig())
    logits = forward_deep(state.params.actor, np.ones(8))
    assert np.ptp(logits) < 0.1
    weight = np.asarray(state.params.actor.layers[1].weight)
    np.testing.assert_allclose(weight @ weight.T, 2 * np.eye(64), atol=1e-4)


def forward_deep(network: MLP, x: np.ndarray) -> np.ndarray:
    return np.asarray(network(jnp.asarray(x, jnp.float32)))


@pytest.mark.parametrize("continuous", [False, True])
def test_raw_and_typed_keys_give_the_same_state_with_strong_array_leaves(continuous: bool) -> None:
    raw, typed = (
        PPO.init(key, (3,), 2, config=CONFIG, continuous=continuous)
        for key in (jax.random.PRNGKey(3), jax.random.key(3))
    )
    assert eqx.tree_equal(raw, typed)
    leaves = [leaf for leaf in jax.tree.leaves(typed) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    assert not any(leaf.weak_type for leaf in leaves)


def test_discrete_actions_have_no_bounds() -> None:
    with pytest.raises(InvalidValueError, match="Discrete actions have no bounds"):
        PPO.bounded(a_state(), jnp.float32(0), jnp.float32(1))


def test_parts_that_do_not_divide_a_rollout_are_refused() -> None:
    state = a_state()
    with pytest.raises(InvalidValueError, match=r"n_minibatches=4 cannot be used: it must divide the 15"):
        PPO.update(state, a_rollout(0, state), config=replace(CONFIG, n_minibatches=4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_sizes", (0,)),
        ("learning_rate", 0.0),
        ("anneal_steps", 0),
        ("gamma", -0.1),
        ("gae_lambda", 1.1),
        ("rollout_length", 0),
        ("n_epochs", 1.5),
        ("n_minibatches", True),
        ("clip_range", 0.0),
        ("entropy_coefficient", -1.0),
        ("value_coefficient", float("nan")),
        ("max_grad_norm", 0.0),
    ],
)
def test_a_bad_hyperparameter_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}=.*it must be"):
        PPOConfig(**{field: value})
