"""Generated trees: each comes back bit for bit, and a template that differs in one leaf is refused."""

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from vibe_store.errors import TemplateMismatchError
from vibe_store.interfaces import Leaf
from vibe_store.registry import get_serializer
from vibe_store.serializers.tree import describe

pytestmark = pytest.mark.proof

TREES = {"eqx": 500, "orbax": 100}
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
_OF_ONE_FAMILY = {"numpy": "array", "numpy_scalar": "array"}

Mutation = tuple[str, Any, set[str]]
"""How a template differs from a tree, the template, and the paths that the refusal has to name."""


class Agent(NamedTuple):
    params: Any
    rest: Any
    key: Any
    steps: Any


class ReorderedAgent(NamedTuple):
    key: Any
    steps: Any
    params: Any
    rest: Any


class Module(eqx.Module):
    params: Any
    rest: Any
    key: Any
    steps: Any


ROOTS: list[Callable[..., Any]] = [
    Agent,
    Module,
    lambda *parts: list(parts),
    lambda *parts: parts,
    lambda *parts: dict(zip(["params", "rest", "the key", "1"], parts, strict=True)),
]


@dataclasses.dataclass(frozen=True)
class Place:
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


def places(tree: Any) -> list[Place]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [
        Place(keys, keystr(keys), row, leaf) for (keys, leaf), row in zip(pairs, describe(tree), strict=True)
    ]


def put(tree: Any, keys: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return the tree with the node that these keys lead to changed."""
    if not keys:
        return change(tree)
    key, *rest = keys
    if isinstance(key, GetAttrKey):
        new = {key.name: put(getattr(tree, key.name), tuple(rest), change)}
        return tree._replace(**new) if isinstance(tree, tuple) else dataclasses.replace(tree, **new)
    if isinstance(key, DictKey):
        return {**tree, key.key: put(tree[key.key], tuple(rest), change)}
    assert isinstance(key, SequenceKey)
    return type(tree)(put(each, tuple(rest), change) if i == key.idx else each for i, each in enumerate(tree))


def of_shape(place: Place, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A template for an array or keys of another shape or dtype."""
    dtype = place.leaf.dtype if dtype is None else dtype
    if isinstance(place.leaf, jax.Array):
        return jax.ShapeDtypeStruct(shape, dtype)
    return np.zeros(shape, dtype)


def of_another_kind(place: Place) -> Any:
    return 1 if place.kind != "int" else 1.0


def other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    longer = [(*shape[:axis], length + 1, *shape[axis + 1 :]) for axis, length in enumerate(shape)]
    return [(*shape, 1), (1, *shape), *longer, *([shape[::-1]] if shape != shape[::-1] else [])]


def renamed(params: dict[str, Any]) -> dict[str, Any]:
    return {"weight" if name == "w" else name: leaf for name, leaf in params.items()}


def mutations(tree: Any, pick: Callable[[list[Any]], Any]) -> Iterator[Mutation]:
    """Yield templates that differ from a tree in one leaf, which may be any of its leaves."""
    leaves = places(tree)
    params = leaves[next(i for i, place in enumerate(leaves) if place.path.endswith("['w']"))].keys[:-1]
    inside = keystr(params)
    yield "renamed", put(tree, params, renamed), {f"{inside}['w']", f"{inside}['weight']"}
    yield "added", put(tree, params, lambda old: {**old, "new": jnp.zeros(3)}), {f"{inside}['new']"}
    yield "dropped", put(tree, params, lambda old: {"b": old["b"]}), {f"{inside}['w']"}

    one = pick(leaves)
    yield "one level down", put(tree, one.keys, lambda leaf: [leaf]), {one.path, f"{one.path}[0]"}
    yield "dropped", put(tree, one.keys, lambda _: None), {one.path}
    yield "of another kind", put(tree, one.keys, lambda _: of_another_kind(one)), {one.path}

    other = pick([place for place in leaves if place.type != one.type])
    exchanged = put(put(tree, one.keys, lambda _: other.leaf), other.keys, lambda _: one.leaf)
    yield "reordered", exchanged, {one.path, other.path}

    array = pick([place for place in leaves if place.kind == "array"])
    shape = pick(other_shapes(array.leaf.shape))
    yield "shape", put(tree, array.keys, lambda _: of_shape(array, shape)), {array.path}
    dtype = pick([each for each in (jnp.int8, jnp.float32, jnp.bfloat16) if each != array.leaf.dtype])
    yield "dtype", put(tree, array.keys, lambda _: of_shape(array, array.leaf.shape, dtype)), {array.path}

    key = pick([place for place in leaves if place.kind == "key"])
    yield "shape", put(tree, key.keys, lambda _: of_shape(key, (*key.leaf.shape, 1))), {key.path}
    impl = pick([impl for impl in IMPLS if impl != key.row.impl])
    other_type = jax.random.key(0, impl=impl).dtype
    changed = put(tree, key.keys, lambda _: of_shape(key, key.leaf.shape, other_type))
    yield "key implementation", changed, {key.path}


@st.composite
def trees(draw: st.DrawFn, any_tree: st.SearchStrategy[Any]) -> Any:
    """A tree with at least two arrays, a typed key and a number, and all else that there is."""
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8]))
    size = draw(st.integers(1, 3))
    weights = jnp.arange(3 * size).reshape(size, 3).astype(dtype)
    params = {"w": weights, "b": draw(st.sampled_from([np.ones(size), np.float32(size), jnp.ones(())]))}
    key = jax.random.key(draw(st.integers(0, 99)), impl=draw(st.sampled_from(IMPLS)))
    root = draw(st.sampled_from(ROOTS))
    return root(params, draw(any_tree), key, draw(st.integers(0, 2**40)))


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_bit_for_bit_and_a_template_that_differs_in_one_leaf_is_refused_by_path(
    name: str, any_tree: st.SearchStrategy[Any], assert_same: Callable[[Any, Any], None], folder_source: Any
) -> None:
    if name == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    serializer = get_serializer(name)
    seen: dict[str, int] = {}

    @settings(max_examples=TREES[name], deadline=None, suppress_health_check=list(HealthCheck))
    @given(tree=trees(any_tree), data=st.data())
    def check(tree: Any, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("error")
            saved = serializer.save(serializer.snapshot(tree), Path(folder), "state")
            source = folder_source(Path(folder), saved)
            assert_same(serializer.load(source, "state", tree), tree)
            if isinstance(tree, Agent):
                like = ReorderedAgent(**tree._asdict())
                assert_same(serializer.load(source, "state", like), like)
            for how, like, paths in mutations(tree, lambda options: data.draw(st.sampled_from(options))):
                with pytest.raises(TemplateMismatchError) as refused:
                    serializer.load(source, "state", like)
                assert set(refused.value.paths) == paths, how
                assert all(path in str(refused.value) for path in paths), how
                seen[how] = seen.get(how, 0) + 1

    check()
    assert len(seen) == 9
    assert all(count >= TREES[name] for count in seen.values())
