"""An agent of your own, which needs nothing of this library but `CheckpointManager`.

    python examples/custom_agent.py         # kill it and run it again: it goes on where it was

climbs CartPole by random search: it perturbs a linear policy and keeps what does better.
"""

from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp

from vibe_store import CheckpointManager

ENV, ENV_PARAMS = gymnax.make("CartPole-v1")
ROUNDS = 60


class Agent(NamedTuple):
    """The policy's weights, what they earned, and the key that the next perturbation comes from."""

    weights: jax.Array
    earned: jax.Array
    key: jax.Array


def play(weights: jax.Array, key: jax.Array) -> jax.Array:
    """Return the return of one episode."""

    def step(carry: tuple, step_key: jax.Array) -> tuple:
        obs, state, playing, total = carry
        action = (obs @ weights > 0).astype(jnp.int32)
        obs, state, reward, terminated, truncated, _ = ENV.step(step_key, state, action, ENV_PARAMS)
        total += jnp.where(playing, reward, 0)
        return (obs, state, playing & ~(terminated | truncated), total), None

    obs, state = ENV.reset(key, ENV_PARAMS)
    start = (obs, state, jnp.bool_(True), jnp.float32(0))
    (*_, total), _ = jax.lax.scan(step, start, jax.random.split(key, 500))
    return total


@jax.jit
def improve(agent: Agent) -> Agent:
    key, noise_key, play_key = jax.random.split(agent.key, 3)
    candidate = agent.weights + 0.5 * jax.random.normal(noise_key, agent.weights.shape)
    earned = jnp.mean(jax.vmap(play, (None, 0))(candidate, jax.random.split(play_key, 8)))
    better = earned > agent.earned
    return Agent(jnp.where(better, candidate, agent.weights), jnp.where(better, earned, agent.earned), key)


def main() -> None:
    agent = Agent(jnp.zeros(4), jnp.float32(-jnp.inf), jax.random.key(0))
    with CheckpointManager(
        "checkpoints/random_search",
        save_interval_steps=10,
        best_fn=lambda metrics: metrics["earned"],
        best_mode="max",
    ) as manager:
        start = manager.latest_step() or 0
        if start:
            agent = manager.restore(start, agent)
        print(f"from round {start}")
        for round_ in range(start + 1, ROUNDS + 1):
            agent = improve(agent)
            manager.save(round_, agent, metrics={"earned": float(agent.earned)})
    print(f"earned {float(agent.earned):.0f} with {agent.weights}")


if __name__ == "__main__":
    main()
