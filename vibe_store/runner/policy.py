"""``load_policy``: the policy of a checkpoint, to act with, and nothing else of what was saved."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.algorithms.dqn import DQN, DQNConfig
from vibe_store.algorithms.ppo import PPO, PPOConfig
from vibe_store.algorithms.sac import SAC, SACConfig
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree
from vibe_store.runner.seeds import select_seed

__all__ = ["Policy", "load_policy"]


class Policy:
    """A greedy policy: ``policy(obs)`` returns the action, or those of a batch of observations.

    It is compiled once for each shape of observations, and can be called inside of other compiled functions.

    Attributes:
        step: the step of the checkpoint that it came from.
        metadata: what was stored with that: ``algorithm``, ``env``, the configurations.
    """

    def __init__(
        self, act: Callable[[PyTree, Array], Array], state: PyTree, *, step: int, metadata: Mapping[str, Any]
    ) -> None:
        self.step = step
        self.metadata = metadata
        self._act = jax.jit(act)
        self._state = state

    def __call__(self, obs: Any) -> Array:
        """Choose the best actions.

        Args:
            obs: one observation, or a batch of them, of shape ``(batch, *obs_shape)``.

        Returns:
            Discrete actions, int32 of shape ``()`` or ``(batch,)``; or continuous ones within their bounds,
            float32 of shape ``(n_actions,)`` or ``(batch, n_actions)``.

        Raises:
            InvalidValueError: the observations have another shape than those that it was trained on.
        """
        action: Array = self._act(self._state, jnp.asarray(obs))
        return action

    def __repr__(self) -> str:
        what = f"{self.metadata['algorithm']} on {self.metadata['env']}"
        return f"<Policy of step {self.step}: {what}>"


def load_policy(
    directory: Any,
    *,
    best: bool = False,
    step: int | None = None,
    seed: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Policy:
    """Load what acting needs of a checkpoint of ``train_dqn``, ``train_sac`` or ``train_ppo``.

    Neither the replay buffer nor an optimiser nor a critic is read, and the environment need not be there.

    Args:
        directory: a run's folder (``runs/<id>``), a directory of checkpoints, one step's own folder, or the
            URL of one of these.
        best: take the checkpoint that ``best`` points to; without a ``best``, the one with the highest
            ``eval_return``.
        step: take this one; the newest by default.
        seed: of a run with ``num_seeds`` above 1, whose policy, counted from 0.
        storage_options: options of the storage, such as credentials.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: what is read is not what was saved.
        InvalidValueError: the checkpoint is not one of these runners; or ``seed`` is missing, or there is no
            such seed; or both ``best`` and ``step`` were given.
    """
    from vibe_store.checkpoint import find_checkpoint, load_checkpoint, load_metadata

    storage, step = find_checkpoint(
        directory, step=step, best_metric="eval_return" if best else None, storage_options=storage_options
    )
    where = f"The checkpoint of step {step} in {storage.url}"
    metadata = load_metadata(storage, step=step) or {}
    agent, config, spaces, num_seeds = _described(metadata, where)
    _check_seed(seed, num_seeds, where)
    like = jax.eval_shape(lambda: agent.acting(jax.random.key(0), config=config, **spaces))
    if num_seeds > 1:
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_seeds, *leaf.shape), leaf.dtype), like)
    state = load_checkpoint(storage, like, step=step, partial=True)
    if seed is not None:
        state = select_seed(state, seed)

    def act(state: PyTree, obs: Array) -> Array:
        action: Array = agent.algorithm.act(state, obs, config=config, explore=False)[0]
        return action

    return Policy(act, state, step=step, metadata=metadata)


@dataclass(frozen=True, slots=True)
class _Agent:
    """An algorithm, its configuration's class, and a new state without what acting can spare."""

    algorithm: Any
    config: Callable[..., Any]
    acting: Callable[..., PyTree]


def _acting_dqn(
    key: Array, *, config: DQNConfig, obs_shape: tuple[int, ...], n_actions: int, continuous: bool
) -> PyTree:
    del continuous
    return _only(DQN.init(key, obs_shape, n_actions, config=config), "params", "obs_stats")


def _acting_sac(
    key: Array, *, config: SACConfig, obs_shape: tuple[int, ...], n_actions: int, continuous: bool
) -> PyTree:
    del continuous
    state = SAC.init(key, obs_shape, n_actions, config=config)
    return _only(state, "actor", "obs_stats", "action_scale", "action_bias")


def _acting_ppo(
    key: Array, *, config: PPOConfig, obs_shape: tuple[int, ...], n_actions: int, continuous: bool
) -> PyTree:
    state: Any = PPO.init(key, obs_shape, n_actions, config=config, continuous=continuous)
    state = _only(state, "params", "obs_stats", "action_scale", "action_bias")
    return state._replace(params=replace(state.params, critic=None))


_AGENTS = {
    "dqn": _Agent(DQN, DQNConfig, _acting_dqn),
    "ppo": _Agent(PPO, PPOConfig, _acting_ppo),
    "sac": _Agent(SAC, SACConfig, _acting_sac),
}


def _only(state: Any, *names: str) -> Any:
    """Return a state with None for all but these fields: no leaf of those is looked for."""
    return state._replace(**{name: None for name in state._fields if name not in names})


def _described(metadata: Mapping[str, Any], where: str) -> tuple[_Agent, Any, dict[str, Any], int]:
    """Return a checkpoint's algorithm, its configuration and spaces, and how many seeds it holds."""
    agent = _AGENTS.get(str(metadata.get("algorithm")))
    if agent is None:
        raise InvalidValueError(
            f"{where} does not say that it is of one of the algorithms {', '.join(_AGENTS)}, so its policy "
            "cannot be told. Load its state with load_checkpoint."
        )
    try:
        saved = metadata["spaces"]
        spaces = {
            "obs_shape": tuple(saved["obs_shape"]),
            "n_actions": saved["n_actions"],
            "continuous": saved["continuous"],
        }
        return agent, agent.config(**metadata["algorithm_config"]), spaces, metadata["run"]["num_seeds"]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError(
            f"{where} describes its algorithm in a way that this version does not know "
            f"({type(error).__name__}: {error}). Load its state with load_checkpoint and a template of "
            f"{agent.algorithm.__name__}.init."
        ) from error


def _check_seed(seed: int | None, num_seeds: int, where: str) -> None:
    if num_seeds > 1 and seed is None:
        raise InvalidValueError(
            f"{where} holds {num_seeds} seeds: say whose policy to load, from seed=0 to seed={num_seeds - 1} "
            "(--run-seed of vibe-store eval)."
        )
    if num_seeds == 1 and seed is not None:
        raise InvalidValueError(f"{where} holds a single seed, so seed={seed} selects nothing. Leave it out.")
