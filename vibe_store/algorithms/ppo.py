"""Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347), as pure functions.

With generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from vibe_store.algorithms.networks import Network, NetworkKind, make_network
from vibe_store.algorithms.running_stats import RunningStats, normalized
from vibe_store.algorithms.settings import (
    check,
    check_fraction,
    check_int,
    check_kinds,
    check_positive,
    checked_sizes,
)
from vibe_store.algorithms.shuffle import shuffled
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree

__all__ = ["PPO", "ActorCritic", "PPOConfig", "PPOState", "Rollout"]

_AT_ONCE = 16
"""Steps of a rollout whose advantages are compiled into one piece."""


@dataclass(frozen=True)
class PPOConfig:
    """The hyperparameters of PPO. Steps are environment steps, summed over all environments."""

    network: NetworkKind = "mlp"
    """Actor and critic: mlp, or cnn (3 by 3 convolutions before the hidden layers), which take images."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Width of each hidden layer of the actor and of the critic."""
    learning_rate: float = 3e-4
    """Step size of Adam at the beginning."""
    anneal_steps: int | None = None
    """Steps over which the step size falls to zero, in a line; None keeps it."""
    gamma: float = 0.99
    """Discount factor, from 0 to 1."""
    gae_lambda: float = 0.95
    """How far advantages look ahead, from 0 (one step) to 1 (to the end)."""
    rollout_length: int = 128
    """Steps of each environment between two rounds of learning."""
    n_epochs: int = 4
    """How often each round goes through all that was just collected."""
    n_minibatches: int = 4
    """Into how many parts it is split each time; must divide rollout_length times the environments."""
    clip_range: float = 0.2
    """How far the probability of an action may move, as a share of what it was."""
    clip_values: bool = False
    """Clip the critic's movement in the same way, as the first implementation did."""
    normalize_advantages: bool = True
    """Scale the advantages of each minibatch to mean 0 and standard deviation 1."""
    entropy_coefficient: float = 0.01
    """What the entropy of the policy is worth in the loss."""
    value_coefficient: float = 0.5
    """What the critic's loss counts for."""
    max_grad_norm: float | None = 0.5
    """Norm to which gradients are clipped; None leaves them alone."""
    normalize_observations: bool = False
    """Scale observations to mean 0 and standard deviation 1, as far as they are known from earlier rounds."""
    normalize_rewards: bool = False
    """Divide rewards by the standard deviation of their discounted sum, as far as it is known."""

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "hidden_sizes", checked_sizes("hidden_sizes", self.hidden_sizes))
        for name in ("rollout_length", "n_epochs", "n_minibatches"):
            check_int(name, getattr(self, name), least=1)
        if self.anneal_steps is not None:
            check_int("anneal_steps", self.anneal_steps, least=1)
        for name in ("gamma", "gae_lambda"):
            check_fraction(name, getattr(self, name))
        for name in ("learning_rate", "clip_range"):
            check_positive(name, getattr(self, name))
        for name in ("entropy_coefficient", "value_coefficient"):
            if getattr(self, name) != 0:
                check_positive(name, getattr(self, name), otherwise=", or 0")
        check_positive("max_grad_norm", self.max_grad_norm, otherwise=", or None")
        check("network", self.network, self.network in ("cnn", "mlp"), "'cnn' or 'mlp'")


class ActorCritic(eqx.Module):
    """The policy and the value function, which share nothing.

    Attributes:
        actor: gives the logits of discrete actions, or the mean of a Gaussian over continuous ones.
        critic: gives the value of an observation.
        log_std: the logarithm of the Gaussian's standard deviation, float32 of shape ``(n_actions,)``; None
            where actions are discrete.
    """

    actor: Network
    critic: Network
    log_std: Array | None


class PPOState(NamedTuple):
    """All that PPO knows: what a checkpoint's ``state`` holds.

    Attributes:
        params: the networks.
        opt_state: the state of the optimiser.
        obs_stats: of the observations, which are scaled by them; None unless ``normalize_observations``.
        action_scale: half of what each continuous action can span, float32 of shape ``(n_actions,)``; None
            where actions are discrete.
        action_bias: the middle of it, or None.
        step: environment steps taken while exploring, int32.
        updates: gradient steps made, int32.
        key: a typed PRNG key, from which exploration and updates draw.
    """

    params: ActorCritic
    opt_state: optax.OptState
    obs_stats: RunningStats | None
    action_scale: Array | None
    action_bias: Array | None
    step: Array
    updates: Array
    key: Array


