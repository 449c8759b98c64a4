"""What the wrappers make of observations, and that they leave everything else alone."""

from types import SimpleNamespace
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.wrappers.compat import LegacyStepAPIWrapper

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.errors import InvalidValueError
from vibe_store.runner import RunnerConfig, train_dqn
from vibe_store.runner.dqn import dqn_program
from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.presets import get_preset
from vibe_store.runner.wrappers import BinaryObservation, FlattenObservation, OneHotObservation

CONFIG = DQNConfig(hidden_sizes=(4,), buffer_size=32, batch_size=4, learning_starts=4, train_interval=2)
RUNNER = RunnerConfig(total_timesteps=24, num_envs=2, eval_interval=None, log_interval=24)
KEY = jax.random.key(0)


class Tree:
    """An environment whose observations are a dict that holds a tuple; the state counts steps."""

    name = "Tree"

    def observe(self, count: Any) -> Any:
        return {"b": (count > 0, jnp.stack([count, count + 1]).astype(jnp.int16)), "a": jnp.full((2, 2), 0.5)}

    def reset(self, key: Any, params: Any) -> Any:
        del key, params
        return self.observe(jnp.int32(0)), jnp.int32(0)

    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        del key, action, params
        info = {"final_observation": self.observe(state + 7), "more": state}
        return self.observe(state + 1), state + 1, jnp.float32(1), state > 5, jnp.bool_(False), info

    def action_space(self, params: Any) -> Any:
        del params
        return SimpleNamespace(n=3, shape=(), dtype=jnp.int32)


def test_a_tree_of_observations_becomes_one_vector_in_the_order_of_its_leaves() -> None:
    env = FlattenObservation(Tree())
    obs, state = env.reset(KEY, None)
    np.testing.assert_array_equal(obs, np.float32([0.5, 0.5, 0.5, 0.5, 0, 0, 1]))
    assert obs.dtype == jnp.float32
    obs, state, reward, terminated, truncated, info = env.step(KEY, state, 0, None)
    np.testing.assert_array_equal(obs[4:], [1, 1, 2])
    np.testing.assert_array_equal(info["final_observation"][4:], [1, 7, 8])
    assert (int(state), float(reward), bool(terminated), bool(truncated)) == (1, 1, False, False)
    assert int(info["more"]) == 0
    assert (env.name, env.action_space(None).n) == ("Tree", 3)
    assert env.observation_space(None).shape == (7,)


def test_a_flattened_environment_trains() -> None:
    result = train_dqn(FlattenObservation(Tree()), None, dqn_config=CONFIG, runner_config=RUNNER)
    assert result.runner.replay.storage.obs.shape == (16, 2, 7)


def test_an_array_of_many_dimensions_is_flattened_row_by_row() -> None:
    env, params = gymnax.make("Catch-bsuite")
    wrapped = FlattenObservation(env)
    plain, _ = env.reset(KEY, params)
    obs, state = wrapped.reset(KEY, params)
    np.testing.assert_array_equal(obs, np.asarray(plain).reshape(-1))
    assert VectorEnv(wrapped, params).obs_shape == (50,)
    assert wrapped.step(KEY, state, 1, params)[-1]["final_observation"].shape == (50,)


def test_the_old_interface_passes_through_a_wrapper(cartpole: tuple[Any, Any]) -> None:
    env, params = cartpole
    wrapped = FlattenObservation(LegacyStepAPIWrapper(env))
    _, state = wrapped.reset(KEY, params)
    assert len(wrapped.step(KEY, state, 1, params)) == 5


@pytest.mark.parametrize(
    ("observation", "leaf"),
    [
        ({"key": jax.random.key(3)}, r"its leaf \['key'\] is key<fry>"),
        (jnp.complex64(1j), "its leaf itself is complex64"),
        ({}, "it has no leaves"),
    ],
)
def test_what_is_no_number_is_not_flattened(observation: Any, leaf: str) -> None:
    env = Tree()
    env.observe = lambda _: observation
    with pytest.raises(InvalidValueError, match=f"observation of Tree cannot be flattened: {leaf}"):
        FlattenObservation(env).reset(KEY, None)


def test_an_integer_becomes_bools_that_are_true_at_its_place_alone() -> None:
    env, params = gymnax.make("FrozenLake-misc", is_slippery=False)
    wrapped = OneHotObservation(env, params)
    obs, state = wrapped.reset(KEY, params)
    np.testing.assert_array_equal(obs, np.arange(16) == 0)
    assert obs.dtype == jnp.bool_
    obs, *_, info = wrapped.step(KEY, state, 1, params)
    np.testing.assert_array_equal(obs, np.arange(16) == 4)
    np.testing.assert_array_equal(info["final_observation"], np.arange(16) == 4)
    assert wrapped.observation_space(params).shape == (16,)


def test_a_network_learns_from_one_input_for_each_of_the_integers() -> None:
    env, params = gymnax.make("FrozenLake-misc")
    result = train_dqn(OneHotObservation(env, params), params, dqn_config=CONFIG, runner_config=RUNNER)
    assert result.state.params.layers[0].weight.shape == (4, 16)
    assert result.runner.replay.storage.obs.dtype == jnp.bool_


def test_observations_that_are_not_discrete_are_not_one_hot_encoded(cartpole: tuple[Any, Any]) -> None:
    with pytest.raises(InvalidValueError, match=r"CartPole-v1 cannot be one-hot encoded: .* is Box"):
        OneHotObservation(*cartpole)


@pytest.mark.parametrize("game", ["asterix", "breakout", "freeway", "spaceinvaders"])
def test_a_pixel_of_the_minatar_presets_takes_one_byte_in_the_replay_buffer(game: str) -> None:
    preset = get_preset(f"{game}_minatar_dqn")
    env, params = preset.make_env()
    assert isinstance(env, BinaryObservation)
    program = dqn_program(env, params, dqn_config=preset.config, runner_config=preset.runner)
    carry = jax.eval_shape(program.init, KEY)
    assert carry.runner.replay.storage.next_obs.dtype == jnp.bool_
    assert carry.state.params.convolution.weight.shape == (16, 9 * carry.runner.obs.shape[-1])


def test_zeros_and_ones_become_bools_of_the_same_value() -> None:
    env, params = gymnax.make("Breakout-MinAtar")
    wrapped = BinaryObservation(env)
    obs, state = wrapped.reset(KEY, params)
    plain, _ = env.reset(KEY, params)
    assert (obs.dtype, plain.dtype) == (jnp.bool_, jnp.float32)
    assert wrapped.observation_space(params).shape == obs.shape == (10, 10, 4)
    np.testing.assert_array_equal(obs, plain)
    obs, *_, info = wrapped.step(KEY, state, 1, params)
    plain, *_ = env.step(KEY, state, 1, params)
    np.testing.assert_array_equal(obs, plain)
    np.testing.assert_array_equal(info["final_observation"], plain)
