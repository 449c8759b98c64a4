"""Soft actor-critic with a learned temperature (Haarnoja et al., 2018, arXiv:1812.05905)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from vibe_store.algorithms.networks import MLP, TwinCritic
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

__all__ = ["SAC", "SACConfig", "SACState"]

_LOG_STD = (-20.0, 2.0)
"""Within which the logarithm of the standard deviation is kept."""


@dataclass(frozen=True)
class SACConfig:
    """The hyperparameters of SAC. Steps are environment steps, summed over all environments."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Width of each hidden layer of the actor and of both critics."""
    actor_learning_rate: float = 3e-4
    """Step size of Adam for the actor."""
    critic_learning_rate: float = 1e-3
    """Step size of Adam for the critics."""
    temperature_learning_rate: float = 1e-3
    """Step size of Adam for the logarithm of the temperature."""
    gamma: float = 0.99
    """Discount factor, from 0 to 1."""
    tau: float = 0.005
    """How far the target critics move at each update, above 0 up to 1."""
    buffer_size: int = 100_000
    """Transitions that the replay buffer holds; rounded up to a multiple of the number of environments."""
    batch_size: int = 256
    """Transitions in each update."""
    learning_starts: int = 1_000
    """Steps before the first update, all of them with actions drawn uniformly within their bounds."""
    exploration_repeat: int = 1
    """Steps of each environment for which an action is held that was drawn before learning_starts. More than
    1 leads further away than single random actions do (with random durations: arXiv:2006.01782)."""
    train_interval: int = 1
    """Steps for each update; with more environments than this, several updates follow one step of all."""
    initial_temperature: float = 1.0
    """What the entropy is worth at first."""
    learn_temperature: bool = True
    """Adapt the temperature so that the entropy of the policy meets its target."""
    target_entropy: float | None = None
    """Entropy in nats of actions scaled to -1 to 1; None takes minus the number of action dimensions."""
    normalize_observations: bool = False
    """Scale observations to mean 0 and standard deviation 1, as far as they are known."""
    normalize_rewards: bool = False
    """Divide rewards by the standard deviation of their discounted sum, as far as it is known."""

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "hidden_sizes", checked_sizes("hidden_sizes", self.hidden_sizes))
        for name in ("buffer_size", "batch_size", "train_interval", "exploration_repeat"):
            check_int(name, getattr(self, name), least=1)
        check_int("learning_starts", self.learning_starts, least=0)
        for name in (
            "actor_learning_rate",
            "critic_learning_rate",
            "temperature_learning_rate",
            "initial_temperature",
        ):
            check_positive(name, getattr(self, name))
        check_fraction("gamma", self.gamma)
        check_fraction("tau", self.tau, above_zero=True)
        if self.target_entropy is not None:
            check("target_entropy", self.target_entropy, isfinite(self.target_entropy), "a number, or None")
        if self.buffer_size < self.batch_size:
            raise InvalidValueError(
                f"buffer_size={self.buffer_size} is smaller than batch_size={self.batch_size}: "
                "enlarge the buffer or take smaller batches."
            )


class SACState(NamedTuple):
    """All that SAC knows: what a checkpoint's ``state`` holds.

    Attributes:
        actor: gives the mean of a Gaussian and the logarithm of its standard deviation, ``2 * n_actions``.
        critics: two Q-networks.
        target_critics: their slow copies.
        log_temperature: the logarithm of what the entropy is worth, float32.
        actor_opt_state: the state of the actor's optimiser.
        critic_opt_state: that of the critics'.
        temperature_opt_state: that of the temperature's.
        obs_stats: of the observations, which are scaled by them; None unless ``normalize_observations``.
        action_scale: half of what each action can span, float32 of shape ``(n_actions,)``.
        action_bias: the middle of it.
        step: environment steps taken while exploring, int32.
        updates: updates made, int32.
        key: a typed PRNG key, from which exploration and updates draw.
    """

    actor: MLP
    critics: TwinCritic
    target_critics: TwinCritic
    log_temperature: Array
    actor_opt_state: optax.OptState
    critic_opt_state: optax.OptState
    temperature_opt_state: optax.OptState
    obs_stats: RunningStats | None
    action_scale: Array
    action_bias: Array
    step: Array
    updates: Array
    key: Array


