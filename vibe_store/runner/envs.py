"""Gymnax environments, several at a time: checked once, strongly typed, with their episodes counted."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree

__all__ = ["EnvStep", "EpisodeStats", "VectorEnv", "strong"]

_RECENT_EPISODES = 100

_MOST_NUMBERS = 1_000
"""Larger arrays among the parameters of an environment are not stored with each checkpoint."""


class EnvStep(NamedTuple):
    """What one step of ``n`` environments gave; every array has ``n`` in front.

    Attributes:
        env_state: the states afterwards; an environment whose episode ended is already reset.
        obs: the observations to act on next.
        next_obs: the observations that the step led to, the last one of the episode where it ended.
        reward: float32.
        terminated: whether the episode came to a natural end, bool.
        done: whether it ended at all, by a time limit too, bool.
    """

    env_state: PyTree
    obs: Array
    next_obs: Array
    reward: Array
    terminated: Array
    done: Array


class VectorEnv:
    """``n`` copies of one gymnax environment (gymnax 1.0 or newer), as pure functions.

    Raises:
        InvalidValueError: the environment's observation is not one array, or its ``step`` does not return
            gymnax 1.0's six values.
    """

    def __init__(self, env: Any, env_params: Any) -> None:
        self.env = env
        self.params = env_params
        self.name = str(env.name)
        key = jax.eval_shape(lambda: jax.random.key(0))
        obs, state = jax.eval_shape(env.reset, key, env_params)
        if not isinstance(obs, jax.ShapeDtypeStruct):
            raise InvalidValueError(
                f"The observation of {self.name} is a {type(obs).__name__}, but only single arrays "
                "are supported. Wrap the environment so that it returns one array."
            )
        self.obs_shape = obs.shape
        self._check_step(key, state)

    def is_discrete(self) -> bool:
        """Say whether there are finitely many actions."""
        return hasattr(self.env.action_space(self.params), "n")

    def n_discrete_actions(self, algorithm: str) -> int:
        """Return how many actions there are for an algorithm, named as people know it, to choose among.

        Raises:
            InvalidValueError: the actions are not discrete.
        """
        space = self.env.action_space(self.params)
        if not self.is_discrete():
            raise InvalidValueError(
                f"{algorithm} chooses among discrete actions, but the action space of {self.name} is "
                f"{type(space).__name__} of shape {tuple(space.shape)}. Use an environment with discrete "
                "actions."
            )
        return int(space.n)

    def action_bounds(self, algorithm: str) -> tuple[Array, Array]:
        """Return the lowest and the highest action, float32 of shape ``(n_actions,)``, for an algorithm.

        Raises:
            InvalidValueError: the actions are no vectors of numbers, or have no bounds.
        """
        space = self.env.action_space(self.params)
        if self.is_discrete() or len(space.shape) != 1:
            raise InvalidValueError(
                f"{algorithm} needs actions that are vectors of numbers, but the action space of {self.name} "
                f"is {type(space).__name__} of shape {tuple(space.shape)}. Use an environment with "
                "continuous actions, or wrap this one."
            )
        low, high = (jnp.broadcast_to(jnp.float32(end), space.shape) for end in (space.low, space.high))
        if not bool(jnp.all(jnp.isfinite(low) & jnp.isfinite(high) & (low < high))):
            raise InvalidValueError(
                f"{algorithm} scales its actions to their bounds, but those of {self.name} are {low} to "
                f"{high}. Wrap the environment so that its action space has finite bounds."
            )
        return low, high

    def spaces(self) -> dict[str, Any]:
        """Return what a policy's template takes: ``obs_shape``, ``n_actions`` and whether ``continuous``."""
        space = self.env.action_space(self.params)
        n_actions = int(space.n) if self.is_discrete() else int(np.prod(space.shape))
        return {
            "obs_shape": list(self.obs_shape),
            "n_actions": n_actions,
            "continuous": not self.is_discrete(),
        }

    def plain_params(self) -> dict[str, Any]:
        """Return the parameters that are finite numbers, or small arrays of those, as JSON holds them."""
        if not dataclasses.is_dataclass(self.params):
            return {}
        values = {field.name: getattr(self.params, field.name) for field in dataclasses.fields(self.params)}
        return {name: np.asarray(value).tolist() for name, value in values.items() if _is_plain(value)}

    def reset(self, key: Array, n: int) -> tuple[Array, PyTree]:
        """Return the observations and states of ``n`` environments at the start of an episode."""
        reset = jax.vmap(self.env.reset, in_axes=(0, None))
        obs, state = reset(jax.random.split(key, n), self.params)
        return strong(obs), strong(state)

    def step(self, key: Array, env_state: PyTree, action: Array) -> EnvStep:
        """Step each environment once; ``action`` has shape ``(n, *action_shape)``."""
        step = jax.vmap(self.env.step, in_axes=(0, 0, 0, None))
        keys = jax.random.split(key, action.shape[0])
        obs, env_state, reward, terminated, truncated, info = step(keys, env_state, action, self.params)
        terminated = terminated.astype(jnp.bool_)
        return EnvStep(
            env_state=strong(env_state),
            obs=strong(obs),
            next_obs=strong(info["final_observation"]),
            reward=reward.astype(jnp.float32),
            terminated=terminated,
            done=terminated | truncated.astype(jnp.bool_),
        )

    def _check_step(self, key: Any, state: PyTree) -> None:
        space = self.env.action_space(self.params)
        action = jax.ShapeDtypeStruct(tuple(space.shape), space.dtype)
        result = jax.eval_shape(self.env.step, key, state, action, self.params)
        if len(result) != 6 or "final_observation" not in result[5]:
            raise InvalidValueError(
                f"{self.name}.step returns {len(result)} values; training needs those of gymnax 1.0: obs, "
                'state, reward, terminated, truncated and an info that holds "final_observation".'
            )


