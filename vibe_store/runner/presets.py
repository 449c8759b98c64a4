"""Presets: an environment with hyperparameters that are known to learn it, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.algorithms.sac import SACConfig
from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.dqn import dqn_program
from vibe_store.runner.environment import Environment
from vibe_store.runner.loop import Program, TrainResult
from vibe_store.runner.ppo import ppo_program
from vibe_store.runner.sac import sac_program
from vibe_store.runner.seeds import of_seeds, run_keys
from vibe_store.runner.train import train
from vibe_store.runner.wrappers import BinaryObservation

__all__ = ["Preset", "get_preset", "preset_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A run that is ready to start: ``preset.train(*preset.make_env(), preset.config, preset.runner)``.

    Attributes:
        name: what ``vibe-store train`` is given.
        algorithm: the name of the algorithm, the prefix of its configuration's keyword.
        env_id: gymnax's name of the environment.
        config: the hyperparameters, of the algorithm's own class.
        runner: the settings of the run.
        program: makes of an environment and of settings what the training loop runs.
        wrap: what is put around the environment; None leaves it as it is.
    """

    name: str
    algorithm: str
    env_id: str
    config: Any
    runner: RunnerConfig
    program: Callable[..., Program]
    wrap: Callable[[Environment], Environment] | None = None

    def train(
        self, env: Any, env_params: Any, config: Any, runner_config: RunnerConfig, **others: Any
    ) -> TrainResult:
        """Train with these settings; ``others`` are the further arguments of ``train_dqn``."""
        return train(self._program(env, env_params, config, runner_config), runner_config, **others)

    def check(self, config: Any, runner_config: RunnerConfig) -> None:
        """Refuse settings that cannot train on the environment, before anything is opened or written.

        Raises:
            InvalidValueError: a setting does not fit the environment, or the others.
            MissingDependencyError: gymnax cannot be imported.
        """
        program = of_seeds(self._program(*self.make_env(), config, runner_config), runner_config.num_seeds)
        jax.eval_shape(program.init, run_keys(runner_config.seed, runner_config.num_seeds))

    def _program(self, env: Any, env_params: Any, config: Any, runner_config: RunnerConfig) -> Program:
        settings = {f"{self.algorithm}_config": config, "runner_config": runner_config}
        return self.program(env, env_params, **settings)

    def make_env(self) -> tuple[Any, Any]:
        """Return the environment and its parameters.

        Raises:
            MissingDependencyError: gymnax cannot be imported.
        """
        try:
            import gymnax
        except ImportError as error:
            raise MissingDependencyError(
                f"The preset {self.name} needs gymnax, which cannot be imported ({error}): "
                'pip install "vibe-store[rl]"'
            ) from error
        env, env_params = gymnax.make(self.env_id)
        return (env if self.wrap is None else self.wrap(env)), env_params


def get_preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        InvalidValueError: there is none; the message lists those that exist.
    """
    if name not in _PRESETS:
        raise InvalidValueError(f"There is no preset {name!r}. Presets: {', '.join(preset_names())}.")
    return _PRESETS[name]


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, sorted."""
    return tuple(sorted(_PRESETS))


def _minatar(game: str) -> Preset:
    """Return DQN on a MinAtar game, with the network and the settings of Young & Tian (arXiv:1903.03176).

    Unlike there, it learns by Adam in place of RMSProp, from one batch of 64 every 4 steps in place of one of
    32 at every step, and the target network follows every 1,000 steps, as there.
    """
    return Preset(
        name=f"{game.lower()}_minatar_dqn",
        algorithm="dqn",
        env_id=f"{game}-MinAtar",
        config=DQNConfig(
            network="cnn",
            hidden_sizes=(128,),
            learning_rate=2.5e-4,
            buffer_size=100_000,
            batch_size=64,
            learning_starts=5_000,
            train_interval=4,
            target_update_interval=250,
            epsilon_end=0.1,
            exploration_steps=100_000,
            loss="huber",
        ),
        # A checkpoint holds some 100 MB of replay buffer, so they are few.
        runner=RunnerConfig(
            total_timesteps=2_000_000,
            num_envs=8,
            checkpoint_interval=100_000,
            max_checkpoints=2,
            eval_interval=50_000,
            log_interval=10_000,
        ),
        program=dqn_program,
        wrap=BinaryObservation,
    )


_PRESETS = {
    preset.name: preset
    for preset in (
        # One update per 4 steps. Mean return of 100 greedy episodes at the end, median of 5 seeds: 500.
        Preset(
            name="cartpole_dqn",
            algorithm="dqn",
            env_id="CartPole-v1",
            config=DQNConfig(train_interval=4, target_update_interval=50),
            runner=RunnerConfig(total_timesteps=100_000, num_envs=8),
            program=dqn_program,
        ),
        Preset(
            name="cartpole_ppo",
            algorithm="ppo",
            env_id="CartPole-v1",
            config=PPOConfig(learning_rate=2.5e-3),
            # It trains 5,000 steps in less than a tenth of a second.
            runner=RunnerConfig(total_timesteps=100_000, num_envs=8, checkpoint_interval=10_000),
            program=ppo_program,
        ),
        Preset(
            name="pendulum_sac",
            algorithm="sac",
            env_id="Pendulum-v1",
            config=SACConfig(
                hidden_sizes=(64, 64),
                actor_learning_rate=1e-3,
                tau=0.01,
                buffer_size=10_000,
                learning_starts=500,
            ),
            runner=RunnerConfig(
                total_timesteps=10_000, num_envs=1, checkpoint_interval=1_000, eval_interval=1_000
            ),
            program=sac_program,
        ),
        Preset(
            name="acrobot_dqn",
            algorithm="dqn",
            env_id="Acrobot-v1",
            config=DQNConfig(
                learning_rate=6.3e-4,
                buffer_size=50_000,
                train_interval=4,
                target_update_interval=60,
                exploration_steps=12_000,
            ),
            runner=RunnerConfig(total_timesteps=100_000, num_envs=8),
            program=dqn_program,
        ),
        Preset(
            name="mountaincar_dqn",
            algorithm="dqn",
            env_id="MountainCar-v0",
            config=DQNConfig(
                learning_rate=1e-3,
                buffer_size=50_000,
                train_interval=4,
                target_update_interval=150,
                epsilon_end=0.07,
                exploration_steps=50_000,
                exploration_repeat=20,
            ),
            runner=RunnerConfig(total_timesteps=200_000, num_envs=8),
            program=dqn_program,
        ),
        Preset(
            name="mountaincarcontinuous_sac",
            algorithm="sac",
            env_id="MountainCarContinuous-v0",
            config=SACConfig(
                hidden_sizes=(64, 64),
                actor_learning_rate=3e-4,
                critic_learning_rate=3e-4,
                gamma=0.9999,
                tau=0.01,
                buffer_size=50_000,
                batch_size=256,
                learning_starts=10_000,
                exploration_repeat=50,
                initial_temperature=0.1,
                learn_temperature=False,
            ),
            runner=RunnerConfig(total_timesteps=50_000, num_envs=8),
            program=sac_program,
        ),
        *(_minatar(game) for game in ("Breakout", "Freeway", "Asterix", "SpaceInvaders")),
    )
}
