"""Which environments can be trained on, and what is said of those that cannot."""

import warnings
from types import SimpleNamespace
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.wrappers.compat import LegacyStepAPIWrapper

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.algorithms.sac import SACConfig
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.runner import Environment, RunnerConfig, train_dqn, train_ppo
from vibe_store.runner.dqn import dqn_program
from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.loop import Program
from vibe_store.runner.ppo import ppo_program
from vibe_store.runner.sac import sac_program

DQN_CONFIG = DQNConfig(hidden_sizes=(4,), buffer_size=32, batch_size=4, learning_starts=4, train_interval=2)
PPO_CONFIG = PPOConfig(hidden_sizes=(4,), rollout_length=4, n_epochs=1)
SAC_CONFIG = SACConfig(hidden_sizes=(4,), buffer_size=32, batch_size=4, learning_starts=4)
RUNNER = RunnerConfig(total_timesteps=24, num_envs=2, eval_interval=None, log_interval=24)

# That one downloads MNIST when it is made.
IDS = [env_id for env_id in gymnax.registered_envs if env_id != "MNISTBandit-bsuite"]


def programs_of(env: Any, params: Any) -> list[Program]:
    ppo = ppo_program(env, params, ppo_config=PPO_CONFIG, runner_config=RUNNER)
    if hasattr(env.action_space(params), "n"):
        return [ppo, dqn_program(env, params, dqn_config=DQN_CONFIG, runner_config=RUNNER)]
    return [ppo, sac_program(env, params, sac_config=SAC_CONFIG, runner_config=RUNNER)]


def types_of(tree: Any) -> list[Any]:
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.weak_type)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("env_id", IDS)
def test_every_environment_of_gymnax_can_be_trained_on(env_id: str) -> None:
    env, params = gymnax.make(env_id)
    key = jax.random.key(0)
    for program in programs_of(env, params):
        carry = jax.eval_shape(program.init, key)
        assert not any(weak for *_, weak in types_of(carry))
        assert types_of(jax.eval_shape(program.step, carry)) == types_of(carry)
        returns, _ = jax.eval_shape(program.evaluate, carry.state, key, np.int32(0))
        assert returns.shape == (RUNNER.eval_episodes,)


class Walk:
    """A row of five places, with the methods that Environment asks for and nothing else of gymnax."""

    name = "Walk"

    def reset(self, key: Any, params: Any) -> Any:
        del key, params
        place = jnp.int32(2)
        return self.observe(place), {"place": place, "time": jnp.int32(0)}

    def observe(self, place: Any) -> Any:
        return (jnp.arange(5) == place).astype(jnp.float32)

    def step(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        place, time = state["place"] + 2 * action - 1, state["time"] + 1
        terminated, truncated = (place == 0) | (place == 4), time >= params["limit"]
        first, fresh = self.reset(key, params)
        after = {"place": place, "time": time}
        state = jax.tree.map(lambda new, old: jnp.where(terminated | truncated, new, old), fresh, after)
        last = self.observe(place)
        obs = jax.tree.map(lambda new, old: jnp.where(terminated | truncated, new, old), first, last)
        reward = (place == 4).astype(jnp.float32)
        return obs, state, reward, terminated, truncated, {"final_observation": last}

    def action_space(self, params: Any) -> Any:
        del params
        return SimpleNamespace(n=2, shape=(), dtype=jnp.int32)

    def observation_space(self, params: Any) -> Any:
        del params
        return SimpleNamespace(low=0, high=1, shape=(5,), dtype=jnp.float32)


PARAMS = {"limit": jnp.int32(6)}


def test_any_object_with_the_documented_methods_trains() -> None:
    env: Environment = Walk()
    result = train_dqn(env, PARAMS, dqn_config=DQN_CONFIG, runner_config=RUNNER)
    assert result.step == 24
    assert result.runner.replay.storage.obs.shape == (16, 2, 5)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.uint8, jnp.int32, jnp.bfloat16])
def test_an_observation_is_kept_in_its_own_dtype(dtype: Any) -> None:
    class Typed(Walk):
        def observe(self, place: Any) -> Any:
            return (jnp.arange(5) == place).astype(dtype)

    program = dqn_program(Typed(), PARAMS, dqn_config=DQN_CONFIG, runner_config=RUNNER)
    carry = jax.eval_shape(program.init, jax.random.key(0))
    assert carry.runner.replay.storage.obs.dtype == carry.runner.replay.storage.next_obs.dtype == dtype
    assert types_of(jax.eval_shape(program.step, carry)) == types_of(carry)