class Rollout(NamedTuple):
    """``T`` steps of ``N`` environments; every array has ``(T, N)`` in front.

    Attributes:
        obs: the observations acted on.
        choice: what was drawn there: an int32 action, or the float32 sample of the Gaussian.
        log_density: the logarithm of its probability, or density, at that time.
        reward: what it earned, float32.
        next_obs: the observations that followed: the last one of the episode where it ended, and otherwise
            ``obs`` of the next step.
        terminated: whether the episode came to a natural end, bool.
        done: whether it ended at all, by a time limit too, bool.
    """

    obs: Any
    choice: Any
    log_density: Any
    reward: Any
    next_obs: Any
    terminated: Any
    done: Any


class _Lesson(NamedTuple):
    """What a minibatch is taken from; every array has the number of steps in front."""

    obs: Array
    choice: Array
    log_density: Array
    value: Array
    advantage: Array
    target: Array


class PPO:
    """PPO as pure functions; ``config`` is static under jit, everything else may be traced.

    A continuous action is drawn from a Gaussian over -1 to 1, clipped to that, and scaled to its bounds.
    """

    @staticmethod
    def init(
        key: Array, obs_shape: Sequence[int], n_actions: int, *, config: PPOConfig, continuous: bool = False
    ) -> PPOState:
        """Return a new state, every leaf of which is a strongly typed array.

        The weights are orthogonal, and those of the actor's last layer small, so that it begins undecided.

        Args:
            key: a PRNG key, typed or raw; the state keeps a typed one either way.
            obs_shape: the shape of one observation.
            n_actions: how many discrete actions there are, or how many dimensions a continuous one has.
            config: the hyperparameters.
            continuous: whether actions are vectors, from -1 to 1 unless :meth:`bounded` says otherwise.
        """
        check_int("n_actions", n_actions, least=1)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        actor_key, critic_key, key = jax.random.split(key, 3)

        def network(network_key: Array, output_size: int, output_gain: float) -> Network:
            return make_network(
                config.network,
                network_key,
                input_shape=obs_shape,
                hidden_sizes=config.hidden_sizes,
                output_size=output_size,
                activation=jax.nn.tanh if config.network == "mlp" else jax.nn.relu,
                gains=(2**0.5, output_gain),
            )

        zeros = jnp.zeros(n_actions, jnp.float32) if continuous else None
        params = ActorCritic(network(actor_key, n_actions, 0.01), network(critic_key, 1, 1.0), zeros)
        return PPOState(
            params=params,
            opt_state=_optimizer(config).init(eqx.filter(params, eqx.is_array)),
            obs_stats=RunningStats.create(obs_shape) if config.normalize_observations else None,
            action_scale=jnp.ones(n_actions, jnp.float32) if continuous else None,
            action_bias=None if zeros is None else jnp.copy(zeros),
            step=jnp.zeros((), jnp.int32),
            updates=jnp.zeros((), jnp.int32),
            key=key,
        )

    @staticmethod
    def bounded(state: PPOState, low: Array, high: Array) -> PPOState:
        """Return the state for actions from ``low`` to ``high``, numbers or of shape ``(n_actions,)``.

        Raises:
            InvalidValueError: the state is one for discrete actions.
        """
        if state.action_scale is None:
            raise InvalidValueError(
                "Discrete actions have no bounds: make the state by PPO.init(..., continuous=True)."
            )
        low, high = (jnp.broadcast_to(jnp.float32(end), state.action_scale.shape) for end in (low, high))
        return state._replace(action_scale=(high - low) / 2, action_bias=(high + low) / 2)

    @staticmethod
    def act(
        state: PPOState, obs: Array, *, config: PPOConfig, explore: bool = True
    ) -> tuple[Array, PPOState]:
        """Choose actions for one observation, or for each of a batch.

        Args:
            state: the state.
            obs: shape ``(*obs_shape)`` or ``(batch, *obs_shape)``.
            config: the hyperparameters.
            explore: draw from the policy; otherwise take its likeliest action. Static.

        Returns:
            The actions (int32 of shape ``()`` or ``(batch,)``, or float32 with ``n_actions`` at the end), and
            the state: the same one without exploration, otherwise with its key advanced and its step raised
            by the number of actions.
        """
        if explore:
            choice, _, state = PPO.draw(state, obs, config=config)
        else:
            output = state.params.actor(normalized(obs, state.obs_stats))
            choice = output if state.params.log_std is not None else jnp.argmax(output, -1).astype(jnp.int32)
        return PPO.action_of(state, choice), state

    @staticmethod
    def draw(state: PPOState, obs: Array, *, config: PPOConfig) -> tuple[Array, Array, PPOState]:
        """Draw from the policy: what a rollout keeps of an action, and the logarithm of its density.

        Args:
            state: the state.
            obs: shape ``(*obs_shape)`` or ``(batch, *obs_shape)``.
            config: the hyperparameters.

        Returns:
            The choice, of which :meth:`action_of` makes an action; the logarithm of its probability or
            density; and the state with its key advanced and its step raised by the number of choices.
        """
        del config  # the networks hold all that is needed
        key, draw_key = jax.random.split(state.key)
        output, log_std = state.params.actor(normalized(obs, state.obs_stats)), state.params.log_std
        if log_std is None:
            choice = jax.random.categorical(draw_key, output).astype(jnp.int32)
        else:
            choice = output + jnp.exp(log_std) * jax.random.normal(draw_key, output.shape, jnp.float32)
        log_density, _ = _judged(output, log_std, choice)
        return choice, log_density, state._replace(key=key, step=state.step + log_density.size)

    @staticmethod
    def action_of(state: PPOState, choice: Array) -> Array:
        """Return the actions that choices stand for: themselves, or within the bounds of continuous ones."""
        if state.action_scale is None or state.action_bias is None:
            return choice
        return state.action_bias + state.action_scale * jnp.clip(choice, -1, 1)

    @staticmethod
    def update(state: PPOState, rollout: Rollout, *, config: PPOConfig) -> tuple[PPOState, dict[str, Array]]:
        """Learn from a rollout: ``n_epochs`` times through all of it, in ``n_minibatches`` parts.

        With the ratio ``r`` of an action's probability to what it was, its advantage ``A`` and the clip range
        ``c``, the loss of a minibatch is the mean of ``-min(r * A, clip(r, 1 - c, 1 + c) * A)`` (equation 7
        of the paper), plus ``value_coefficient`` times half of ``(V - target)**2``, less
        ``entropy_coefficient`` times the entropy of the policy.

        Args:
            state: the state.
            rollout: what it did, with no update in between.
            config: the hyperparameters.

        Returns:
            The new state, and the means over all minibatches of ``policy_loss``, ``value_loss``, ``entropy``
            (in nats), ``clipped`` (the share of ratios beyond the range) and ``kl`` (how far the
            policy moved, in nats).

        Raises:
            InvalidValueError: the rollout cannot be split into so many parts.
        """
        n_steps = rollout.reward.size
        if n_steps % config.n_minibatches:
            raise InvalidValueError(
                f"n_minibatches={config.n_minibatches} cannot be used: it must divide the {n_steps} steps "
                "that rollout_length and the number of environments give."
            )
        value, advantage = PPO.advantages(state, rollout, config=config)
        seen, target = normalized(rollout.obs, state.obs_stats), advantage + value
        steps = _Lesson(seen, rollout.choice, rollout.log_density, value, advantage, target)
        lesson = jax.tree.map(lambda leaf: leaf.reshape(n_steps, *leaf.shape[2:]), steps)
        rate = _learning_rate(state.step - n_steps, config)
        key, shuffle_key = jax.random.split(state.key)

        def epoch(carry: PyTree, epoch_key: Array) -> tuple[PyTree, PyTree]:
            order = shuffled(epoch_key, n_steps).reshape(config.n_minibatches, -1)
            return jax.lax.scan(minibatch, carry, order)

        def minibatch(carry: PyTree, index: Array) -> tuple[PyTree, PyTree]:
            params, opt_state = carry
            part = jax.tree.map(lambda leaf: leaf.at[index].get(mode="promise_in_bounds"), lesson)
            slopes, metrics = jax.grad(_loss, has_aux=True)(params, part, config)
            changes, opt_state = _optimizer(config).update(slopes, opt_state)
            params = jax.tree.map(lambda leaf, change: leaf - rate * change, params, changes)
            return (params, opt_state), metrics

        keys = jax.random.split(shuffle_key, config.n_epochs)
        (params, opt_state), metrics = jax.lax.scan(epoch, (state.params, state.opt_state), keys)
        state = state._replace(
            params=params,
            opt_state=opt_state,
            # Only now: within a round, the policy that learns sees what the one that acted saw.
            obs_stats=None if state.obs_stats is None else state.obs_stats.update(rollout.obs),
            updates=state.updates + config.n_epochs * config.n_minibatches,
            key=key,
        )
        return state, {name: jnp.mean(values) for name, values in metrics.items()}

    @staticmethod
    def advantages(state: PPOState, rollout: Rollout, *, config: PPOConfig) -> tuple[Array, Array]:
        """Return the value of each observation, and the advantage of what was done, both of shape ``(T, N)``.

        With ``delta = reward + gamma * (1 - terminated) * V(next_obs) - V(obs)``, the advantage of a step is
        ``delta + gamma * lambda * A'``, where ``A'`` is that of the step after it, and 0 where the episode
        ended (equation 16 of the second paper). A time limit is no natural end: what would have followed
        counts by its value.
        """

        def value_of(obs: Array) -> Array:
            values: Array = state.params.critic(normalized(obs, state.obs_stats))[..., 0]
            return values

        value = value_of(rollout.obs)
        # What follows a step is where the next one begins, except where a time limit came in between.
        next_value = jax.lax.cond(
            jnp.any(rollout.done[:-1] & ~rollout.terminated[:-1]),
            lambda: value_of(rollout.next_obs),
            lambda: jnp.concatenate([value[1:], value_of(rollout.next_obs[-1:])]),
        )
        goes_on = jnp.logical_not(rollout.terminated)
        delta = rollout.reward + config.gamma * goes_on * next_value - value
        carried = config.gamma * config.gae_lambda * jnp.logical_not(rollout.done)

        def back(following: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
            advantage = step[0] + step[1] * following
            return advantage, advantage

        # A step this small takes longer to begin than to compute.
        _, advantage = jax.lax.scan(
            back, jnp.zeros_like(delta[0]), (delta, carried), reverse=True, unroll=_AT_ONCE
        )
        return value, advantage


def _loss(params: ActorCritic, part: _Lesson, config: PPOConfig) -> tuple[Array, dict[str, Array]]:
    log_density, entropy = _judged(params.actor(part.obs), params.log_std, part.choice)
    log_ratio = log_density - part.log_density
    ratio = jnp.exp(log_ratio)
    advantage = part.advantage
    if config.normalize_advantages:
        advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
    limited = jnp.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, limited * advantage))
    value = params.critic(part.obs)[..., 0]
    errors = optax.l2_loss(value, part.target)
    if config.clip_values:
        near = part.value + jnp.clip(value - part.value, -config.clip_range, config.clip_range)
        errors = jnp.maximum(errors, optax.l2_loss(near, part.target))
    value_loss, mean_entropy = jnp.mean(errors), jnp.mean(entropy)
    loss = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * mean_entropy
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": mean_entropy,
        "clipped": jnp.mean(jnp.abs(ratio - 1) > config.clip_range, dtype=jnp.float32),
        "kl": jnp.mean(ratio - 1 - log_ratio),
    }