class EpisodeStats(NamedTuple):
    """Returns and lengths of the episodes so far, for ``n`` environments.

    They depend on nothing but the steps taken, so how often anybody looks at them changes nothing.

    Attributes:
        running_return: undiscounted reward of each unfinished episode, float32 of shape ``(n,)``.
        running_length: steps of each unfinished episode, int32 of shape ``(n,)``.
        finished: episodes that each environment has finished, int32 of shape ``(n,)``.
        recent_returns: the returns of the last ``k`` of them, a ring of float32 of shape ``(n, k)``, with
            ``k`` such that there are 100 in all, or a few more.
        recent_lengths: their lengths, int32 of shape ``(n, k)``.
    """

    running_return: Array
    running_length: Array
    finished: Array
    recent_returns: Array
    recent_lengths: Array

    @classmethod
    def create(cls, n: int) -> "EpisodeStats":
        """Return the statistics of ``n`` environments that have not been stepped."""
        k = -(-_RECENT_EPISODES // n)
        return cls(
            jnp.zeros(n, jnp.float32),
            jnp.zeros(n, jnp.int32),
            jnp.zeros(n, jnp.int32),
            jnp.zeros((n, k), jnp.float32),
            jnp.zeros((n, k), jnp.int32),
        )

    def add(self, reward: Array, done: Array) -> "EpisodeStats":
        """Return the statistics after one more step of each environment."""
        total, length = self.running_return + reward, self.running_length + 1
        k = self.recent_returns.shape[1]
        here = done[:, None] & (jnp.arange(k) == (self.finished % k)[:, None])
        return EpisodeStats(
            running_return=jnp.where(done, 0, total),
            running_length=jnp.where(done, 0, length),
            finished=self.finished + done,
            recent_returns=jnp.where(here, total[:, None], self.recent_returns),
            recent_lengths=jnp.where(here, length[:, None], self.recent_lengths),
        )

    def report(self) -> dict[str, Array]:
        """Return ``episodes``, and the means ``return`` and ``length`` of recent ones (NaN without any)."""
        k = self.recent_returns.shape[1]
        valid = jnp.arange(k) < self.finished[:, None]
        count = jnp.sum(valid)

        def mean(values: Array) -> Array:
            total = jnp.sum(jnp.where(valid, values, 0)).astype(jnp.float32)
            return jnp.where(count > 0, total / count, jnp.nan)

        return {
            "episodes": jnp.sum(self.finished),
            "return": mean(self.recent_returns),
            "length": mean(self.recent_lengths),
        }


def strong(tree: PyTree) -> PyTree:
    """Return the tree with weakly typed arrays made strongly typed, so that a compiled loop can carry it."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.result_type(leaf)), tree)


def _is_plain(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | Array):
        kinds = (jnp.bool_, jnp.integer, jnp.floating)
        if value.size > _MOST_NUMBERS or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            return False
    elif not isinstance(value, bool | int | float):
        return False
    return bool(np.all(np.isfinite(value)))
