"""The convolutional network against loops in NumPy, and in the algorithms that can use it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.algorithms.dqn import DQN, DQNConfig
from vibe_store.algorithms.networks import CNN, MLP, make_network
from vibe_store.algorithms.ppo import PPO, PPOConfig
from vibe_store.algorithms.replay import Transition
from vibe_store.errors import InvalidValueError

SHAPE = (5, 4, 2)


@pytest.fixture(scope="module")
def cnn() -> CNN:
    return CNN(jax.random.key(0), input_shape=SHAPE, hidden_sizes=(6,), output_size=3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(np.float32)


def by_loops(cnn: CNN, image: np.ndarray) -> np.ndarray:
    weight, bias = np.asarray(cnn.convolution.weight), np.asarray(cnn.convolution.bias)
    maps = np.zeros((3, 2, 16))
    for row in range(3):
        for column in range(2):
            maps[row, column] = weight @ image[row : row + 3, column : column + 3].reshape(-1) + bias
    x = np.maximum(maps, 0).reshape(-1)
    first, last = cnn.head.layers
    x = np.maximum(np.asarray(first.weight) @ x + np.asarray(first.bias), 0)
    return np.asarray(last.weight) @ x + np.asarray(last.bias)


def test_it_is_a_convolution_then_a_hidden_layer(cnn: CNN, images: np.ndarray) -> None:
    expected = [by_loops(cnn, image) for image in images]
    np.testing.assert_allclose(cnn(images), expected, rtol=1e-4, atol=1e-5)
    assert cnn.convolution.weight.shape == (16, 9 * 2)


def test_it_takes_one_image_and_any_batch_dimensions(cnn: CNN, images: np.ndarray) -> None:
    batch = cnn(images)
    np.testing.assert_allclose(cnn(images[3]), batch[3], rtol=1e-4, atol=1e-5)
    twice = cnn(np.stack([images, images])[:, None])
    assert twice.shape == (2, 1, 7, 3)
    np.testing.assert_allclose(twice[1, 0], batch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8])
def test_images_of_bools_or_bytes_are_taken_as_numbers(cnn: CNN, dtype: Any) -> None:
    pixels = np.random.default_rng(1).integers(0, 2, size=SHAPE)
    np.testing.assert_array_equal(cnn(pixels.astype(dtype)), cnn(pixels.astype(np.float32)))


@pytest.mark.parametrize("gains", [None, (2**0.5, 0.01)])
def test_every_leaf_of_a_network_is_a_strongly_typed_float32_array(gains: Any) -> None:
    for kind, made in (("cnn", CNN), ("mlp", MLP)):
        network = make_network(
            kind, jax.random.key(0), input_shape=SHAPE, hidden_sizes=(6,), output_size=3, gains=gains
        )
        assert isinstance(network, made)
        leaves = jax.tree.leaves(network)
        assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in leaves)
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_gains_make_the_convolution_orthogonal_and_the_outputs_small() -> None:
    cnn = CNN(jax.random.key(0), input_shape=SHAPE, hidden_sizes=(6,), output_size=3, gains=(2**0.5, 0.01))
    weight = np.asarray(cnn.convolution.weight)
    np.testing.assert_allclose(weight @ weight.T, 2 * np.eye(16), atol=1e-5)
    np.testing.assert_array_equal(cnn.convolution.bias, np.zeros(16))
    last = np.asarray(cnn.head.layers[-1].weight)
    np.testing.assert_allclose(last @ last.T, 1e-4 * np.eye(3), atol=1e-8)


@pytest.mark.parametrize("shape", [(4,), (), (10, 10), (2, 10, 4), (10, 2, 4), (10, 10, 0)])
def test_observations_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidValueError, match=r"network='cnn' cannot be used: it takes images"):
        DQN.init(jax.random.key(0), obs_shape=shape, n_actions=2, config=DQNConfig(network="cnn"))


def test_an_image_of_another_shape_is_refused(cnn: CNN) -> None:
    with pytest.raises(InvalidValueError, match=r"observations of shape \(5, 4, 2\).*shape \(4, 5, 2\)"):
        cnn(np.zeros((4, 5, 2)))


def test_dqn_learns_through_the_convolution(images: np.ndarray) -> None:
    config = DQNConfig(network="cnn", hidden_sizes=(6,))
    state = DQN.init(jax.random.key(0), obs_shape=SHAPE, n_actions=3, config=config)
    batch = Transition(
        obs=jnp.asarray(images),
        action=jnp.zeros(7, jnp.int32),
        reward=jnp.ones(7, jnp.float32),
        next_obs=jnp.asarray(images),
        terminated=jnp.ones(7, jnp.bool_),
    )
    learned, _ = DQN.update(state, batch, config=config)
    moved = np.asarray(learned.params.convolution.weight != state.params.convolution.weight)
    assert moved.mean() > 0.5
    assert eqx.tree_equal(learned.target_params, state.target_params)


def test_ppo_has_a_convolution_in_its_actor_and_its_critic(images: np.ndarray) -> None:
    config = PPOConfig(network="cnn", hidden_sizes=(6,))
    state = PPO.init(jax.random.key(0), SHAPE, 3, config=config)
    action, _ = PPO.act(state, jnp.asarray(images), config=config, explore=False)
    assert action.shape == (7,)
    assert isinstance(state.params.critic, CNN)
    assert state.params.actor.head.activation is jax.nn.relu


@pytest.mark.parametrize("config", [DQNConfig, PPOConfig])
def test_an_unknown_network_is_refused(config: Any) -> None:
    with pytest.raises(InvalidValueError, match="network='rnn' cannot be used: it must be 'cnn' or 'mlp'"):
        config(network="rnn")
