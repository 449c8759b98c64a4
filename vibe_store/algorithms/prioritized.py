"""Prioritised experience replay (Schaul et al., 2016, arXiv:1511.05952), the proportional variant."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.replay import ReplayBuffer
from vibe_store.interfaces import PyTree

__all__ = ["Drawn", "PrioritizedReplay"]

_LEAST_ERROR = 1e-6
"""What is added to every error, so that none is never drawn again."""

_FANOUT = 8
"""How many sums each sum of the next level is made of."""


class Drawn(NamedTuple):
    """A batch that was drawn by priority.

    Attributes:
        transitions: each leaf with ``batch_size`` in front.
        weights: what the loss of each is to be multiplied by, float32 of shape ``(batch_size,)``.
        places: where they are in the buffer, int32 of shape ``(batch_size,)``.
    """

    transitions: PyTree
    weights: Array
    places: Array


class PrioritizedReplay(NamedTuple):
    """A :class:`~vibe_store.algorithms.replay.ReplayBuffer` that is drawn from in proportion to priorities.

    A priority is ``(abs(error) + 1e-6) ** exponent``, with the error of a transition when it was last learned
    from. The sums that drawing needs are made anew each time: adding up 100,000 numbers costs less than
    keeping a tree of sums up to date does in a compiled program, and no rounding can add up.

    Attributes:
        storage: the transitions; each leaf has shape ``(rows, width, *shape)`` and the dtype stored.
        row: where the next row goes, int32.
        filled: how many rows hold something, int32.
        priorities: of each transition, float32 of shape ``(rows, width)``; 0 where there is none.
        largest: the largest priority so far, which a new transition gets, float32; 1 at first.
    """

    storage: PyTree
    row: Array
    filled: Array
    priorities: Array
    largest: Array

    @classmethod
    def create(cls, example: PyTree, *, capacity: int, width: int) -> Self:
        """Return an empty buffer; the arguments are those of :meth:`ReplayBuffer.create`."""
        ring = ReplayBuffer.create(example, capacity=capacity, width=width)
        priorities = jnp.zeros((ring.capacity // width, width), jnp.float32)
        return cls(*ring, priorities=priorities, largest=jnp.ones((), jnp.float32))

    @property
    def capacity(self) -> int:
        """How many transitions fit."""
        return self._ring.capacity

    @property
    def size(self) -> Array:
        """How many transitions it holds."""
        return self._ring.size

    def add(self, transitions: PyTree) -> Self:
        """Return the buffer with one more row, of the largest priority; see :meth:`ReplayBuffer.add`."""
        new = jnp.full((1, self.priorities.shape[1]), self.largest)
        priorities = jax.lax.dynamic_update_slice_in_dim(self.priorities, new, self.row, axis=0)
        ring = self._ring.add(transitions)
        return self._replace(**ring._asdict(), priorities=priorities)

    def sample(self, key: Array, batch_size: int, *, importance_exponent: Array | float) -> Drawn:
        """Draw transitions in proportion to their priorities; the buffer must not be empty.

        The sum of all priorities is split into ``batch_size`` equal ranges, and one transition is drawn from
        each (appendix B.2.1 of the paper). A transition's weight is ``(N * P) ** -importance_exponent``, with
        ``N`` how many there are and ``P`` its share of all priorities, divided by the largest of the batch.

        Args:
            key: a PRNG key.
            batch_size: how many to draw, static under jit.
            importance_exponent: 0 weighs all alike, 1 makes up for the priorities wholly.
        """
        levels = _sums(self.priorities.reshape(-1))
        share = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,), jnp.float32)) / batch_size
        places = jnp.minimum(_find(levels, share * levels[-1][0]), self.size - 1)
        priority = levels[0].at[places].get(mode="promise_in_bounds")
        # N and the sum of all priorities cancel out, and the largest weight is that of the lowest priority.
        weights = (jnp.min(priority) / priority) ** importance_exponent
        return Drawn(self._ring.take(places), weights, places)

    def learned(self, places: Array, errors: Array, *, priority_exponent: float) -> Self:
        """Return the buffer with the priorities that follow from new errors.

        Args:
            places: which transitions were learned from, as :meth:`sample` gave it.
            errors: their temporal-difference errors, float32 of the same shape; the sign means nothing.
            priority_exponent: 0 makes all alike, 1 puts priorities in proportion to errors.
        """
        new = (jnp.abs(errors) + _LEAST_ERROR) ** priority_exponent
        flat = self.priorities.reshape(-1).at[places].set(new, mode="promise_in_bounds")
        return self._replace(
            priorities=flat.reshape(self.priorities.shape), largest=jnp.maximum(self.largest, jnp.max(new))
        )

    @property
    def _ring(self) -> ReplayBuffer:
        return ReplayBuffer(self.storage, self.row, self.filled)


def _sums(values: Array) -> list[Array]:
    """Return the values, the sums of each ``_FANOUT`` of them, the sums of those and so on, up to one sum.

    Every level but the last is filled up with zeros to a multiple of ``_FANOUT``.
    """
    levels = []
    while values.size > 1:
        levels.append(jnp.pad(values, (0, -values.size % _FANOUT)))
        values = jnp.sum(levels[-1].reshape(-1, _FANOUT), axis=1)
    return [*levels, values]


def _find(levels: list[Array], target: Array) -> Array:
    """Return the first index at which the running sum of the lowest level is above each target.

    No rounding leads to a value of 0: where no such place is left among the parts of a sum, the last part
    that is not 0 is taken.
    """
    index = jnp.zeros(target.shape, jnp.int32)
    lower = jnp.tril(jnp.ones((_FANOUT, _FANOUT), jnp.float32))
    places = jnp.arange(_FANOUT)
    for level in reversed(levels[:-1]):
        parts = level.reshape(-1, _FANOUT).at[index].get(mode="promise_in_bounds")
        running = jnp.matmul(parts, lower.T, precision=jax.lax.Precision.HIGHEST)
        here = (parts > 0) & (running > target[:, None])
        last = jnp.max(jnp.where(parts > 0, places, 0), axis=1)
        place = jnp.where(jnp.any(here, axis=1), jnp.argmax(here, axis=1), last)
        before = (places == place[:, None] - 1) * running
        target = jnp.maximum(target - jnp.sum(before, axis=1), 0)
        index = (index * _FANOUT + place).astype(jnp.int32)
    return index
