"""Gymnax environments, several at a time: checked once, strongly typed, with their episodes counted."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree
from vibe_store.runner.environment import Environment
from vibe_store.runner.warning import warn_caller

__all__ = ["EnvStep", "EpisodeStats", "VectorEnv", "strong"]

_RECENT_EPISODES = 100

_DTYPES = (jnp.floating, jnp.bool_, jnp.uint8, jnp.int32)
"""What a network can take without losing anything."""

_MOST_NUMBERS = 1_000
"""Larger arrays among the parameters of an environment are not stored with each checkpoint."""


class EnvStep(NamedTuple):
    """What one step of ``n`` environments gave; every array has ``n`` in front.

    Attributes:
        env_state: the states afterwards; an environment whose episode ended is already reset.
        obs: the observations to act on next.
        next_obs: the observations that the step led to, the last one of the episode where it ended; of an
            environment that does not tell that one, the first one of the next.
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
    """``n`` copies of one environment, as pure functions.

    An environment whose ``step`` returns five values, as gymnax's did before 1.0, is warned about: it tells
    neither a time limit from a natural end nor the last observation of an episode, so every end counts as
    natural, after which nothing is to come.

    Raises:
        InvalidValueError: the environment is none of :class:`~vibe_store.runner.environment.Environment`; the
            sentence says what it returns instead.
    """

    def __init__(self, env: Environment, env_params: PyTree) -> None:
        self.env = env
        self.params = env_params
        self.name = str(env.name)
        key = jax.eval_shape(lambda: jax.random.key(0))
        obs, state = jax.eval_shape(env.reset, key, env_params)
        self._check_observation(obs)
        self.obs_shape: tuple[int, ...] = obs.shape
        self.obs_dtype = obs.dtype
        self._check_step(key, obs, state)

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
        obs, env_state, reward, *ends, info = step(keys, env_state, action, self.params)
        terminated = ends[0].astype(jnp.bool_)
        obs = strong(obs)
        return EnvStep(
            env_state=strong(env_state),
            obs=obs,
            next_obs=obs if len(ends) == 1 else strong(info["final_observation"]),
            reward=reward.astype(jnp.float32),
            terminated=terminated,
            done=terminated | ends[-1].astype(jnp.bool_),
        )

    def _check_observation(self, obs: Any) -> None:
        if not isinstance(obs, jax.ShapeDtypeStruct):
            raise InvalidValueError(
                f"The observation of {self.name} is a {type(obs).__name__}, but only single arrays can be "
                "learned from. Wrap the environment in vibe_store.runner.wrappers.FlattenObservation, which "
                "makes one vector of all."
            )
        if not any(jnp.issubdtype(obs.dtype, kind) for kind in _DTYPES):
            raise InvalidValueError(
                f"The observation of {self.name} is an array of {obs.dtype}, but only floating-point, bool, "
                "uint8 and int32 ones can be learned from. Wrap the environment so that it returns one of "
                "these; vibe_store.runner.wrappers.FlattenObservation makes a float32 vector of any numbers."
            )

    def _check_step(self, key: Any, obs: Any, state: PyTree) -> None:
        space = self.env.action_space(self.params)
        if not (hasattr(space, "shape") and hasattr(space, "dtype")):
            raise InvalidValueError(
                f"The action space of {self.name} is {type(space).__name__}, but actions must be one array. "
                "Wrap the environment so that its action space has a shape and a dtype."
            )
        action = jax.ShapeDtypeStruct(tuple(space.shape), space.dtype)
        result = jax.eval_shape(self.env.step, key, state, action, self.params)
        count = len(result) if isinstance(result, tuple) else 1
        if count == 5:
            warn_caller(
                f"{self.name}.step returns 5 values, as gymnax's did before 1.0, so a time limit cannot be "
                "told from a natural end, and the last observation of an episode is not known: every end "
                "counts as natural, as if nothing could have come after it. Return 6 values, as gymnax 1.0 "
                "does, where time limits matter."
            )
        elif count != 6 or "final_observation" not in result[5]:
            raise InvalidValueError(
                f"{self.name}.step returns {_described(result)}; training needs the six values of gymnax "
                '1.0: obs, state, reward, terminated, truncated and an info that holds "final_observation".'
            )
        else:
            self._check_alike("final_observation of its step", result[5]["final_observation"], obs)
        self._check_alike("observation of its step", result[0], obs)
        self._check_alike("state of its step", result[1], state)
        names = ("reward", "done") if count == 5 else ("reward", "terminated", "truncated")
        for name, value in zip(names, result[2:-1], strict=True):
            if not isinstance(value, jax.ShapeDtypeStruct) or value.shape != ():
                raise InvalidValueError(
                    f"The {name} that {self.name}.step returns is {_described(value)}, but it must be "
                    "one number, of shape ()."
                )

    def _check_alike(self, what: str, tree: PyTree, first: PyTree) -> None:
        """Refuse what a loop could not carry: something of another structure, shape or dtype."""
        structure: Any = jax.tree.structure(tree)
        same_structure: Any = jax.tree.structure(first)
        if structure != same_structure:
            raise InvalidValueError(
                f"The {what} is another tree than what {self.name}.reset returns: {structure}, not "
                f"{same_structure}. It must stay the same from call to call."
            )
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), wanted in zip(leaves, jax.tree.leaves(first), strict=True):
            if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
                place = f" at {jax.tree_util.keystr(path)}" if path else ""
                raise InvalidValueError(
                    f"The {what} differs from what {self.name}.reset returns{place}: "
                    f"{leaf.dtype}{list(leaf.shape)}, not {wanted.dtype}{list(wanted.shape)}. It must stay "
                    "the same from call to call."
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


def _described(value: Any) -> str:
    """Say what something that was returned is."""
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | Array):
        kinds = (jnp.bool_, jnp.integer, jnp.floating)
        if value.size > _MOST_NUMBERS or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            return False
    elif not isinstance(value, bool | int | float):
        return False
    return bool(np.all(np.isfinite(value)))
