"""``train_dqn``: DQN on any number of copies of a gymnax environment with discrete actions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.dqn import DQN, DQNConfig, DQNState
from vibe_store.algorithms.replay import ReplayBuffer, Transition
from vibe_store.interfaces import Checkpointer, PyTree
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.envs import EpisodeStats, VectorEnv
from vibe_store.runner.evaluate import Evaluation, evaluate
from vibe_store.runner.loop import Carry, MetricsWriter, Program, Progress, TrainResult
from vibe_store.runner.train import described, train

__all__ = ["DQNRunnerState", "dqn_program", "train_dqn"]


class DQNRunnerState(NamedTuple):
    """All of a DQN run that is not in :class:`~vibe_store.algorithms.dqn.DQNState`: the item ``runner``.

    Attributes:
        replay: the transitions to learn from.
        env_state: the states of the environments.
        obs: their last observations.
        key: from which environments and batches are drawn.
        episodes: returns and lengths.
        learning: the metrics of the last update, NaN before the first.
    """

    replay: ReplayBuffer
    env_state: PyTree
    obs: Array
    key: Array
    episodes: EpisodeStats
    learning: dict[str, Array]


def train_dqn(
    env: Any,
    env_params: Any,
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
        env: a gymnax environment (gymnax 1.0 or newer) with discrete actions.
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


def dqn_program(env: Any, env_params: Any, *, dqn_config: DQNConfig, runner_config: RunnerConfig) -> Program:
    """Return DQN on this environment as the functions that the training loop calls."""
    envs = VectorEnv(env, env_params)
    n_envs, n_actions = runner_config.num_envs, envs.n_discrete_actions("DQN")

    def init(key: Array) -> Carry:
        agent_key, reset_key, key = jax.random.split(key, 3)
        obs, env_state = envs.reset(reset_key, n_envs)
        one = jax.ShapeDtypeStruct(envs.obs_shape, obs.dtype)
        example = Transition(
            obs=one,
            action=jax.ShapeDtypeStruct((), jnp.int32),
            reward=jax.ShapeDtypeStruct((), jnp.float32),
            next_obs=one,
            terminated=jax.ShapeDtypeStruct((), jnp.bool_),
        )
        runner = DQNRunnerState(
            replay=ReplayBuffer.create(example, capacity=dqn_config.buffer_size, width=n_envs),
            env_state=env_state,
            obs=obs,
            key=key,
            episodes=EpisodeStats.create(n_envs),
            learning={name: jnp.full((), jnp.nan, jnp.float32) for name in ("loss", "q_mean")},
        )
        return Carry(DQN.init(agent_key, envs.obs_shape, n_actions, config=dqn_config), runner)

    def step(carry: Carry) -> Carry:
        runner: DQNRunnerState = carry.runner
        key, env_key, batch_key = jax.random.split(runner.key, 3)
        before = carry.state.step
        action, state = DQN.act(carry.state, runner.obs, config=dqn_config, explore=True)
        result = envs.step(env_key, runner.env_state, action)
        replay = runner.replay.add(
            Transition(runner.obs, action, result.reward, result.next_obs, result.terminated)
        )
        state, learning = _learn(
            state,
            replay,
            runner.learning,
            batch_key,
            _updates_due(before, state.step, dqn_config),
            dqn_config,
        )
        runner = DQNRunnerState(
            replay=replay,
            env_state=result.env_state,
            obs=result.obs,
            key=key,
            episodes=runner.episodes.add(result.reward, result.done),
            learning=learning,
        )
        return Carry(state, runner)

    def report(carry: Carry) -> dict[str, Array]:
        return {
            **carry.runner.episodes.report(),
            **carry.runner.learning,
            "epsilon": DQN.epsilon(carry.state.step, config=dqn_config),
            "updates": carry.state.updates,
        }

    def evaluate_state(state: DQNState, key: Array) -> Evaluation:
        def act(obs: Array) -> Array:
            return DQN.act(state, obs, config=dqn_config, explore=False)[0]

        return evaluate(envs, act, key, episodes=runner_config.eval_episodes)

    return Program(
        stride=n_envs,
        init=init,
        step=step,
        report=report,
        evaluate=evaluate_state,
        metadata=described("dqn", envs.name, dqn_config, runner_config),
    )


def _updates_due(before: Array, after: Array, config: DQNConfig) -> Array:
    """Return how many updates follow the environment steps from ``before`` to ``after``."""
    n_updates = after // config.train_interval - before // config.train_interval
    return jnp.where(after >= config.learning_starts, n_updates, 0)


def _learn(
    state: DQNState,
    replay: ReplayBuffer,
    learning: dict[str, Array],
    key: Array,
    n_updates: Array,
    config: DQNConfig,
) -> tuple[DQNState, dict[str, Array]]:
    def update(i: Array, carry: tuple[DQNState, dict[str, Array]]) -> tuple[DQNState, dict[str, Array]]:
        batch = replay.sample(jax.random.fold_in(key, i), config.batch_size)
        return DQN.update(carry[0], batch, config=config)

    result: tuple[DQNState, dict[str, Array]] = jax.lax.fori_loop(0, n_updates, update, (state, learning))
    return result
