"""What the runners of DQN and SAC share: act, remember, and learn from what is remembered."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.replay import ReplayBuffer, Transition
from vibe_store.interfaces import PyTree
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.envs import EpisodeStats, VectorEnv
from vibe_store.runner.evaluate import Evaluation, evaluate
from vibe_store.runner.loop import Carry, Program
from vibe_store.runner.seeds import alike
from vibe_store.runner.train import described

__all__ = ["Learner", "OffPolicyRunnerState", "off_policy_program"]


class OffPolicyRunnerState(NamedTuple):
    """All of a run that is not in the algorithm's own state: the item ``runner``.

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


class Learner(Protocol):
    """An off-policy algorithm: :class:`~vibe_store.algorithms.dqn.DQN`, say."""

    def act(self, state: Any, obs: Array, *, config: Any, explore: bool = True) -> tuple[Array, Any]:
        """Choose an action for each observation; return the state that follows."""
        ...

    def update(self, state: Any, batch: Transition, *, config: Any) -> tuple[Any, dict[str, Array]]:
        """Learn from a batch; return the new state, and metrics."""
        ...


def off_policy_program(
    algorithm: str,
    learner: Learner,
    envs: VectorEnv,
    config: Any,
    runner_config: RunnerConfig,
    *,
    init: Callable[[Array], Any],
    action: jax.ShapeDtypeStruct,
    learning: Sequence[str],
    report: Callable[[Any], dict[str, Array]],
) -> Program:
    """Return an algorithm on an environment as the functions that the training loop calls.

    Args:
        algorithm: its name.
        learner: what acts and learns.
        envs: the environments.
        config: the algorithm's configuration, which has ``buffer_size``, ``batch_size``, ``train_interval``
            and ``learning_starts``.
        runner_config: the settings of the run.
        init: a new state of the algorithm, which has ``step`` and ``updates``, from a PRNG key.
        action: shape and dtype of one action.
        learning: the names of the metrics of an update.
        report: further scalars to log, from a state.
    """
    n_envs, same = runner_config.num_envs, alike(runner_config.num_seeds)

    def init_all(key: Array) -> Carry:
        agent_key, reset_key, key = jax.random.split(key, 3)
        obs, env_state = envs.reset(reset_key, n_envs)
        one = jax.ShapeDtypeStruct(envs.obs_shape, obs.dtype)
        example = Transition(
            obs=one,
            action=action,
            reward=jax.ShapeDtypeStruct((), jnp.float32),
            next_obs=one,
            terminated=jax.ShapeDtypeStruct((), jnp.bool_),
        )
        runner = OffPolicyRunnerState(
            replay=ReplayBuffer.create(example, capacity=config.buffer_size, width=n_envs),
            env_state=env_state,
            obs=obs,
            key=key,
            episodes=EpisodeStats.create(n_envs),
            learning={name: jnp.full((), jnp.nan, jnp.float32) for name in learning},
        )
        return Carry(init(agent_key), runner)

    def step(carry: Carry) -> Carry:
        runner: OffPolicyRunnerState = carry.runner
        key, env_key, batch_key = jax.random.split(runner.key, 3)
        before = same(carry.state.step)
        chosen, state = learner.act(carry.state, runner.obs, config=config, explore=True)
        result = envs.step(env_key, runner.env_state, chosen)
        ring = runner.replay._replace(row=same(runner.replay.row), filled=same(runner.replay.filled))
        replay = ring.add(Transition(runner.obs, chosen, result.reward, result.next_obs, result.terminated))
        n_updates = _updates_due(before, same(state.step), config)

        def update(i: Array, learned: tuple[Any, dict[str, Array]]) -> tuple[Any, dict[str, Array]]:
            batch = replay.sample(jax.random.fold_in(batch_key, i), config.batch_size)
            return learner.update(learned[0], batch, config=config)

        state, metrics = jax.lax.fori_loop(0, n_updates, update, (state, runner.learning))
        runner = OffPolicyRunnerState(
            replay=replay,
            env_state=result.env_state,
            obs=result.obs,
            key=key,
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
    )


def _updates_due(before: Array, after: Array, config: Any) -> Array:
    """Return how many updates follow the environment steps from ``before`` to ``after``."""
    n_updates = after // config.train_interval - before // config.train_interval
    return jnp.where(after >= config.learning_starts, n_updates, 0)
