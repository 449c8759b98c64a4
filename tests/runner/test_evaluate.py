"""Evaluation plays whole episodes, and only those."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.evaluate import evaluate


def test_each_episode_is_played_once_to_its_end(cartpole: tuple[Any, Any]) -> None:
    def always_right(obs: jax.Array) -> jax.Array:
        return jnp.ones(obs.shape[0], jnp.int32)

    env = VectorEnv(*cartpole)
    play = jax.jit(lambda key: evaluate(env, always_right, key, episodes=50))
    returns, lengths = play(jax.random.key(0))
    np.testing.assert_array_equal(returns, lengths)
    # Pushing one way topples the pole within 8 to 10 steps, wherever it starts.
    assert set(np.asarray(lengths).tolist()) <= {8, 9, 10, 11}
    assert len(set(np.asarray(lengths).tolist())) > 1
    np.testing.assert_array_equal(play(jax.random.key(0)).lengths, lengths)


def test_a_time_limit_ends_an_episode(cartpole: tuple[Any, Any]) -> None:
    env, params = cartpole
    limited = VectorEnv(env, params.replace(max_steps_in_episode=4))
    result = evaluate(limited, lambda obs: jnp.zeros(obs.shape[0], jnp.int32), jax.random.key(0), episodes=3)
    np.testing.assert_array_equal(result.lengths, [4, 4, 4])
