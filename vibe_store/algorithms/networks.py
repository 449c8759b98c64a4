"""The networks of the algorithms, as Equinox modules that take one observation or a batch of them."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.errors import InvalidValueError

__all__ = [
    "CNN",
    "MLP",
    "Network",
    "NetworkKind",
    "TwinCritic",
    "check_network",
    "make_network",
    "observations",
]

NetworkKind: TypeAlias = Literal["mlp", "cnn"]
"""Hidden layers alone, or 3 by 3 convolutions before them, for images."""

_CHANNELS, _KERNEL = 16, 3


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
        x, batch = observations(x, self.input_shape)
        x = x.reshape(*batch, prod(self.input_shape)).astype(jnp.float32)
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(_affine(layer, x))
        return _affine(last, x)


class CNN(eqx.Module):
    """A small convolutional network over images, as Young & Tian (2019, arXiv:1903.03176) use on MinAtar.

    One convolution of 16 channels with 3 by 3 kernels and stride 1, without padding, and then hidden layers.
    The pixels are cast to float32 as they are: images of bytes from 0 to 255 are better scaled before.

    Every leaf is an array. ``convolution.weight`` has shape ``(16, 9 * channels)``: what each output channel
    takes from the pixels around it, row by row, and of each pixel its channels.
    """

    convolution: eqx.nn.Linear
    head: MLP
    input_shape: tuple[int, ...] = eqx.field(static=True)

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
        """Draw the weights, as :class:`MLP` does.

        Args:
            key: a PRNG key.
            input_shape: height, width and channels of one image.
            hidden_sizes: the width of each hidden layer after the convolution.
            output_size: the number of outputs.
            activation: what follows the convolution and each hidden layer.
            gains: those of :class:`MLP`; the convolution is a hidden layer.

        Raises:
            InvalidValueError: observations of this shape are no images, or smaller than a kernel.
        """
        check_network("cnn", input_shape)
        self.input_shape = tuple(input_shape)
        height, width, channels = self.input_shape
        layer_key, head_key = jax.random.split(key)
        layer = eqx.nn.Linear(_KERNEL**2 * channels, _CHANNELS, dtype=jnp.float32, key=layer_key)
        self.convolution = layer if gains is None else _orthogonal(layer, gains[0], layer_key)
        self.head = MLP(
            head_key,
            input_shape=(height - _KERNEL + 1, width - _KERNEL + 1, _CHANNELS),
            hidden_sizes=hidden_sizes,
            output_size=output_size,
            activation=activation,
            gains=gains,
        )

    def __call__(self, x: Array) -> Array:
        """Map ``x`` of shape ``(*batch, height, width, channels)`` to float32, ``(*batch, output_size)``."""
        x, _ = observations(x, self.input_shape)
        x = x.astype(jnp.float32)
        height, width, _ = self.head.input_shape
        # On a CPU, a convolution this small is several times faster as a product of matrices, also with the
        # weights of many seeds at once.
        pixels = [
            x[..., row : row + height, column : column + width, :]
            for row in range(_KERNEL)
            for column in range(_KERNEL)
        ]
        return self.head(self.head.activation(_affine(self.convolution, jnp.concatenate(pixels, axis=-1))))


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


Network: TypeAlias = MLP | CNN
"""What a configuration's ``network`` can name."""


def check_network(kind: NetworkKind, input_shape: Sequence[int]) -> None:
    """Refuse a network that cannot take observations of this shape."""
    if kind == "cnn" and (len(input_shape) != 3 or min(input_shape[:2]) < _KERNEL or input_shape[2] < 1):
        raise InvalidValueError(
            f"network='cnn' cannot be used: it takes images of shape (height, width, channels), at least "
            f"{_KERNEL} by {_KERNEL}, but observations have the shape {tuple(input_shape)}. Use "
            "network='mlp'."
        )


def make_network(
    kind: NetworkKind,
    key: Array,
    *,
    input_shape: Sequence[int],
    hidden_sizes: Sequence[int],
    output_size: int,
    activation: Callable[[Array], Array] = jax.nn.relu,
    gains: tuple[float, float] | None = None,
) -> Network:
    """Return a new network of one kind; the arguments are those of :class:`MLP` and :class:`CNN`."""
    made: type[MLP] | type[CNN] = CNN if kind == "cnn" else MLP
    return made(
        key,
        input_shape=input_shape,
        hidden_sizes=hidden_sizes,
        output_size=output_size,
        activation=activation,
        gains=gains,
    )


def observations(x: Array, shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Return observations as an array, and their batch dimensions; refuse those of another shape."""
    x = jnp.asarray(x)
    n_batch = x.ndim - len(shape)
    if n_batch < 0 or x.shape[n_batch:] != shape:
        raise InvalidValueError(
            f"This network takes observations of shape {shape}, with or without batch dimensions in front; "
            f"it was given an array of shape {x.shape}."
        )
    return x, x.shape[:n_batch]


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
