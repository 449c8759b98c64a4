"""Rewards on a common scale: divided by the standard deviation of their discounted sums."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.running_stats import RunningStats

__all__ = ["DiscountedRewards"]


class DiscountedRewards(NamedTuple):
    """The discounted sum of rewards so far in each environment, and what is known of such sums.

    Attributes:
        running: float32 of shape ``(n,)``.
        stats: of all sums, each step's.
    """

    running: Array
    stats: RunningStats

    @classmethod
    def create(cls, n: int) -> "DiscountedRewards":
        """Return the sums of ``n`` environments that have not been stepped."""
        return cls(jnp.zeros(n, jnp.float32), RunningStats.create(()))

    def add(self, rewards: Array, done: Array, gamma: float) -> "DiscountedRewards":
        """Return the sums after ``T`` steps more.

        Args:
            rewards: of each step and environment, shape ``(T, n)``.
            done: where an episode ended, of the same shape.
            gamma: the discount factor.
        """

        def step(running: Array, earned: tuple[Array, Array]) -> tuple[Array, Array]:
            total = running * gamma + earned[0]
            return jnp.where(earned[1], 0, total), total

        running, totals = jax.lax.scan(step, self.running, (rewards, done))
        return DiscountedRewards(running, self.stats.update(totals))

    def scale(self, rewards: Array) -> Array:
        """Return rewards in standard deviations of all sums so far."""
        return rewards / self.stats.deviation()
