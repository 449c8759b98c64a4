"""``train_sac``: SAC on any number of copies of an environment with continuous actions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.sac import SAC, SACConfig, SACState
from vibe_store.interfaces import Checkpointer, PyTree
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.environment import Environment
from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.loop import MetricsWriter, Program, Progress, TrainResult
from vibe_store.runner.off_policy import off_policy_program, uniform_memory
from vibe_store.runner.train import train

__all__ = ["sac_program", "train_sac"]


def train_sac(
    env: Environment,
    env_params: PyTree,
    *,
    sac_config: SACConfig,
    runner_config: RunnerConfig,
    checkpointer: Checkpointer | None = None,
    metrics: MetricsWriter | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_best: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train SAC until ``runner_config.total_timesteps``, as :func:`~vibe_store.runner.train_dqn` does.

    Args:
        env: an environment with continuous actions, which have bounds.
        env_params: its parameters.
        sac_config: the hyperparameters.
        runner_config: the settings of the run; these and the other arguments are those of ``train_dqn``, as
            is what is raised.
        checkpointer: where to save.
        metrics: gets the lines of metrics.
        on_progress: is told how far the run is.
        on_best: is told of the best step so far.
    """
    program = sac_program(env, env_params, sac_config=sac_config, runner_config=runner_config)
    return train(
        program,
        runner_config,
        checkpointer=checkpointer,
        metrics=metrics,
        on_progress=on_progress,
        on_best=on_best,
    )


def sac_program(
    env: Environment, env_params: PyTree, *, sac_config: SACConfig, runner_config: RunnerConfig
) -> Program:
    """Return SAC on this environment as the functions that the training loop calls."""
    envs = VectorEnv(env, env_params)
    low, high = envs.action_bounds("SAC")

    def init(key: Array) -> SACState:
        state = SAC.init(key, envs.obs_shape, len(low), config=sac_config)
        return SAC.bounded(state, low, high)

    return off_policy_program(
        "sac",
        SAC,
        envs,
        sac_config,
        runner_config,
        init=init,
        memory=uniform_memory(SAC, sac_config),
        action=jax.ShapeDtypeStruct(low.shape, jnp.float32),
        learning=("critic_loss", "actor_loss", "q_mean", "entropy", "temperature"),
        report=lambda _state: {},
    )
