"""The mean and variance of everything seen so far, to bring observations and rewards to a common scale."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.networks import observations

__all__ = ["RunningStats", "normalized"]

_EPSILON = 1e-8
_FARTHEST = 10.0


class RunningStats(NamedTuple):
    """What is known of a stream of arrays of one shape.

    Batches are merged by the formulas of Chan, Golub and LeVeque (1983), as weighted means, so that nothing
    grows with the number of arrays.

    Attributes:
        seen: how many arrays there were, int32.
        mean: their mean, float32.
        variance: their variance, float32; 1 before the first.
    """

    seen: Array
    mean: Array
    variance: Array

    @classmethod
    def create(cls, shape: Sequence[int]) -> Self:
        """Return the statistics of no arrays of a shape."""
        shape = tuple(shape)
        return cls(jnp.zeros((), jnp.int32), jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32))

    def update(self, batch: Array) -> Self:
        """Return the statistics with a batch more; its dimensions are in front of those of an array."""
        flat = batch.reshape(-1, *self.mean.shape).astype(jnp.float32)
        seen = self.seen + len(flat)
        share = len(flat) / seen.astype(jnp.float32)
        apart = jnp.mean(flat, axis=0) - self.mean
        variance = (
            (1 - share) * self.variance + share * jnp.var(flat, axis=0) + share * (1 - share) * apart**2
        )
        return self._replace(seen=seen, mean=self.mean + share * apart, variance=variance)

    def normalize(self, values: Array) -> Array:
        """Return values less the mean, in standard deviations, and within 10 of them; float32."""
        scaled = (values.astype(jnp.float32) - self.mean) / self.deviation()
        return jnp.clip(scaled, -_FARTHEST, _FARTHEST)

    def deviation(self) -> Array:
        """Return the standard deviation; never 0."""
        return jnp.sqrt(self.variance + _EPSILON)


def normalized(obs: Array, stats: RunningStats | None) -> Array:
    """Return observations as a network sees them: scaled by what is known of them, or as they are.

    Raises:
        InvalidValueError: they are to be scaled, and are of another shape than what is known.
    """
    return obs if stats is None else stats.normalize(observations(obs, stats.mean.shape)[0])
