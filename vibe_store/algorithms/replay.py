"""A replay buffer on the device: a ring array for each leaf of a transition, written and sampled in jit."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree

__all__ = ["ReplayBuffer", "Transition"]


class Transition(NamedTuple):
    """One step of an environment, or a batch of them.

    Attributes:
        obs: the observation before the step, of any shape and dtype.
        action: what was done, int32 for discrete actions.
        reward: what it earned, float32.
        next_obs: the observation after the step, of the same episode: where the episode ended here, its last
            one, not the first of the next.
        terminated: whether the episode came to a natural end, bool. False where a time limit cut it off.
    """

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any


class ReplayBuffer(NamedTuple):
    """The last ``rows * width`` transitions, where every write adds one row of ``width`` transitions.

    Time runs along the first axis, so what is written between two saves is one contiguous range of each array
    (two where the ring wraps around).

    Attributes:
        storage: the transitions; each leaf has shape ``(rows, width, *shape)`` and the dtype stored.
        row: where the next row goes, int32.
        filled: how many rows hold something, int32.
    """

    storage: PyTree
    row: Array
    filled: Array

    @classmethod
    def create(cls, example: PyTree, *, capacity: int, width: int) -> Self:
        """Return an empty buffer.

        Args:
            example: one transition, for its shapes and dtypes only; ``jax.ShapeDtypeStruct`` will do.
            capacity: how many transitions it must hold at least: it is rounded up to a multiple of ``width``.
            width: how many transitions are written at a time, the number of environments say.
        """
        if width < 1 or capacity < width:
            raise InvalidValueError(
                f"A replay buffer of {capacity} transitions cannot take {width} at a time; "
                "its capacity must be at least as many, and both at least 1."
            )
        rows = -(-capacity // width)
        storage = jax.tree.map(lambda leaf: jnp.zeros((rows, width, *leaf.shape), leaf.dtype), example)
        return cls(storage, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """How many transitions fit."""
        rows, width = jax.tree.leaves(self.storage)[0].shape[:2]
        return int(rows * width)

    @property
    def size(self) -> Array:
        """How many transitions it holds."""
        size: Array = self.filled * jax.tree.leaves(self.storage)[0].shape[1]
        return size

    def add(self, transitions: PyTree) -> Self:
        """Return the buffer with one more row, in place of the oldest one when it is full.

        Args:
            transitions: ``width`` transitions; each leaf has shape ``(width, *shape)`` and the stored dtype.

        Raises:
            InvalidValueError: a leaf has another shape or dtype. Nothing is cast.
        """

        def write(ring: Array, new: Array) -> Array:
            if new.shape != ring.shape[1:] or new.dtype != ring.dtype:
                raise InvalidValueError(
                    f"This replay buffer takes rows of {ring.dtype}{list(ring.shape[1:])}; "
                    f"it was given {new.dtype}{list(new.shape)}."
                )
            written: Array = jax.lax.dynamic_update_slice_in_dim(ring, new[None], self.row, axis=0)
            return written

        storage = jax.tree.map(write, self.storage, transitions)
        rows = jax.tree.leaves(storage)[0].shape[0]
        return self._replace(
            storage=storage, row=(self.row + 1) % rows, filled=jnp.minimum(self.filled + 1, rows)
        )

    def sample(self, key: Array, batch_size: int) -> PyTree:
        """Return ``batch_size`` transitions drawn uniformly with replacement; the buffer must not be empty.

        Args:
            key: a PRNG key.
            batch_size: how many to draw, static under jit.
        """
        return self.take(jax.random.randint(key, (batch_size,), 0, self.size))

    def take(self, index: Array) -> PyTree:
        """Return the transitions at these places, counted along rows, each leaf with them in front."""

        def draw(ring: Array) -> Array:
            flat = ring.reshape(-1, *ring.shape[2:])
            return flat.at[index].get(mode="promise_in_bounds")

        return jax.tree.map(draw, self.storage)
