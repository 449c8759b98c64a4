"""Presets: an environment with hyperparameters that are known to learn it, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.dqn import train_dqn
from vibe_store.runner.loop import TrainResult

__all__ = ["Preset", "get_preset", "preset_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A run that is ready to start: ``preset.train(*preset.make_env(), dqn_config=..., runner_config=...)``.

    Attributes:
        name: what ``vibe-store train`` is given.
        algorithm: the name of the algorithm, the prefix of its configuration's keyword.
        env_id: gymnax's name of the environment.
        config: the hyperparameters, of the algorithm's own class.
        runner: the settings of the run.
        train: the function that runs it.
    """

    name: str
    algorithm: str
    env_id: str
    config: Any
    runner: RunnerConfig
    train: Callable[..., TrainResult]

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
        return env, env_params


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
            train=train_dqn,
        ),
    )
}
