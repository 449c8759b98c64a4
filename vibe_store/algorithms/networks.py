"""The networks of the algorithms, as Equinox modules that take one observation or a batch of them."""

from collections.abc import Callable, Sequence
from math import prod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.errors import InvalidValueError

__all__ = ["MLP", "TwinCritic"]


class MLP(eqx.Module):
    """A multilayer perceptron over observations of any shape, which are flattened and cast to float32.

    Every leaf is an array: the shape of an observation and the activation belong to the structure.
    """

    layers: tuple[eqx.nn.Linear, ...]
    input_shape: tuple[int, ...] = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        key: Array,
        *,
        input_shape: Sequence[int],
        hidden_sizes: Sequence[int],
        output_size: int,
        activation: Callable[[Array], Array] = jax.nn.relu,
        gains: tuple[float, float] | None = None,
    ) -> None:
        """Draw the weights, uniformly within ``1 / sqrt(inputs)`` of zero, as Equinox does.

        Args:
            key: a PRNG key.
            input_shape: the shape of one observation.
            hidden_sizes: the width of each hidden layer.
            output_size: the number of outputs.
            activation: what follows each hidden layer.
            gains: make the weights orthogonal and the biases zero instead, scaled by the first number in the
                hidden layers and by the second in the last one.
        """
        self.input_shape = tuple(input_shape)
        self.activation = activation
        sizes = (prod(self.input_shape), *hidden_sizes, output_size)
        keys = jax.random.split(key, len(sizes) - 1)
        layers = [
            eqx.nn.Linear(inputs, outputs, dtype=jnp.float32, key=layer_key)
            for inputs, outputs, layer_key in zip(sizes[:-1], sizes[1:], keys, strict=True)
        ]
        if gains is not None:
            scales = [gains[0]] * (len(layers) - 1) + [gains[1]]
            layers = [
                _orthogonal(layer, scale, layer_key)
                for layer, scale, layer_key in zip(layers, scales, keys, strict=True)
            ]
        self.layers = tuple(layers)

    def __call__(self, x: Array) -> Array:
        """Map ``x`` of shape ``(*batch, *input_shape)`` to float32 of shape ``(*batch, output_size)``."""
        x = jnp.asarray(x)
        n_batch = x.ndim - len(self.input_shape)
        if n_batch < 0 or x.shape[n_batch:] != self.input_shape:
            raise InvalidValueError(
                f"This network takes observations of shape {self.input_shape}, with or without batch "
                f"dimensions in front; it was given an array of shape {x.shape}."
            )
        x = x.reshape(*x.shape[:n_batch], prod(self.input_shape)).astype(jnp.float32)
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(_affine(layer, x))
        return _affine(last, x)


class TwinCritic(eqx.Module):
    """Two Q-networks of observations and continuous actions, the smaller value of which is believed."""

    first: MLP
    second: MLP

    def __init__(
        self, key: Array, *, obs_shape: Sequence[int], n_actions: int, hidden_sizes: Sequence[int]
    ) -> None:
        """Draw the weights of both, as :class:`MLP` does.

        Args:
            key: a PRNG key.
            obs_shape: the shape of one observation.
            n_actions: how many dimensions an action has.
            hidden_sizes: the width of each hidden layer.
        """
        input_shape = (prod(obs_shape) + n_actions,)
        self.first, self.second = (
            MLP(each, input_shape=input_shape, hidden_sizes=hidden_sizes, output_size=1)
            for each in jax.random.split(key)
        )

    def __call__(self, obs: Array, action: Array) -> Array:
        """Return both values, float32 of shape ``(2, batch)``, of a batch of observations and actions."""
        flat = obs.reshape(len(obs), -1).astype(jnp.float32)
        pairs = jnp.concatenate([flat, action], axis=-1)
        return jnp.stack([self.first(pairs)[:, 0], self.second(pairs)[:, 0]])


def _affine(layer: eqx.nn.Linear, x: Array) -> Array:
    assert layer.bias is not None  # noqa: S101 - every layer above is made with a bias; this tells the type checker
    y: Array = x @ layer.weight.T + layer.bias
    return y


def _orthogonal(layer: eqx.nn.Linear, scale: float, key: Array) -> eqx.nn.Linear:
    weight = jax.nn.initializers.orthogonal(scale)(key, layer.weight.shape, jnp.float32)
    made: eqx.nn.Linear = eqx.tree_at(
        lambda linear: (linear.weight, linear.bias), layer, (weight, jnp.zeros(weight.shape[0], jnp.float32))
    )
    return made
