"""Wrappers that change what an environment's observations are, and nothing else."""

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree
from vibe_store.runner.environment import Environment

__all__ = ["BinaryObservation", "FlattenObservation", "OneHotObservation"]


class _ObservationWrapper(ABC):
    """An environment with other observations; its name, states, actions and parameters stay what they are.

    Attributes:
        env: the environment that is wrapped.
    """

    def __init__(self, env: Environment) -> None:
        self.env = env

    @property
    def name(self) -> str:
        """The name of the wrapped environment."""
        return self.env.name

    @abstractmethod
    def observation(self, obs: PyTree) -> Array:
        """Return what becomes of an observation."""

    def reset(self, key: Array, params: PyTree) -> tuple[Array, PyTree]:
        """Begin an episode; see :class:`~vibe_store.runner.environment.Environment`."""
        obs, state = self.env.reset(key, params)
        return self.observation(obs), state

    def step(self, key: Array, state: PyTree, action: Array, params: PyTree) -> tuple[Any, ...]:
        """Take one step; see :class:`~vibe_store.runner.environment.Environment`."""
        obs, *others, info = self.env.step(key, state, action, params)
        if "final_observation" in info:
            info = {**info, "final_observation": self.observation(info["final_observation"])}
        return (self.observation(obs), *others, info)

    def action_space(self, params: PyTree) -> Any:
        """Return the space of actions."""
        return self.env.action_space(params)


class FlattenObservation(_ObservationWrapper):
    """Makes one float32 vector of each observation: an array of any shape, or a tuple, dict or tree of them.

    The arrays follow one another in the order of :func:`jax.tree.leaves` (dicts by their sorted keys), each
    of them row by row. Bools and integers become floating-point numbers.
    """

    def observation(self, obs: PyTree) -> Array:
        """Return an observation as a vector.

        Raises:
            InvalidValueError: it holds something else than real numbers, or nothing at all.
        """
        leaves = jax.tree_util.tree_leaves_with_path(obs)
        for path, leaf in leaves:
            dtype = leaf.dtype
            if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating)):
                raise InvalidValueError(
                    f"The observation of {self.name} cannot be flattened: its leaf "
                    f"{jax.tree_util.keystr(path) or 'itself'} is {dtype}, which is no real number."
                )
        if not leaves:
            raise InvalidValueError(f"The observation of {self.name} cannot be flattened: it has no leaves.")
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for _, leaf in leaves])

    def observation_space(self, params: PyTree) -> Any:
        """Return the space of all vectors of that length."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        obs, _ = jax.eval_shape(self.reset, key, params)
        return _box(-jnp.inf, jnp.inf, obs.shape, jnp.float32)


class OneHotObservation(_ObservationWrapper):
    """Makes a vector of bools of an observation that is one of ``n`` integers: true at its place alone.

    Args:
        env: an environment whose observation space is discrete, FrozenLake say.
        env_params: its parameters, which say how many observations there are.

    Raises:
        InvalidValueError: its observation space is not discrete.
    """

    def __init__(self, env: Environment, env_params: PyTree) -> None:
        super().__init__(env)
        space = env.observation_space(env_params)
        if not hasattr(space, "n"):
            raise InvalidValueError(
                f"The observations of {env.name} cannot be one-hot encoded: its observation space is "
                f"{type(space).__name__}, not discrete. Use the environment without OneHotObservation."
            )
        self._n = int(space.n)

    def observation(self, obs: PyTree) -> Array:
        """Return an integer as bools of shape ``(n,)``."""
        return jax.nn.one_hot(obs, self._n, dtype=jnp.bool_)

    def observation_space(self, params: PyTree) -> Any:
        """Return the space of vectors of ``n`` bools."""
        del params
        return _box(0, 1, (self._n,), jnp.bool_)


class BinaryObservation(_ObservationWrapper):
    """Makes bools of an observation that is an array of zeros and ones, as MinAtar's images are.

    A bool takes one byte in a replay buffer and its checkpoints, where gymnax's float32 takes four. Whatever
    is not 0 counts as 1.
    """

    def observation(self, obs: PyTree) -> Array:
        """Return an observation as bools of the same shape."""
        return jnp.asarray(obs) != 0

    def observation_space(self, params: PyTree) -> Any:
        """Return the space of arrays of bools of that shape."""
        return _box(0, 1, self.env.observation_space(params).shape, jnp.bool_)


def _box(low: float, high: float, shape: tuple[int, ...], dtype: Any) -> Any:
    from gymnax.environments import spaces

    return spaces.Box(low, high, shape, dtype)
