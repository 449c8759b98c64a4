"""An environment of your own: any object with gymnax's interface trains, evaluates, saves and resumes.

python examples/custom_environment.py
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gymnax.environments import environment, spaces

from vibe_store.algorithms.dqn import DQN, DQNConfig
from vibe_store.runner import RunnerConfig, train_dqn

LENGTH = 8


class Corridor(environment.Environment):
    """Walk to the right end of a corridor; each step costs something."""

    class State(NamedTuple):
        """Where the walker is, and since how many steps."""

        place: jax.Array
        time: jax.Array

    class Params(NamedTuple):
        """After how many steps an episode is cut off."""

        max_steps_in_episode: int = 50

    name = "Corridor"
    num_actions = 2

    @property
    def default_params(self) -> Params:
        return self.Params()

    def reset_env(self, key: jax.Array, params: Params) -> tuple[jax.Array, State]:
        state = self.State(jax.random.randint(key, (), 0, LENGTH // 2), jnp.int32(0))
        return self.get_obs(state), state

    def step_env(self, key: jax.Array, state: State, action: jax.Array, params: Params) -> Any:
        place = jnp.clip(state.place + 2 * action - 1, 0, LENGTH - 1)
        state = self.State(place, state.time + 1)
        reward = jnp.where(place == LENGTH - 1, 1.0, -0.1)
        return self.get_obs(state), state, reward, self.is_terminal(state, params), {}

    def get_obs(self, state: State, params: Any = None, key: Any = None) -> jax.Array:
        return jax.nn.one_hot(state.place, LENGTH)

    def is_terminated(self, state: State, params: Params) -> jax.Array:
        return state.place == LENGTH - 1

    def action_space(self, params: Any = None) -> spaces.Discrete:
        return spaces.Discrete(2)

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(0, 1, (LENGTH,), jnp.float32)


def main() -> None:
    env = Corridor()
    config = DQNConfig(hidden_sizes=(32,), learning_starts=200, train_interval=4, exploration_steps=2_000)
    result = train_dqn(
        env,
        env.default_params,
        dqn_config=config,
        runner_config=RunnerConfig(
            total_timesteps=4_000,
            checkpoint_dir="checkpoints/corridor",
            checkpoint_interval=2_000,
            eval_interval=2_000,
            resume=True,
        ),
    )
    print(f"step {result.step}, mean return {result.eval_return}")
    ahead, _ = DQN.act(result.state, jax.nn.one_hot(3, LENGTH), config=config, explore=False)
    print("goes right" if int(ahead) else "goes left")


if __name__ == "__main__":
    main()
