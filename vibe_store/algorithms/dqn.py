"""Deep Q-learning (Mnih et al., 2015) and double Q-learning (van Hasselt et al., 2016), as pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from vibe_store.algorithms.networks import Network, NetworkKind, make_network
from vibe_store.algorithms.replay import Transition
from vibe_store.algorithms.running_stats import RunningStats, normalized
from vibe_store.algorithms.settings import (
    check,
    check_fraction,
    check_int,
    check_kinds,
    check_positive,
    checked_sizes,
)
from vibe_store.errors import InvalidValueError

__all__ = ["DQN", "DQNConfig", "DQNState"]


@dataclass(frozen=True)
class DQNConfig:
    """The hyperparameters of DQN. Steps are environment steps, summed over all environments."""

    network: NetworkKind = "mlp"
    """Q-network: mlp, or cnn (3 by 3 convolutions before the hidden layers), which takes images."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Width of each hidden layer of the Q-network."""
    learning_rate: float = 2.5e-4
    """Step size of Adam."""
    gamma: float = 0.99
    """Discount factor, from 0 to 1."""
    buffer_size: int = 10_000
    """Transitions that the replay buffer holds; rounded up to a multiple of the number of environments."""
    batch_size: int = 128
    """Transitions in each update."""
    learning_starts: int = 1_000
    """Steps before the first update."""
    train_interval: int = 10
    """Steps for each update; with more environments than this, several updates follow one step of all."""
    target_update_interval: int = 50
    """Updates between two changes of the target network."""
    tau: float = 1.0
    """How far the target network moves at each change, above 0 up to 1; 1 copies the online network."""
    epsilon_start: float = 1.0
    """Share of random actions at the first step."""
    epsilon_end: float = 0.05
    """Share of random actions once exploration_steps have passed."""
    exploration_steps: int = 10_000
    """Steps over which the share of random actions falls, in a line, whatever the length of the run."""
    exploration_repeat: int = 1
    """Steps of each environment for which one draw of exploration holds. More than 1 leads further away than
    single random actions do (with random durations: arXiv:2006.01782)."""
    double: bool = True
    """Let the online network choose the action whose value the target network gives (double Q-learning)."""
    loss: Literal["mse", "huber"] = "mse"
    """Loss on the temporal-difference error: mse (half of its square) or huber (linear beyond 1)."""
    max_grad_norm: float | None = None
    """Norm to which gradients are clipped; None leaves them alone."""
    prioritized: bool = False
    """Draw transitions by their error when last seen, in place of uniformly."""
    priority_exponent: float = 0.6
    """How far the error decides what is drawn, from 0 (not at all) to 1 (in proportion)."""
    importance_exponent: float = 0.4
    """How far weights make up for what is drawn too often, from 0 (not at all) to 1 (wholly)."""
    importance_steps: int | None = None
    """Steps over which importance_exponent rises to 1, in a line; None keeps it."""
    normalize_observations: bool = False
    """Scale observations to mean 0 and standard deviation 1, as far as they are known."""
    normalize_rewards: bool = False
    """Divide rewards by the standard deviation of their discounted sum, as far as it is known."""

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "hidden_sizes", checked_sizes("hidden_sizes", self.hidden_sizes))
        for name in (
            "buffer_size",
            "batch_size",
            "train_interval",
            "target_update_interval",
            "exploration_repeat",
        ):
            check_int(name, getattr(self, name), least=1)
        for name in ("learning_starts", "exploration_steps"):
            check_int(name, getattr(self, name), least=0)
        if self.importance_steps is not None:
            check_int("importance_steps", self.importance_steps, least=1)
        for name in ("gamma", "epsilon_start", "epsilon_end", "priority_exponent", "importance_exponent"):
            check_fraction(name, getattr(self, name))
        check_fraction("tau", self.tau, above_zero=True)
        check_positive("learning_rate", self.learning_rate)
        check("loss", self.loss, self.loss in ("huber", "mse"), "'huber' or 'mse'")
        check("network", self.network, self.network in ("cnn", "mlp"), "'cnn' or 'mlp'")
        check_positive("max_grad_norm", self.max_grad_norm, otherwise=", or None")
        if self.buffer_size < self.batch_size:
            raise InvalidValueError(
                f"buffer_size={self.buffer_size} is smaller than batch_size={self.batch_size}: "
                "enlarge the buffer or take smaller batches."
            )


