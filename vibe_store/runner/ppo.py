"""``train_ppo``: PPO on any number of copies of an environment with discrete or continuous actions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.networks import check_network
from vibe_store.algorithms.ppo import PPO, PPOConfig, PPOState, Rollout
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Checkpointer, PyTree
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.environment import Environment
from vibe_store.runner.envs import EpisodeStats, VectorEnv
from vibe_store.runner.evaluate import Evaluation, evaluate
from vibe_store.runner.loop import Carry, MetricsWriter, Program, Progress, TrainResult
from vibe_store.runner.rewards import DiscountedRewards
from vibe_store.runner.train import described, train

__all__ = ["PPORunnerState", "ppo_program", "train_ppo"]


_LEARNING = ("policy_loss", "value_loss", "entropy", "clipped", "kl")


class PPORunnerState(NamedTuple):
    """All of a PPO run that is not in :class:`~vibe_store.algorithms.ppo.PPOState`: the item ``runner``.

    Attributes:
        env_state: the states of the environments.
        obs: their last observations.
        key: from which environments are drawn.
        rewards: of the discounted sums of rewards; None unless ``normalize_rewards``.
        episodes: returns and lengths.
        learning: the metrics of the last round of learning, NaN before the first.
    """

    env_state: PyTree
    obs: Array
    key: Array
    rewards: DiscountedRewards | None
    episodes: EpisodeStats
    learning: dict[str, Array]


def train_ppo(
    env: Environment,
    env_params: PyTree,
    *,
    ppo_config: PPOConfig,
    runner_config: RunnerConfig,
    checkpointer: Checkpointer | None = None,
    metrics: MetricsWriter | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_best: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train PPO until ``runner_config.total_timesteps``, as :func:`~vibe_store.runner.train_dqn` does.

    Args:
        env: an environment with discrete actions, or with continuous ones that have bounds.
        env_params: its parameters.
        ppo_config: the hyperparameters.
        runner_config: the settings of the run; these and the other arguments are those of ``train_dqn``, as
            is what is raised.
        checkpointer: where to save.
        metrics: gets the lines of metrics.
        on_progress: is told how far the run is.
        on_best: is told of the best step so far.
    """
    program = ppo_program(env, env_params, ppo_config=ppo_config, runner_config=runner_config)
    return train(
        program,
        runner_config,
        checkpointer=checkpointer,
        metrics=metrics,
        on_progress=on_progress,
        on_best=on_best,
    )


def ppo_program(
    env: Environment, env_params: PyTree, *, ppo_config: PPOConfig, runner_config: RunnerConfig
) -> Program:
    """Return PPO on this environment as the functions that the training loop calls.

    One call of its ``step`` collects ``rollout_length`` steps of every environment, and learns from them.

    Raises:
        InvalidValueError: the environment cannot be used; or its steps cannot be split into minibatches, or
            into ones of a single step, whose advantages cannot be scaled.
    """
    envs = VectorEnv(env, env_params)
    check_network(ppo_config.network, envs.obs_shape)
    n_envs = runner_config.num_envs
    stride = ppo_config.rollout_length * n_envs
    if stride % ppo_config.n_minibatches:
        raise InvalidValueError(
            f"n_minibatches={ppo_config.n_minibatches} cannot be used: it must divide the {stride} steps "
            f"that rollout_length={ppo_config.rollout_length} and num_envs={n_envs} give."
        )
    if stride == ppo_config.n_minibatches and ppo_config.normalize_advantages:
        raise InvalidValueError(
            f"n_minibatches={stride} cannot be used with normalize_advantages=True: in a minibatch of one "
            "step the advantage becomes 0, so the actor learns nothing. Take fewer, or set it to False."
        )
    discrete = envs.is_discrete()
    low, high = (None, None) if discrete else envs.action_bounds("PPO")

    def init_agent(key: Array) -> PPOState:
        if low is None or high is None:
            return PPO.init(key, envs.obs_shape, envs.n_discrete_actions("PPO"), config=ppo_config)
        state = PPO.init(key, envs.obs_shape, len(low), config=ppo_config, continuous=True)
        return PPO.bounded(state, low, high)

    def init(key: Array) -> Carry:
        agent_key, reset_key, key = jax.random.split(key, 3)
        obs, env_state = envs.reset(reset_key, n_envs)
        runner = PPORunnerState(
            env_state=env_state,
            obs=obs,
            key=key,
            rewards=DiscountedRewards.create(n_envs) if ppo_config.normalize_rewards else None,
            episodes=EpisodeStats.create(n_envs),
            learning={name: jnp.full((), jnp.nan, jnp.float32) for name in _LEARNING},
        )
        return Carry(init_agent(agent_key), runner)

    def act(carry: Carry, env_key: Array) -> tuple[Carry, Rollout]:
        runner: PPORunnerState = carry.runner
        choice, log_density, state = PPO.draw(carry.state, runner.obs, config=ppo_config)
        result = envs.step(env_key, runner.env_state, PPO.action_of(state, choice))
        row = Rollout(
            obs=runner.obs,
            choice=choice,
            log_density=log_density,
            reward=result.reward,
            next_obs=result.next_obs,
            terminated=result.terminated,
            done=result.done,
        )
        runner = runner._replace(
            env_state=result.env_state,
            obs=result.obs,
            episodes=runner.episodes.add(result.reward, result.done),
        )
        return Carry(state, runner), row

    def step(carry: Carry) -> Carry:
        keys = jax.random.split(carry.runner.key, 1 + ppo_config.rollout_length)
        carry, rollout = jax.lax.scan(act, carry, keys[1:])
        rewards = carry.runner.rewards
        if rewards is not None:
            rewards = rewards.add(rollout.reward, rollout.done, ppo_config.gamma)
            rollout = rollout._replace(reward=rewards.scale(rollout.reward))
        state, learning = PPO.update(carry.state, rollout, config=ppo_config)
        return Carry(state, carry.runner._replace(key=keys[0], rewards=rewards, learning=learning))

    def report(carry: Carry) -> dict[str, Array]:
        runner: PPORunnerState = carry.runner
        return {**runner.episodes.report(), **runner.learning, "updates": carry.state.updates}

    def evaluate_state(state: PPOState, key: Array, step: Array) -> Evaluation:
        def greedy(obs: Array) -> Array:
            return PPO.act(state, obs, config=ppo_config, explore=False)[0]

        return evaluate(envs, greedy, jax.random.fold_in(key, step), episodes=runner_config.eval_episodes)

    return Program(
        stride=stride,
        init=init,
        step=step,
        report=report,
        evaluate=evaluate_state,
        metadata=described("ppo", envs, ppo_config, runner_config),
    )