def test_a_scalar_observation_is_one_input_of_the_network() -> None:
    env, params = gymnax.make("FrozenLake-misc")
    result = train_ppo(env, params, ppo_config=PPO_CONFIG, runner_config=RUNNER)
    assert result.state.params.actor.layers[0].weight.shape == (4, 1)
    assert result.runner.obs.shape == (2,)
    assert result.runner.obs.dtype == jnp.int32


def test_an_environment_of_the_old_interface_trains_with_one_warning(cartpole: tuple[Any, Any]) -> None:
    env, params = cartpole
    short = params.replace(max_steps_in_episode=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train_dqn(LegacyStepAPIWrapper(env), short, dqn_config=DQN_CONFIG, runner_config=RUNNER)
    assert [w.category for w in caught] == [VibeStoreWarning]
    assert caught[0].filename == __file__
    assert "a time limit cannot be told from a natural end" in str(caught[0].message)
    assert "the last observation of an episode is not known" in str(caught[0].message)
    # Episodes of 3 steps each: their ends count as natural, and what is stored as what came after them is
    # never looked at.
    ended = np.arange(12) % 3 == 2
    np.testing.assert_array_equal(result.runner.replay.storage.terminated[:12], np.stack([ended] * 2, axis=1))
    np.testing.assert_array_equal(result.runner.episodes.finished, [4, 4])


def broken(**methods: Any) -> Any:
    return type("Broken", (Walk,), {"name": "Broken", **methods})()


def changed_step(change: Any) -> Any:
    return lambda self, *args: change(*Walk.step(self, *args))


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (
            {"observe": lambda _, place: {"place": place}},
            r"observation of Broken is a dict.*Wrap the environment in .*FlattenObservation",
        ),
        (
            {"observe": lambda _, place: (place, place)},
            r"observation of Broken is a tuple.*FlattenObservation",
        ),
        (
            {"observe": lambda _, place: place.astype(jnp.int16)},
            "observation of Broken is an array of int16, but only floating-point, bool, uint8 and int32",
        ),
        ({"step": changed_step(lambda *six: six[:4])}, r"Broken\.step returns 4 values; training needs the"),
        ({"step": changed_step(lambda *six: {"obs": six[0]})}, r"Broken\.step returns a dict; training"),
        (
            {"step": changed_step(lambda *six: (*six[:5], {}))},
            r'Broken\.step returns 6 values; .* an info that holds "final_observation"',
        ),
        (
            {"step": changed_step(lambda *six: (six[0].astype(jnp.int32), *six[1:]))},
            r"observation of its step differs from what Broken\.reset returns: int32\[5\], not float32\[5\]",
        ),
        (
            {"step": changed_step(lambda *six: (*six[:5], {"final_observation": six[0][:4]}))},
            r"final_observation of its step differs from what Broken\.reset returns: float32\[4\]",
        ),
        (
            {"step": changed_step(lambda *six: (six[0], {**six[1], "time": 1.0 * six[1]["time"]}, *six[2:]))},
            r"state of its step differs from what Broken\.reset returns at \['time'\]: float32\[\], not",
        ),
        (
            {"step": changed_step(lambda *six: (six[0], {"place": six[1]["place"]}, *six[2:]))},
            r"state of its step is another tree than what Broken\.reset returns",
        ),
        (
            {"step": changed_step(lambda *six: (*six[:2], six[2][None], *six[3:]))},
            r"reward that Broken\.step returns is an array of shape \(1,\), but it must be one number",
        ),
        (
            {"action_space": lambda *_: SimpleNamespace(spaces={})},
            "action space of Broken is SimpleNamespace, but actions must be one array",
        ),
    ],
)
def test_what_no_network_or_loop_could_take_is_refused_in_a_sentence(methods: Any, sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=f"(?s)The .*{sentence}|{sentence}"):
        VectorEnv(broken(**methods), PARAMS)


def test_a_network_for_images_refuses_other_observations_before_anything_is_compiled() -> None:
    for train, config in (
        (train_dqn, {"dqn_config": DQNConfig(network="cnn")}),
        (train_ppo, {"ppo_config": PPOConfig(network="cnn")}),
    ):
        with pytest.raises(InvalidValueError, match=r"network='cnn' cannot be used: .* shape \(5,\)"):
            train(Walk(), PARAMS, **config, runner_config=RUNNER)
