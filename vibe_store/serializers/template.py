"""Loading without a template: one is made of the leaf table, and the leaves end up in plain containers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Leaf, PyTree
from vibe_store.serializers.places import natural_places, nest
from vibe_store.serializers.tree import dtype_named, show_path

__all__ = ["SavedCallable", "in_containers", "template_of"]


class SavedCallable:
    """Stands for a callable where a checkpoint is loaded without a template: only its name was saved.

    Attributes:
        name: its module and qualified name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # By these a leaf table names a callable; nothing of that name is imported or called.
        self.__qualname__ = self.__name__ = name
        self.__module__ = None  # type: ignore[assignment] # the name says it already

    def __repr__(self) -> str:
        return f"SavedCallable({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SavedCallable) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse: a checkpoint holds no code."""
        raise InvalidValueError(
            f"{self.name} cannot be called: a checkpoint holds only the names of callables. Load it with a "
            "template (like=...), whose callables are taken over."
        )


@dataclass(frozen=True, slots=True)
class _ByPath:
    """A pytree of leaves in a row, whose paths are what a leaf table says."""

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Path:
    """A key of a pytree that reads as a whole path."""

    text: str

    def __str__(self) -> str:
        return self.text


jax.tree_util.register_pytree_with_keys(
    _ByPath,
    lambda node: (
        [(_Path(path), leaf) for path, leaf in zip(node.paths, node.leaves, strict=True)],
        node.paths,
    ),
    lambda paths, leaves: _ByPath(paths, tuple(leaves)),
    lambda node: (node.leaves, node.paths),
)


def template_of(rows: Sequence[Leaf]) -> PyTree:
    """Return a template that fits a leaf table exactly, for :func:`in_containers` to rearrange once loaded.

    It takes no memory for arrays. One of a dtype that JAX cannot hold as it is configured (64 bits without
    ``jax_enable_x64``) becomes a NumPy array.

    Raises:
        InvalidValueError: a key has a PRNG implementation that this process does not know.
    """
    return _ByPath(tuple(row.path for row in rows), tuple(_leaf(row) for row in rows))


def in_containers(tree: PyTree) -> PyTree:
    """Return the leaves of a tree of :func:`template_of` in dicts and lists after their paths.

    Attributes and dict keys become names of dicts, indices those of lists. A tree without leaves is None;
    one whose paths do not make such containers is a flat dict by path.
    """
    leaves = dict(zip(tree.paths, tree.leaves, strict=True))
    if not leaves:
        return None
    places = natural_places(leaves)
    return leaves if places is None else nest({places[path]: leaf for path, leaf in leaves.items()})


_PLAIN = {"bool": False, "int": 0, "float": 0.0, "complex": 0j, "str": "", "bytes": b""}


def _leaf(row: Leaf) -> Any:
    if row.kind in _PLAIN:
        return _PLAIN[row.kind]
    if row.kind == "callable":
        return SavedCallable(row.value or "")
    if row.kind == "key":
        return _key(row)
    dtype, shape = dtype_named(row.dtype), row.shape or ()
    if row.kind == "array" and jax.dtypes.canonicalize_dtype(dtype) == dtype:
        return jax.ShapeDtypeStruct(shape, dtype)
    array = np.broadcast_to(np.zeros((), dtype), shape)
    return array[()] if row.kind == "numpy_scalar" else array


def _key(row: Leaf) -> Any:
    try:
        key = jax.eval_shape(lambda: jax.random.key(0, impl=row.impl))
    except ValueError as error:
        raise InvalidValueError(
            f"The leaf {show_path(row.path)} is a key of the PRNG implementation {row.impl!r}, which is not "
            "registered in this process. Import what defines it, or load with a template (like=...)."
        ) from error
    inner = len(jax.eval_shape(jax.random.key_data, key).shape)
    shape = row.shape or ()
    return jax.ShapeDtypeStruct(shape[: len(shape) - inner], key.dtype)