class DQNState(NamedTuple):
    """All that DQN knows: what a checkpoint's ``state`` holds.

    Attributes:
        params: the online Q-network.
        target_params: the target Q-network.
        opt_state: the state of the optimiser.
        obs_stats: of the observations, which are scaled by them; None unless ``normalize_observations``.
        step: environment steps taken while exploring, int32.
        updates: updates made, int32.
        key: a typed PRNG key, from which exploration draws.
    """

    params: Network
    target_params: Network
    opt_state: optax.OptState
    obs_stats: RunningStats | None
    step: Array
    updates: Array
    key: Array


class DQN:
    """DQN as pure functions; ``config`` is static under jit, everything else may be traced."""

    @staticmethod
    def init(key: Array, obs_shape: Sequence[int], n_actions: int, *, config: DQNConfig) -> DQNState:
        """Return a new state, every leaf of which is a strongly typed array.

        Args:
            key: a PRNG key, typed or raw; the state keeps a typed one either way.
            obs_shape: the shape of one observation.
            n_actions: how many discrete actions there are.
            config: the hyperparameters.
        """
        check_int("n_actions", n_actions, least=1)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        net_key, key = jax.random.split(key)
        params = make_network(
            config.network,
            net_key,
            input_shape=obs_shape,
            hidden_sizes=config.hidden_sizes,
            output_size=n_actions,
        )
        return DQNState(
            params=params,
            target_params=jax.tree.map(jnp.copy, params),
            opt_state=_optimizer(config).init(eqx.filter(params, eqx.is_array)),
            obs_stats=RunningStats.create(obs_shape) if config.normalize_observations else None,
            step=jnp.zeros((), jnp.int32),
            updates=jnp.zeros((), jnp.int32),
            key=key,
        )

    @staticmethod
    def epsilon(step: Array, *, config: DQNConfig) -> Array:
        """Return the share of random actions at an absolute environment step."""
        share = jnp.minimum(step.astype(jnp.float32) / max(config.exploration_steps, 1), 1.0)
        if config.exploration_steps == 0:
            share = jnp.ones_like(share)
        return config.epsilon_start + share * (config.epsilon_end - config.epsilon_start)

    @staticmethod
    def importance(step: Array, *, config: DQNConfig) -> Array:
        """Return the exponent of the importance weights at an absolute environment step."""
        if config.importance_steps is None:
            return jnp.asarray(config.importance_exponent, jnp.float32)
        share = jnp.minimum(step.astype(jnp.float32) / config.importance_steps, 1.0)
        exponent: Array = config.importance_exponent + share * (1 - config.importance_exponent)
        return exponent

    @staticmethod
    def act(
        state: DQNState, obs: Array, *, config: DQNConfig, explore: bool = True
    ) -> tuple[Array, DQNState]:
        """Choose actions for one observation, or for each of a batch.

        Args:
            state: the state.
            obs: shape ``(*obs_shape)`` or ``(batch, *obs_shape)``.
            config: the hyperparameters.
            explore: take random actions, at the share that :meth:`epsilon` gives for ``state.step``; static.

        Returns:
            The actions, int32 of shape ``()`` or ``(batch,)``, and the state: the same one without
            exploration, otherwise with its key advanced, its step raised by the number of actions, and the
            observations counted among those that it knows.
        """
        q_values = state.params(normalized(obs, state.obs_stats))
        greedy = jnp.argmax(q_values, axis=-1).astype(jnp.int32)
        if not explore:
            return greedy, state
        key, draw_key = jax.random.split(state.key)
        # One draw for both: each further one costs as much as the forward pass of a small network. A product
        # of a float32 below 1 stays below n_actions.
        coin, choice = jax.random.uniform(draw_key, (2, *greedy.shape), jnp.float32)
        random = (choice * q_values.shape[-1]).astype(jnp.int32)
        if config.exploration_repeat > 1:  # the same key draws the same again
            turn = state.step // greedy.size + 1
            key = jnp.where(turn % config.exploration_repeat == 0, key, state.key)
        action = jnp.where(coin < DQN.epsilon(state.step, config=config), random, greedy)
        obs_stats = None if state.obs_stats is None else state.obs_stats.update(obs)
        return action, state._replace(key=key, step=state.step + greedy.size, obs_stats=obs_stats)

    @staticmethod
    def update(state: DQNState, batch: Transition, *, config: DQNConfig) -> tuple[DQNState, dict[str, Array]]:
        """Take one gradient step, and move the target network where it is due.

        Args:
            state: the state.
            batch: transitions, each leaf with one batch dimension in front.
            config: the hyperparameters.

        Returns:
            The new state, and the metrics ``loss`` and ``q_mean`` (the mean value of the batch's actions).
        """
        state, metrics, _ = DQN.update_weighted(state, batch, None, config=config)
        return state, metrics

    @staticmethod
    def update_weighted(
        state: DQNState, batch: Transition, weights: Array | None, *, config: DQNConfig
    ) -> tuple[DQNState, dict[str, Array], Array]:
        """Do what :meth:`update` does with transitions that count differently, and tell their errors.

        Args:
            state: the state.
            batch: transitions, each leaf with one batch dimension in front.
            weights: what the loss of each is multiplied by, float32 of shape ``(batch,)``; None counts all
                alike.
            config: the hyperparameters.

        Returns:
            The new state; the metrics ``loss`` (the weighted one) and ``q_mean``; and of each transition the
            temporal-difference error before the step, its value less its target, float32, ``(batch,)``.
        """
        targets = DQN.targets(state, batch, config=config)
        obs = normalized(batch.obs, state.obs_stats)

        def loss_of(params: Network) -> tuple[Array, tuple[Array, Array]]:
            q_values = _pick(params(obs), batch.action)
            each = (optax.huber_loss if config.loss == "huber" else optax.l2_loss)(q_values, targets)
            loss = jnp.mean(each if weights is None else weights * each)
            return loss, (jnp.mean(q_values), q_values - targets)

        (loss, (q_mean, errors)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        changes, opt_state = _optimizer(config).update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        updates = state.updates + 1
        due = updates % config.target_update_interval == 0

        def move(target: Array, online: Array) -> Array:
            moved = online if config.tau == 1 else target + config.tau * (online - target)
            return jnp.where(due, moved, target)

        target_params = jax.tree.map(move, state.target_params, params)
        state = state._replace(
            params=params, target_params=target_params, opt_state=opt_state, updates=updates
        )
        return state, {"loss": loss, "q_mean": q_mean}, errors

    @staticmethod
    def targets(state: DQNState, batch: Transition, *, config: DQNConfig) -> Array:
        """Return ``reward + gamma * (1 - terminated) * Q(next_obs)``; a time limit is no end."""
        next_obs = normalized(batch.next_obs, state.obs_stats)
        next_values = state.target_params(next_obs)
        chooser = state.params(next_obs) if config.double else next_values
        value = _pick(next_values, jnp.argmax(chooser, axis=-1))
        goes_on = jnp.logical_not(batch.terminated)
        targets: Array = jax.lax.stop_gradient(batch.reward + config.gamma * goes_on * value)
        return targets


def _optimizer(config: DQNConfig) -> optax.GradientTransformation:
    adam = optax.adam(config.learning_rate)
    if config.max_grad_norm is not None:
        adam = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)
    # One vector of all parameters: fewer and larger kernels, and fewer leaves to save.
    return optax.flatten(adam)


def _pick(q_values: Array, action: Array) -> Array:
    chosen = action[:, None] == jnp.arange(q_values.shape[-1])
    picked: Array = jnp.sum(jnp.where(chosen, q_values, 0), axis=-1)
    return picked
