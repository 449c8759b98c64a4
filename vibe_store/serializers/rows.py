"""The rows of a leaf table as JSON: written compactly, read strictly; standard library only."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Leaf, LeafKind

__all__ = [
    "SCALAR_DTYPES",
    "STORED_KINDS",
    "leaf_from_json",
    "leaf_to_json",
    "table_from_json",
    "table_to_json",
]

STORED_KINDS: frozenset[str] = frozenset(
    {"array", "numpy", "numpy_scalar", "key", "bool", "int", "float", "complex"}
)
"""The kinds of leaves that have data, and so a dtype and a shape; the others have a value in the table."""

SCALAR_DTYPES: Mapping[str, tuple[str, ...]] = {
    "bool": ("bool",),
    "int": ("int64", "uint64"),
    "float": ("float64",),
    "complex": ("complex128",),
}
"""The dtypes that Python scalars are stored with."""

_KINDS = frozenset(get_args(LeafKind))
_FIELDS = frozenset({"path", "kind", "dtype", "shape", "impl", "value", "offset", "checksum"})


def table_to_json(leaves: Sequence[Leaf]) -> list[dict[str, Any]]:
    """Return a leaf table as a list that ``json.dumps`` can write."""
    return [leaf_to_json(leaf) for leaf in leaves]


def table_from_json(rows: object) -> tuple[Leaf, ...]:
    """Return the leaf table that a JSON document holds.

    Raises:
        CorruptCheckpointError: it is no list of well-formed rows, or two rows have one path.
    """
    if not isinstance(rows, list):
        raise CorruptCheckpointError(f"The leaf table should be a list, but it is {_brief(rows)}.")
    leaves = tuple(leaf_from_json(row) for row in rows)
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.path in seen:
            raise CorruptCheckpointError(f"The leaf table has two rows for the path {leaf.path!r}.")
        seen.add(leaf.path)
    return leaves


def leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    """Return one row as a dictionary that ``json.dumps`` can write, without the fields that are None."""
    row: dict[str, Any] = {"path": leaf.path, "kind": leaf.kind}
    if leaf.dtype is not None:
        row["dtype"] = leaf.dtype
    if leaf.shape is not None:
        row["shape"] = list(leaf.shape)
    if leaf.impl is not None:
        row["impl"] = leaf.impl
    if leaf.value is not None:
        row["value"] = leaf.value
    if leaf.offset is not None:
        row["offset"] = leaf.offset
    if leaf.checksum is not None:
        row["checksum"] = leaf.checksum
    return row


def leaf_from_json(row: object) -> Leaf:
    """Return the row that a JSON object holds.

    Raises:
        CorruptCheckpointError: a field is unknown, missing, or not what the row's kind calls for.
    """
    if not isinstance(row, Mapping):
        raise CorruptCheckpointError(f"A row of the leaf table should be an object, but it is {_brief(row)}.")
    unknown = sorted(str(name) for name in row if name not in _FIELDS)
    if unknown:
        raise CorruptCheckpointError(f"A row of the leaf table has the unknown field {unknown[0]!r}.")
    path = row.get("path")
    if not isinstance(path, str):
        raise CorruptCheckpointError(f"A row of the leaf table has {_brief(path)} for its path.")
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _bad(path, "kind", kind)
    leaf = Leaf(
        path=path,
        kind=kind,  # type: ignore[arg-type]  # one of LeafKind, as was just checked
        dtype=_text(row, path, "dtype"),
        shape=_shape(row, path),
        impl=_text(row, path, "impl"),
        value=_text(row, path, "value"),
        offset=_natural(row, path, "offset"),
        checksum=_checksum(row, path),
    )
    _check_kind(leaf)
    return leaf


def _check_kind(leaf: Leaf) -> None:
    stored = leaf.kind in STORED_KINDS
    for name, value, wanted in (
        ("dtype", leaf.dtype, stored),
        ("shape", leaf.shape, stored),
        ("impl", leaf.impl, leaf.kind == "key"),
        ("value", leaf.value, not stored),
    ):
        if (value is not None) != wanted:
            verb = "lacks" if wanted else "has"
            raise CorruptCheckpointError(
                f"The leaf table's row for {leaf.path!r}, of kind {leaf.kind!r}, {verb} a {name}."
            )
    if not stored and (leaf.offset is not None or leaf.checksum is not None):
        raise CorruptCheckpointError(
            f"The leaf table's row for {leaf.path!r}, of kind {leaf.kind!r}, says where data is stored."
        )
    if leaf.kind in SCALAR_DTYPES and leaf.dtype not in SCALAR_DTYPES[leaf.kind]:
        raise _bad(leaf.path, "dtype", leaf.dtype)
    if leaf.kind in (*SCALAR_DTYPES, "numpy_scalar") and leaf.shape != ():
        raise _bad(leaf.path, "shape", leaf.shape)
    if leaf.kind == "bytes" and leaf.value is not None:
        try:
            base64.b64decode(leaf.value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise CorruptCheckpointError(
                f"The leaf table's row for {leaf.path!r} has a value that is no base64: {error}."
            ) from error


def _text(row: Mapping[Any, object], path: str, name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise _bad(path, name, value)
    return value


def _natural(row: Mapping[Any, object], path: str, name: str) -> int | None:
    value = row.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise _bad(path, name, value)
    return value


def _shape(row: Mapping[Any, object], path: str) -> tuple[int, ...] | None:
    value = row.get("shape")
    if value is None:
        return None
    if not isinstance(value, list) or any(type(size) is not int or size < 0 for size in value):
        raise _bad(path, "shape", value)
    return tuple(value)


def _checksum(row: Mapping[Any, object], path: str) -> str | None:
    value = _text(row, path, "checksum")
    if value is not None and (len(value) != 32 or not set(value) <= set("0123456789abcdef")):
        raise _bad(path, "checksum", value)
    return value


def _bad(path: str, name: str, value: object) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"The leaf table's row for {path!r} has {_brief(value)} for its {name}.")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
