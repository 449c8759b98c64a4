"""What the runners of DQN and SAC share: act, remember, and learn from what is remembered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.prioritized import PrioritizedReplay
from vibe_store.algorithms.replay import ReplayBuffer, Transition
from vibe_store.interfaces import PyTree
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.envs import EpisodeStats, VectorEnv
from vibe_store.runner.evaluate import Evaluation, evaluate
from vibe_store.runner.loop import Carry, Program, ReplayParts
from vibe_store.runner.rewards import DiscountedRewards
from vibe_store.runner.seeds import alike
from vibe_store.runner.train import described

__all__ = [
    "Learner",
    "Memory",
    "OffPolicyRunnerState",
    "off_policy_program",
    "uniform_memory",
    "with_scaled_rewards",
]


class OffPolicyRunnerState(NamedTuple):
    """All of a run that is not in the algorithm's own state: the item ``runner``.

    Attributes:
        replay: the transitions to learn from; None in a checkpoint that leaves them out.
        env_state: the states of the environments.
        obs: their last observations.
        key: from which environments and batches are drawn.
        rewards: of the discounted sums of rewards; None unless ``normalize_rewards``.
        episodes: returns and lengths.
        learning: the metrics of the last update, NaN before the first.
    """

    replay: ReplayBuffer | PrioritizedReplay | None
    env_state: PyTree
    obs: Array
    key: Array
    rewards: DiscountedRewards | None
    episodes: EpisodeStats
    learning: dict[str, Array]


class Learner(Protocol):
    """An off-policy algorithm: :class:`~vibe_store.algorithms.dqn.DQN`, say."""

    def act(self, state: Any, obs: Array, *, config: Any, explore: bool = True) -> tuple[Array, Any]:
        """Choose an action for each observation; return the state that follows."""
        ...

    def update(self, state: Any, batch: Transition, *, config: Any) -> tuple[Any, dict[str, Array]]:
        """Learn from a batch; return the new state, and metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How transitions are kept, and how an update draws from them.

    Attributes:
        create: an empty buffer, from an example, ``capacity`` and ``width``.
        learn: one update, from the algorithm's state, the buffer, a PRNG key and what is known of rewards;
            returns the state and the buffer that follow, and the metrics of the update.
    """

    create: Callable[..., Any]
    learn: Callable[[Any, Any, Array, DiscountedRewards | None], tuple[Any, Any, dict[str, Array]]]


def uniform_memory(learner: Learner, config: Any) -> Memory:
    """Return the memory from which every transition is drawn alike."""

    def learn(
        state: Any, replay: ReplayBuffer, key: Array, rewards: DiscountedRewards | None
    ) -> tuple[Any, ReplayBuffer, dict[str, Array]]:
        batch = with_scaled_rewards(replay.sample(key, config.batch_size), rewards)
        state, metrics = learner.update(state, batch, config=config)
        return state, replay, metrics

    return Memory(create=ReplayBuffer.create, learn=learn)


def with_scaled_rewards(batch: Transition, rewards: DiscountedRewards | None) -> Transition:
    """Return a batch whose rewards are scaled by what is known of rewards; as it is where nothing is kept."""
    return batch if rewards is None else batch._replace(reward=rewards.scale(batch.reward))


def off_policy_program(
    algorithm: str,
    learner: Learner,
    envs: VectorEnv,
    config: Any,
    runner_config: RunnerConfig,
    *,
    init: Callable[[Array], Any],
    memory: Memory,
    action: jax.ShapeDtypeStruct,
    learning: Sequence[str],
    report: Callable[[Any], dict[str, Array]],
) -> Program:
    """Return an algorithm on an environment as the functions that the training loop calls.

    Args:
        algorithm: its name.
        learner: what acts.
        envs: the environments.
        config: the algorithm's configuration, which has ``buffer_size``, ``train_interval``,
            ``learning_starts``, ``gamma`` and ``normalize_rewards``.
        runner_config: the settings of the run.
        init: a new state of the algorithm, which has ``step`` and ``updates``, from a PRNG key.
        memory: what is learned from, and how.
        action: shape and dtype of one action.
        learning: the names of the metrics of an update.
        report: further scalars to log, from a state.
    """
    n_envs, same = runner_config.num_envs, alike(runner_config.num_seeds)

    def empty_replay() -> Any:
        one = jax.ShapeDtypeStruct(envs.obs_shape, envs.obs_dtype)
        example = Transition(
            obs=one,
            action=action,
            reward=jax.ShapeDtypeStruct((), jnp.float32),
            next_obs=one,
            terminated=jax.ShapeDtypeStruct((), jnp.bool_),
        )
        return memory.create(example, capacity=config.buffer_size, width=n_envs)

    def init_all(key: Array) -> Carry:
        agent_key, reset_key, key = jax.random.split(key, 3)
        obs, env_state = envs.reset(reset_key, n_envs)
        runner = OffPolicyRunnerState(
            replay=empty_replay(),
            env_state=env_state,
            obs=obs,
            key=key,
            rewards=DiscountedRewards.create(n_envs) if config.normalize_rewards else None,
            episodes=EpisodeStats.create(n_envs),
            learning={name: jnp.full((), jnp.nan, jnp.float32) for name in learning},
        )
        return Carry(init(agent_key), runner)

    def step(carry: Carry) -> Carry:
        runner: OffPolicyRunnerState = carry.runner
        held: Any = runner.replay
        key, env_key, batch_key = jax.random.split(runner.key, 3)
        before = same(carry.state.step)
        chosen, state = learner.act(carry.state, runner.obs, config=config, explore=True)
        result = envs.step(env_key, runner.env_state, chosen)
        held = held._replace(row=same(held.row), filled=same(held.filled))
        replay = held.add(Transition(runner.obs, chosen, result.reward, result.next_obs, result.terminated))
        rewards = runner.rewards
        if rewards is not None:
            rewards = rewards.add(result.reward[None], result.done[None], config.gamma)
        n_updates = _updates_due(before, same(state.step), replay, config)

        def update(i: Array, learned: tuple[Any, Any, dict[str, Array]]) -> tuple[Any, Any, dict[str, Array]]:
            return memory.learn(learned[0], learned[1], jax.random.fold_in(batch_key, i), rewards)

        state, replay, metrics = jax.lax.fori_loop(0, n_updates, update, (state, replay, runner.learning))
        runner = OffPolicyRunnerState(
            replay=replay,
            env_state=result.env_state,
            obs=result.obs,
            key=key,
            rewards=rewards,
            episodes=runner.episodes.add(result.reward, result.done),
            learning=metrics,
        )
        return Carry(state, runner)

    def report_all(carry: Carry) -> dict[str, Array]:
        runner: OffPolicyRunnerState = carry.runner
        return {
            **runner.episodes.report(),
            **runner.learning,
            **report(carry.state),
            "updates": carry.state.updates,
        }

    def evaluate_state(state: Any, key: Array, step: Array) -> Evaluation:
        def act(obs: Array) -> Array:
            return learner.act(state, obs, config=config, explore=False)[0]

        return evaluate(envs, act, jax.random.fold_in(key, step), episodes=runner_config.eval_episodes)

    return Program(
        stride=n_envs,
        init=init_all,
        step=step,
        report=report_all,
        evaluate=evaluate_state,
        metadata=described(algorithm, envs, config, runner_config),
        replay=ReplayParts(
            remove=lambda runner: runner._replace(replay=None),
            renew=lambda runner: runner._replace(replay=empty_replay()),
        ),
    )


def _updates_due(before: Array, after: Array, replay: Any, config: Any) -> Array:
    """Return how many updates follow the environment steps from ``before`` to ``after``.

    A run that resumed without its buffer has taken its first steps long ago, and first fills a new one.
    """
    n_updates = after // config.train_interval - before // config.train_interval
    refilled = replay.size >= min(config.learning_starts, replay.capacity)
    return jnp.where((after >= config.learning_starts) & refilled, n_updates, 0)
