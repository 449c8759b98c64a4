"""DQN the way PureJaxRL writes it: one ``lax.scan`` over all steps, on a flat buffer of flashbax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import gymnax
import jax
import jax.numpy as jnp
import optax
from gymnax.wrappers.compat import LegacyStepAPIWrapper
from jax import Array

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.algorithms.networks import MLP

__all__ = ["scan_dqn"]


class _Step(NamedTuple):
    obs: Any
    action: Any
    reward: Any
    done: Any


class _Agent(NamedTuple):
    params: Any
    target: Any
    opt_state: Any


def scan_dqn(env_id: str, config: DQNConfig, *, num_envs: int, steps: int) -> Callable[[Array], Any]:
    """Return a function that trains from a PRNG key, to be compiled whole.

    Args:
        env_id: gymnax's name of the environment.
        config: the hyperparameters, without what is not in PureJaxRL: its loss is the mean of squares, its
            target network is copied, and one update follows each step of all environments.
        num_envs: how many environments.
        steps: environment steps in all.
    """
    inner, env_params = gymnax.make(env_id)
    env = LegacyStepAPIWrapper(inner)
    n_actions = inner.action_space(env_params).n
    obs_size = inner.observation_space(env_params).shape[0]
    optimizer = optax.adam(config.learning_rate)
    buffer = flashbax.make_flat_buffer(
        max_length=config.buffer_size,
        min_length=config.batch_size,
        sample_batch_size=config.batch_size,
        add_batch_size=num_envs,
    )

    def act(params: Any, obs: Array, key: Array, step: Array) -> Array:
        share = jnp.minimum(step / config.exploration_steps, 1)
        epsilon = config.epsilon_start + share * (config.epsilon_end - config.epsilon_start)
        coin_key, choice_key = jax.random.split(key)
        random = jax.random.randint(choice_key, (num_envs,), 0, n_actions)
        greedy = jnp.argmax(params(obs), axis=-1)
        return jnp.where(jax.random.uniform(coin_key, (num_envs,)) < epsilon, random, greedy)

    def learn(agent: _Agent, held: Any, key: Array) -> _Agent:
        pair = buffer.sample(held, key).experience
        best = jnp.max(agent.target(pair.second.obs), axis=-1)
        targets = pair.first.reward + (1 - pair.first.done) * config.gamma * best

        def loss(params: Any) -> Array:
            values = jnp.take_along_axis(params(pair.first.obs), pair.first.action[:, None], 1)
            return jnp.mean((values[:, 0] - targets) ** 2)

        slopes = jax.grad(loss)(agent.params)
        changes, opt_state = optimizer.update(slopes, agent.opt_state)
        return agent._replace(params=optax.apply_updates(agent.params, changes), opt_state=opt_state)

    def train(key: Array) -> Any:
        net_key, reset_key, key = jax.random.split(key, 3)
        params = MLP(
            net_key, input_shape=(obs_size,), hidden_sizes=config.hidden_sizes, output_size=n_actions
        )
        obs, env_state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, num_envs), env_params)
        example = _Step(obs[0], jnp.int32(0), jnp.float32(0), jnp.bool_(False))
        agent = _Agent(params, params, optimizer.init(params))

        def one(carry: Any, _: None) -> tuple[Any, None]:
            agent, held, obs, env_state, key, step = carry
            key, act_key, env_key, batch_key = jax.random.split(key, 4)
            action = act(agent.params, obs, act_key, step).astype(jnp.int32)
            next_obs, env_state, reward, done, _ = jax.vmap(env.step, (0, 0, 0, None))(
                jax.random.split(env_key, num_envs), env_state, action, env_params
            )
            held = buffer.add(held, _Step(obs, action, reward.astype(jnp.float32), done.astype(jnp.bool_)))
            step = step + num_envs
            agent = jax.lax.cond(
                (step > config.learning_starts) & buffer.can_sample(held),
                lambda: learn(agent, held, batch_key),
                lambda: agent,
            )
            due = step % (config.target_update_interval * num_envs) == 0
            target = jax.tree.map(lambda new, old: jnp.where(due, new, old), agent.params, agent.target)
            return (agent._replace(target=target), held, next_obs, env_state, key, step), None

        begin = (agent, buffer.init(example), obs, env_state, key, jnp.int32(0))
        (agent, *_), _ = jax.lax.scan(one, begin, length=steps // num_envs)
        return agent.params

    return train
