"""Environment: what an object needs so that the runners can train on it, which is what gymnax's have."""

from typing import Any, Protocol

from jax import Array

from vibe_store.interfaces import PyTree

__all__ = ["Environment"]


class Environment(Protocol):
    """An environment as pure functions that JAX can trace: one of gymnax's, or any object with these methods.

    Every method takes the environment's parameters last, a pytree that the runners only pass on. What a
    method returns keeps its structure, shapes and dtypes from call to call. Where an episode ends, the same
    ``step`` begins the next one: ``reset`` is called at the start of a run only.

    An observation is one array: floating-point, bool, uint8 or int32, of any shape, and it is kept in that
    dtype. A network sees its numbers as float32, those of a scalar as one input; where an integer only names
    one of many states, wrap the environment in :class:`~vibe_store.runner.wrappers.OneHotObservation`, and
    where an observation is a tree of arrays in :class:`~vibe_store.runner.wrappers.FlattenObservation`.
    """

    @property
    def name(self) -> str:
        """What checkpoints are said to be of: a run resumes only in an environment of the same name."""
        ...

    def reset(self, key: Array, params: PyTree, /) -> tuple[PyTree, PyTree]:
        """Begin an episode.

        Args:
            key: a PRNG key.
            params: the environment's parameters.

        Returns:
            The first observation, and the state, a pytree of arrays.
        """
        ...

    def step(self, key: Array, state: PyTree, action: Array, params: PyTree, /) -> tuple[Any, ...]:
        """Take one step, and where that ends the episode begin the next one.

        Args:
            key: a PRNG key.
            state: the state before the step.
            action: int32 of shape ``()`` where actions are discrete, else float32 of the space's shape.
            params: the environment's parameters.

        Returns:
            Six values: the observation to act on next and the state, both already those of a new episode
            where this one ended; the reward, a number; whether the episode came to a natural end; whether a
            time limit cut it off; and a dict whose ``"final_observation"`` is the observation that the step
            led to, the last one of the episode where it ended. Five values, as of gymnax before 1.0, with one
            flag for either end, are taken too: then every end counts as natural.
        """
        ...

    def action_space(self, params: PyTree, /) -> Any:
        """Return the space of actions: an object with ``shape`` and ``dtype``.

        It has the number of actions as ``n`` where they are discrete, else the bounds ``low`` and ``high``.
        """
        ...

    def observation_space(self, params: PyTree, /) -> Any:
        """Return the space of observations, like that of actions; only ``OneHotObservation`` asks for it."""
        ...
