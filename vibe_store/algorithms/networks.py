"""The networks of the algorithms, as Equinox modules that take one observation or a batch of them."""

from collections.abc import Callable, Sequence
from math import prod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.errors import InvalidValueError

__all__ = ["MLP"]


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
    ) -> None:
        """Draw the weights, uniformly within ``1 / sqrt(inputs)`` of zero, as Equinox does.

        Args:
            key: a PRNG key.
            input_shape: the shape of one observation.
            hidden_sizes: the width of each hidden layer.
            output_size: the number of outputs.
            activation: what follows each hidden layer.
        """
        self.input_shape = tuple(input_shape)
        self.activation = activation
        sizes = (prod(self.input_shape), *hidden_sizes, output_size)
        keys = jax.random.split(key, len(sizes) - 1)
        self.layers = tuple(
            eqx.nn.Linear(inputs, outputs, dtype=jnp.float32, key=layer_key)
            for inputs, outputs, layer_key in zip(sizes[:-1], sizes[1:], keys, strict=True)
        )

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


def _affine(layer: eqx.nn.Linear, x: Array) -> Array:
    assert layer.bias is not None  # noqa: S101 - every layer above is made with a bias; this tells the type checker
    y: Array = x @ layer.weight.T + layer.bias
    return y