def _judged(output: Array, log_std: Array | None, choice: Array) -> tuple[Array, Array]:
    """Return the logarithm of the density of choices, and the entropy of the policy, in nats."""
    if log_std is None:
        log_shares = jax.nn.log_softmax(output)
        chosen = choice[..., None] == jnp.arange(output.shape[-1])
        log_density = jnp.sum(jnp.where(chosen, log_shares, 0), axis=-1)
        return log_density, -jnp.sum(jnp.exp(log_shares) * log_shares, axis=-1)
    noise = (choice - output) * jnp.exp(-log_std)
    normal = 0.5 * jnp.log(2 * jnp.pi)
    log_density = jnp.sum(-0.5 * noise**2 - log_std - normal, axis=-1)
    return log_density, jnp.broadcast_to(jnp.sum(log_std + normal + 0.5), log_density.shape)


def _optimizer(config: PPOConfig) -> optax.GradientTransformation:
    """Everything but the step size, which depends on the environment step."""
    adam = optax.scale_by_adam(eps=1e-5)
    if config.max_grad_norm is not None:
        adam = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adam)
    # One vector of all parameters: fewer and larger kernels, and fewer leaves to save.
    return optax.flatten(adam)


def _learning_rate(step: Array, config: PPOConfig) -> Array:
    rate: Array = jnp.float32(config.learning_rate)
    if config.anneal_steps is None:
        return rate
    share: Array = jnp.clip(1 - step.astype(jnp.float32) / config.anneal_steps, 0, 1)
    return rate * share
