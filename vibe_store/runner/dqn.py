"""``train_dqn``: DQN on any number of copies of an environment with discrete actions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.dqn import DQN, DQNConfig, DQNState
from vibe_store.algorithms.networks import check_network
from vibe_store.algorithms.prioritized import PrioritizedReplay
from vibe_store.interfaces import Checkpointer, PyTree
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.environment import Environment
from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.loop import MetricsWriter, Program, Progress, TrainResult
from vibe_store.runner.off_policy import Memory, off_policy_program, uniform_memory, with_scaled_rewards
from vibe_store.runner.rewards import DiscountedRewards
from vibe_store.runner.train import train

__all__ = ["dqn_program", "train_dqn"]


def train_dqn(
    env: Environment,
    env_params: PyTree,
    *,
    dqn_config: DQNConfig,
    runner_config: RunnerConfig,
    checkpointer: Checkpointer | None = None,
    metrics: MetricsWriter | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_best: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train DQN until ``runner_config.total_timesteps``, saving and evaluating on the way.

    A run that was killed and resumed ends in the same bits as one that was not.

    Args:
        env: an environment of gymnax, or any :class:`~vibe_store.runner.environment.Environment`, with
            discrete actions.
        env_params: its parameters.
        dqn_config: the hyperparameters.
        runner_config: the length of the run, its checkpoints, evaluations and seed.
        checkpointer: where to save, instead of one that is opened on ``runner_config.checkpoint_dir``; it is
            left open.
        metrics: gets a line of metrics every ``log_interval`` steps and at each evaluation.
        on_progress: is called about twice a second.
        on_best: is called with the step of each checkpoint whose evaluation is the best so far.

    Raises:
        InvalidValueError: the environment or a setting cannot be used, or the checkpoint to resume from is of
            another environment.
        CheckpointsExistError: there are checkpoints, and neither ``resume`` nor ``overwrite`` is set.
        TemplateMismatchError: the checkpoint to resume from is of another network or number of environments.
        TrainingInterrupted: Ctrl-C or SIGTERM came; the run is saved, and can be resumed.
    """
    program = dqn_program(env, env_params, dqn_config=dqn_config, runner_config=runner_config)
    return train(
        program,
        runner_config,
        checkpointer=checkpointer,
        metrics=metrics,
        on_progress=on_progress,
        on_best=on_best,
    )


def dqn_program(
    env: Environment, env_params: PyTree, *, dqn_config: DQNConfig, runner_config: RunnerConfig
) -> Program:
    """Return DQN on this environment as the functions that the training loop calls."""
    envs = VectorEnv(env, env_params)
    n_actions = envs.n_discrete_actions("DQN")
    check_network(dqn_config.network, envs.obs_shape)
    return off_policy_program(
        "dqn",
        DQN,
        envs,
        dqn_config,
        runner_config,
        init=lambda key: DQN.init(key, envs.obs_shape, n_actions, config=dqn_config),
        memory=_by_priority(dqn_config) if dqn_config.prioritized else uniform_memory(DQN, dqn_config),
        action=jax.ShapeDtypeStruct((), jnp.int32),
        learning=("loss", "q_mean"),
        report=lambda state: {"epsilon": DQN.epsilon(state.step, config=dqn_config)},
    )


def _by_priority(config: DQNConfig) -> Memory:
    """Return the memory from which transitions are drawn by their errors."""

    def learn(
        state: DQNState, replay: PrioritizedReplay, key: Array, rewards: DiscountedRewards | None
    ) -> tuple[DQNState, PrioritizedReplay, dict[str, Array]]:
        importance = DQN.importance(state.step, config=config)
        drawn = replay.sample(key, config.batch_size, importance_exponent=importance)
        batch = with_scaled_rewards(drawn.transitions, rewards)
        state, metrics, errors = DQN.update_weighted(state, batch, drawn.weights, config=config)
        replay = replay.learned(drawn.places, errors, priority_exponent=config.priority_exponent)
        return state, replay, metrics

    return Memory(create=PrioritizedReplay.create, learn=learn)
