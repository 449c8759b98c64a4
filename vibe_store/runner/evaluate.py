"""Greedy evaluation: whole episodes with a key of their own, so that training never notices."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.interfaces import PyTree
from vibe_store.runner.envs import VectorEnv

__all__ = ["Evaluation", "evaluate", "record_episode"]


class Evaluation(NamedTuple):
    """Undiscounted returns (float32) and lengths (int32) of episodes, each of shape ``(episodes,)``."""

    returns: Array
    lengths: Array


def evaluate(env: VectorEnv, act: Callable[[Array], Array], key: Array, *, episodes: int) -> Evaluation:
    """Play each episode to its end, all of them side by side.

    Args:
        env: the environments.
        act: maps observations of shape ``(episodes, *obs_shape)`` to actions.
        key: a PRNG key; the result depends on nothing else.
        episodes: how many to play, static under jit.
    """

    class Carry(NamedTuple):
        key: Array
        env_state: PyTree
        obs: Array
        playing: Array
        returns: Array
        lengths: Array

    def step(carry: Carry) -> Carry:
        key, step_key = jax.random.split(carry.key)
        result = env.step(step_key, carry.env_state, act(carry.obs))
        return Carry(
            key=key,
            env_state=result.env_state,
            obs=result.obs,
            playing=carry.playing & ~result.done,
            returns=carry.returns + jnp.where(carry.playing, result.reward, 0),
            lengths=carry.lengths + carry.playing,
        )

    key, reset_key = jax.random.split(key)
    obs, env_state = env.reset(reset_key, episodes)
    start = Carry(
        key=key,
        env_state=env_state,
        obs=obs,
        playing=jnp.ones(episodes, jnp.bool_),
        returns=jnp.zeros(episodes, jnp.float32),
        lengths=jnp.zeros(episodes, jnp.int32),
    )
    end = jax.lax.while_loop(lambda carry: jnp.any(carry.playing), step, start)
    return Evaluation(end.returns, end.lengths)


def record_episode(
    env: VectorEnv, act: Callable[[Array], Array], key: Array
) -> tuple[list[PyTree], list[float]]:
    """Play one episode to its end, and keep each state in which there was something to choose.

    Args:
        env: the environments, one of which is played.
        act: maps observations of shape ``(1, *obs_shape)`` to actions.
        key: a PRNG key; the result depends on nothing else.

    Returns:
        The states, and the undiscounted return up to each of them.
    """
    step = jax.jit(lambda key, env_state, obs: env.step(key, env_state, act(obs)))
    key, reset_key = jax.random.split(key)
    obs, env_state = jax.jit(env.reset, static_argnums=1)(reset_key, 1)
    first = jax.jit(lambda env_state: jax.tree.map(lambda leaf: leaf[0], env_state))
    states, returns, total, done = [], [], 0.0, False
    while not done:
        states.append(first(env_state))
        returns.append(total)
        key, step_key = jax.random.split(key)
        result = step(step_key, env_state, obs)
        obs, env_state = result.obs, result.env_state
        total, done = total + float(result.reward[0]), bool(result.done[0])
    return states, returns
