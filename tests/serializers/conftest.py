"""What the tests of serializers share: trees, a comparison that sees every bit, and a verifying source."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

from vibe_store.interfaces import PyTree
from vibe_store.registry import get_serializer
from vibe_store.testing import trees
from vibe_store.testing.saving import FolderSource, Through


def _optimisers() -> PyTree:
    params = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)))
    masked = optax.masked(optax.sgd(0.1, momentum=0.9), {"w": True, "b": False})
    return {"chain": chain.init(params), "masked": masked.init({"w": jnp.ones(2), "b": jnp.ones(1)})}


@pytest.fixture(scope="session")
def assert_same() -> Callable[[PyTree, PyTree], None]:
    """Return a function that compares two trees bit for bit."""
    return trees.assert_same


@pytest.fixture(scope="session")
def folder_source() -> type[FolderSource]:
    """Return a source that reads a saved item where it was saved."""
    return FolderSource


@pytest.fixture(params=["eqx", "orbax"], scope="session")
def through(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Through:
    """Each serializer in turn."""
    if request.param == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    return Through(get_serializer(request.param), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def optimisers() -> PyTree:
    """The states of optimisers of optax."""
    return _optimisers()


@pytest.fixture(params=[*trees.TREES, "optimisers"])
def tree(request: pytest.FixtureRequest) -> PyTree:
    """Each of the trees that every serializer must store, and the states of optimisers."""
    return _optimisers() if request.param == "optimisers" else trees.TREES[request.param](frozenset())


@pytest.fixture(scope="session")
def any_tree() -> Any:
    """A strategy for trees of every kind of leaf and node."""
    return trees.any_tree()


@pytest.fixture(scope="session")
def nodes() -> dict[str, type[Any]]:
    """Node types by name: Point, Pair and Model."""
    return {"Point": trees.Point, "Pair": trees.Pair, "Model": trees.Model}
