"""Generated trees of all that there is, and for each the templates that differ from it in one leaf."""

import dataclasses
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from vibe_store.interfaces import Leaf, PyTree
from vibe_store.serializers.tree import describe
from vibe_store.testing.trees import IMPLS, any_tree

__all__ = ["Agent", "ReorderedAgent", "agent_trees", "mutations"]

_OF_ONE_FAMILY = {"numpy": "array", "numpy_scalar": "array"}

Mutation: TypeAlias = tuple[str, PyTree, set[str]]
"""How a template differs from a tree, the template, and the paths that the refusal has to name."""


class Agent(NamedTuple):
    """A root whose leaves have names."""

    params: Any
    rest: Any
    key: Any
    steps: Any


class ReorderedAgent(NamedTuple):
    """The same names in another order."""

    key: Any
    steps: Any
    params: Any
    rest: Any


class _Module(eqx.Module):
    params: Any
    rest: Any
    key: Any
    steps: Any


_ROOTS: list[Callable[..., Any]] = [
    Agent,
    _Module,
    lambda *parts: list(parts),
    lambda *parts: parts,
    lambda *parts: dict(zip(["params", "rest", "the key", "1"], parts, strict=True)),
]


@st.composite
def agent_trees(draw: st.DrawFn, refused: Set[str] = frozenset()) -> PyTree:
    """A tree with at least two arrays, a typed key and a number, and all else that there is."""
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8]))
    size = draw(st.integers(1, 3))
    weights = jnp.arange(3 * size).reshape(size, 3).astype(dtype)
    params = {"w": weights, "b": draw(st.sampled_from([np.ones(size), np.float32(size), jnp.ones(())]))}
    key = jax.random.key(draw(st.integers(0, 99)), impl=draw(st.sampled_from(IMPLS)))
    root = draw(st.sampled_from(_ROOTS))
    return root(params, draw(any_tree(refused)), key, draw(st.integers(0, 2**40)))


def mutations(tree: PyTree, pick: Callable[[list[Any]], Any]) -> Iterator[Mutation]:
    """Yield templates that differ from a tree in one leaf, which may be any of its leaves.

    Args:
        tree: one of :func:`agent_trees`.
        pick: chooses from a list.
    """
    leaves = _places(tree)
    params = leaves[next(i for i, place in enumerate(leaves) if place.path.endswith("['w']"))].keys[:-1]
    inside = keystr(params)
    yield "renamed", _put(tree, params, _renamed), {f"{inside}['w']", f"{inside}['weight']"}
    yield "added", _put(tree, params, lambda old: {**old, "new": jnp.zeros(3)}), {f"{inside}['new']"}
    yield "dropped", _put(tree, params, lambda old: {"b": old["b"]}), {f"{inside}['w']"}

    one = pick(leaves)
    yield "one level down", _put(tree, one.keys, lambda leaf: [leaf]), {one.path, f"{one.path}[0]"}
    yield "dropped", _put(tree, one.keys, lambda _: None), {one.path}
    yield "of another kind", _put(tree, one.keys, lambda _: _of_another_kind(one)), {one.path}

    other = pick([place for place in leaves if place.type != one.type])
    exchanged = _put(_put(tree, one.keys, lambda _: other.leaf), other.keys, lambda _: one.leaf)
    yield "reordered", exchanged, {one.path, other.path}

    array = pick([place for place in leaves if place.kind == "array"])
    shape = pick(_other_shapes(array.leaf.shape))
    yield "shape", _put(tree, array.keys, lambda _: _of_shape(array, shape)), {array.path}
    dtype = pick([each for each in (jnp.int8, jnp.float32, jnp.bfloat16) if each != array.leaf.dtype])
    yield "dtype", _put(tree, array.keys, lambda _: _of_shape(array, array.leaf.shape, dtype)), {array.path}

    key = pick([place for place in leaves if place.kind == "key"])
    yield "shape", _put(tree, key.keys, lambda _: _of_shape(key, (*key.leaf.shape, 1))), {key.path}
    impl = pick([impl for impl in IMPLS if impl != key.row.impl])
    other_type = jax.random.key(0, impl=impl).dtype
    changed = _put(tree, key.keys, lambda _: _of_shape(key, key.leaf.shape, other_type))
    yield "key implementation", changed, {key.path}


@dataclasses.dataclass(frozen=True)
class _Place:
    """One leaf of a tree: the keys that lead to it, its path, and its row of the leaf table."""

    keys: tuple[Any, ...]
    path: str
    row: Leaf
    leaf: Any

    @property
    def kind(self) -> str:
        return _OF_ONE_FAMILY.get(self.row.kind, self.row.kind)

    @property
    def type(self) -> Any:
        """What a template is compared by."""
        if self.kind in {"array", "key"}:
            return self.kind, self.row.dtype, self.row.shape, self.row.impl
        return self.kind


def _places(tree: PyTree) -> list[_Place]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [
        _Place(keys, keystr(keys), row, leaf) for (keys, leaf), row in zip(pairs, describe(tree), strict=True)
    ]


def _put(tree: Any, keys: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return the tree with the node that these keys lead to changed."""
    if not keys:
        return change(tree)
    key, *rest = keys
    if isinstance(key, GetAttrKey):
        new = {key.name: _put(getattr(tree, key.name), tuple(rest), change)}
        return tree._replace(**new) if hasattr(tree, "_replace") else dataclasses.replace(tree, **new)
    if isinstance(key, DictKey):
        return {**tree, key.key: _put(tree[key.key], tuple(rest), change)}
    assert isinstance(key, SequenceKey)
    return type(tree)(
        _put(each, tuple(rest), change) if i == key.idx else each for i, each in enumerate(tree)
    )


def _of_shape(place: _Place, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A template for an array or keys of another shape or dtype."""
    dtype = place.leaf.dtype if dtype is None else dtype
    if isinstance(place.leaf, jax.Array):
        return jax.ShapeDtypeStruct(shape, dtype)
    return np.zeros(shape, dtype)


def _of_another_kind(place: _Place) -> Any:
    return 1 if place.kind != "int" else 1.0


def _other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    longer = [(*shape[:axis], length + 1, *shape[axis + 1 :]) for axis, length in enumerate(shape)]
    return [(*shape, 1), (1, *shape), *longer, *([shape[::-1]] if shape != shape[::-1] else [])]


def _renamed(params: dict[str, Any]) -> dict[str, Any]:
    return {"weight" if name == "w" else name: leaf for name, leaf in params.items()}
