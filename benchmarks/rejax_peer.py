"""rejax on the same environment, network and hyperparameters as one of our configurations."""

from typing import Any

import gymnax
import rejax
from gymnax.wrappers.compat import LegacyStepAPIWrapper

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.algorithms.sac import SACConfig

__all__ = ["rejax_algorithm"]


class CopyableLegacyEnv(LegacyStepAPIWrapper):
    """rejax copies its environment, and gymnax's wrapper looks attributes up for ever while it is copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> "CopyableLegacyEnv":
        return self


def rejax_algorithm(env_id: str, config: Any, *, num_envs: int, steps: int) -> Any:
    """Return rejax's algorithm, which evaluates only once, at its end.

    Args:
        env_id: gymnax's name of the environment.
        config: a ``DQNConfig``, ``SACConfig`` or ``PPOConfig`` without what rejax cannot do.
        num_envs: how many environments.
        steps: environment steps in all.
    """
    env, env_params = gymnax.make(env_id)
    name, settings = _settings(config, num_envs, steps)
    return rejax.get_algo(name).create(
        env=CopyableLegacyEnv(env),
        env_params=env_params,
        num_envs=num_envs,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
        gamma=config.gamma,
        **settings,
    )


def _settings(config: Any, num_envs: int, steps: int) -> tuple[str, dict[str, Any]]:
    if isinstance(config, PPOConfig):
        return "ppo", {
            "agent_kwargs": {"activation": "tanh", "hidden_layer_sizes": config.hidden_sizes},
            "learning_rate": config.learning_rate,
            "num_steps": config.rollout_length,
            "num_epochs": config.n_epochs,
            "num_minibatches": config.n_minibatches,
            "gae_lambda": config.gae_lambda,
            "clip_eps": config.clip_range,
            "ent_coef": config.entropy_coefficient,
            "vf_coef": config.value_coefficient,
            "max_grad_norm": config.max_grad_norm,
        }
    replay = {
        "agent_kwargs": {"activation": "relu"},
        "buffer_size": config.buffer_size,
        "batch_size": config.batch_size,
        "fill_buffer": config.learning_starts,
        "num_epochs": max(1, num_envs // config.train_interval),
    }
    if isinstance(config, SACConfig):
        return "sac", {
            **replay,
            "hidden_layer_sizes": config.hidden_sizes,
            # One rate for all of its optimisers.
            "learning_rate": config.actor_learning_rate,
            "polyak": 1 - config.tau,
        }
    if not isinstance(config, DQNConfig) or config.hidden_sizes != (64, 64):
        raise ValueError(f"rejax has nothing to compare with {config}")
    return "dqn", {
        **replay,
        "learning_rate": config.learning_rate,
        "target_update_freq": config.target_update_interval * config.train_interval,
        "ddqn": config.double,
        "eps_start": config.epsilon_start,
        "eps_end": config.epsilon_end,
        "exploration_fraction": config.exploration_steps / steps,
    }