class SAC:
    """SAC as pure functions; ``config`` is static under jit, everything else may be traced.

    An action is ``bias + scale * tanh(u)``, where ``u`` is drawn from the actor's Gaussian. Entropies and
    densities are those of ``tanh(u)``, so they mean the same whatever the bounds of the actions.
    """

    @staticmethod
    def init(key: Array, obs_shape: Sequence[int], n_actions: int, *, config: SACConfig) -> SACState:
        """Return a new state for actions from -1 to 1, every leaf of which is a strongly typed array.

        Args:
            key: a PRNG key, typed or raw; the state keeps a typed one either way.
            obs_shape: the shape of one observation.
            n_actions: how many dimensions an action has.
            config: the hyperparameters.
        """
        check_int("n_actions", n_actions, least=1)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        actor_key, critic_key, key = jax.random.split(key, 3)
        sizes = config.hidden_sizes
        actor = MLP(actor_key, input_shape=obs_shape, hidden_sizes=sizes, output_size=2 * n_actions)
        critics = TwinCritic(critic_key, obs_shape=obs_shape, n_actions=n_actions, hidden_sizes=sizes)
        log_temperature = jnp.log(jnp.float32(config.initial_temperature))
        return SACState(
            actor=actor,
            critics=critics,
            target_critics=jax.tree.map(jnp.copy, critics),
            log_temperature=log_temperature,
            actor_opt_state=_adam(config.actor_learning_rate).init(eqx.filter(actor, eqx.is_array)),
            critic_opt_state=_adam(config.critic_learning_rate).init(eqx.filter(critics, eqx.is_array)),
            temperature_opt_state=_adam(config.temperature_learning_rate).init(log_temperature),
            obs_stats=RunningStats.create(obs_shape) if config.normalize_observations else None,
            action_scale=jnp.ones(n_actions, jnp.float32),
            action_bias=jnp.zeros(n_actions, jnp.float32),
            step=jnp.zeros((), jnp.int32),
            updates=jnp.zeros((), jnp.int32),
            key=key,
        )

    @staticmethod
    def bounded(state: SACState, low: Array, high: Array) -> SACState:
        """Return the state for actions from ``low`` to ``high``, numbers or of shape ``(n_actions,)``."""
        low, high = (jnp.broadcast_to(jnp.float32(end), state.action_scale.shape) for end in (low, high))
        return state._replace(action_scale=(high - low) / 2, action_bias=(high + low) / 2)

    @staticmethod
    def act(
        state: SACState, obs: Array, *, config: SACConfig, explore: bool = True
    ) -> tuple[Array, SACState]:
        """Choose actions for one observation, or for each of a batch.

        Args:
            state: the state.
            obs: shape ``(*obs_shape)`` or ``(batch, *obs_shape)``.
            config: the hyperparameters.
            explore: draw from the policy (uniformly within the bounds until ``config.learning_starts``);
                otherwise take ``tanh`` of its mean. Static.

        Returns:
            The actions, float32 of shape ``(n_actions,)`` or ``(batch, n_actions)``, and the state: the same
            one without exploration, otherwise with its key advanced, its step raised by the number of
            actions, and the observations counted among those that it knows.
        """
        mean, log_std = _gaussian(state.actor, normalized(obs, state.obs_stats))
        if not explore:
            return state.action_bias + state.action_scale * jnp.tanh(mean), state
        key, draw_key = jax.random.split(state.key)
        noise = jax.random.normal(draw_key, mean.shape, jnp.float32)
        drawn = jnp.tanh(mean + jnp.exp(log_std) * noise)
        # One draw for both: erf(x / sqrt(2)) of a normal x is uniform from -1 to 1.
        uniform = jax.lax.erf(noise * 0.5**0.5)
        at_random, n_actions = state.step < config.learning_starts, mean.size // mean.shape[-1]
        squashed = jnp.where(at_random, uniform, drawn)
        if config.exploration_repeat > 1:  # the same key draws the same again
            turn, next_step = state.step // n_actions + 1, state.step + n_actions
            # Not the last one before learning starts: an update that follows would draw by that key too.
            held = (turn % config.exploration_repeat != 0) & (next_step < config.learning_starts)
            key = jnp.where(held, state.key, key)
        state = state._replace(
            obs_stats=None if state.obs_stats is None else state.obs_stats.update(obs),
            step=state.step + n_actions,
            key=key,
        )
        return state.action_bias + state.action_scale * squashed, state

    @staticmethod
    def update(state: SACState, batch: Transition, *, config: SACConfig) -> tuple[SACState, dict[str, Array]]:
        """Take one gradient step each for the critics, the actor and the temperature, in this order.

        With ``a = tanh(u)``, ``u ~ actor(s)`` and temperature ``t``, each a mean over the batch (equations 5,
        7 and 18 of the paper): of the critics half of ``(Q(s, a) - target)**2``, summed over both; of the
        actor ``t * log pi(a|s) - min Q(s, a)``; of the temperature ``-t * (log pi(a|s) + target_entropy)``.

        Args:
            state: the state.
            batch: transitions, each leaf with one batch dimension in front.
            config: the hyperparameters.

        Returns:
            The new state, and the metrics ``critic_loss``, ``actor_loss``, ``q_mean`` (of the batch's
            actions), ``entropy`` (in nats, of actions scaled to -1 to 1) and ``temperature``.
        """
        key, target_key, actor_key = jax.random.split(state.key, 3)
        temperature = jnp.exp(state.log_temperature)
        targets = SAC.targets(state, batch, target_key, config=config)
        obs = normalized(batch.obs, state.obs_stats)
        taken = (batch.action - state.action_bias) / state.action_scale

        def critic_loss_of(critics: TwinCritic) -> tuple[Array, Array]:
            q_values = critics(obs, taken)
            losses = optax.l2_loss(q_values, jnp.broadcast_to(targets, q_values.shape))
            return jnp.sum(jnp.mean(losses, axis=-1)), jnp.mean(q_values)

        (critic_loss, q_mean), slopes = jax.value_and_grad(critic_loss_of, has_aux=True)(state.critics)
        changes, critic_opt_state = _adam(config.critic_learning_rate).update(slopes, state.critic_opt_state)
        critics = optax.apply_updates(state.critics, changes)

        def actor_loss_of(actor: MLP) -> tuple[Array, Array]:
            action, log_density = _sample(actor, obs, actor_key)
            value = jnp.min(critics(obs, action), axis=0)
            return jnp.mean(temperature * log_density - value), -jnp.mean(log_density)

        (actor_loss, entropy), slopes = jax.value_and_grad(actor_loss_of, has_aux=True)(state.actor)
        changes, actor_opt_state = _adam(config.actor_learning_rate).update(slopes, state.actor_opt_state)
        actor = optax.apply_updates(state.actor, changes)

        log_temperature, temperature_opt_state = state.log_temperature, state.temperature_opt_state
        if config.learn_temperature:
            wanted = config.target_entropy
            wanted = -float(state.action_scale.size) if wanted is None else wanted
            slope = temperature * (entropy - wanted)
            change, temperature_opt_state = _adam(config.temperature_learning_rate).update(
                slope, temperature_opt_state
            )
            log_temperature = log_temperature + change

        target_critics = jax.tree.map(
            lambda target, online: target + config.tau * (online - target), state.target_critics, critics
        )
        state = state._replace(
            actor=actor,
            critics=critics,
            target_critics=target_critics,
            log_temperature=log_temperature,
            actor_opt_state=actor_opt_state,
            critic_opt_state=critic_opt_state,
            temperature_opt_state=temperature_opt_state,
            updates=state.updates + 1,
            key=key,
        )
        return state, {
            "critic_loss": critic_loss,
            "actor_loss": actor_loss,
            "q_mean": q_mean,
            "entropy": entropy,
            "temperature": temperature,
        }

    @staticmethod
    def targets(state: SACState, batch: Transition, key: Array, *, config: SACConfig) -> Array:
        """Return ``reward + gamma * (1 - terminated) * (min Q'(next_obs, a) - temperature * log pi(a))``.

        The action ``a`` is drawn by ``key`` from the policy at ``next_obs``; a time limit is no end.
        """
        next_obs = normalized(batch.next_obs, state.obs_stats)
        action, log_density = _sample(state.actor, next_obs, key)
        value = jnp.min(state.target_critics(next_obs, action), axis=0)
        value -= jnp.exp(state.log_temperature) * log_density
        goes_on = jnp.logical_not(batch.terminated)
        targets: Array = jax.lax.stop_gradient(batch.reward + config.gamma * goes_on * value)
        return targets


def _adam(learning_rate: float) -> optax.GradientTransformation:
    # One vector of all parameters: fewer and larger kernels, and fewer leaves to save.
    return optax.flatten(optax.adam(learning_rate))


def _gaussian(actor: MLP, obs: Array) -> tuple[Array, Array]:
    mean, log_std = jnp.split(actor(obs), 2, axis=-1)
    return mean, jnp.clip(log_std, *_LOG_STD)


def _sample(actor: MLP, obs: Array, key: Array) -> tuple[Array, Array]:
    """Draw actions from -1 to 1, and return them with the logarithms of their densities."""
    mean, log_std = _gaussian(actor, obs)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    u = mean + jnp.exp(log_std) * noise
    # log(1 - tanh(u)**2), written so that it stays finite.
    log_slope = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    log_density = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi) - log_slope
    return jnp.tanh(u), jnp.sum(log_density, axis=-1)
