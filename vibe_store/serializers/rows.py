"""The rows of a leaf table as JSON: written compactly, read strictly; standard library only.

Whoever reads a table may read one that somebody made to do harm. Nothing here imports, evaluates or allocates
what it reads: a row that passes names a dtype that we could have written, and a shape that NumPy could have.
"""

import base64
import binascii
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Leaf, LeafKind

__all__ = [
    "MAX_JSON_BYTES",
    "SCALAR_DTYPES",
    "STORED_KINDS",
    "brief",
    "fits_numpy",
    "leaf_from_json",
    "leaf_to_json",
    "strict_json",
    "table_from_json",
    "table_to_json",
]

MAX_JSON_BYTES = 64 * 1024 * 1024
"""The longest JSON that is written or read: a table of several hundred thousand leaves."""

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
_UNIT = r"(?:\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
_DTYPE = re.compile(
    rf"""bool | u?int(?:8|16|32|64) | float(?:16|32|64) | complex(?:64|128) | (?:datetime|timedelta)64{_UNIT}
    | [<>](?:[iu][248] | f[248] | c(?:8|16) | [mM]8{_UNIT})       # of another order of bytes
    | u?int[124] | bfloat16 | b?complex32 | float4_e2m1fn | float6_e2m3fn | float6_e3m2fn
    | float8_(?:e3m4|e4m3|e4m3b11fnuz|e4m3fn|e4m3fnuz|e5m2|e5m2fnuz|e8m0fnu)""",
    re.VERBOSE,
)
_MOST_DIMENSIONS = 64
_MOST_ELEMENTS = 2**63 // 16  # of the widest dtype, 16 bytes
_FIELDS = frozenset({"path", "kind", "dtype", "shape", "impl", "value", "offset", "checksum"})


def strict_json(data: bytes) -> Any:
    """Parse JSON as this package writes it: UTF-8, no key twice, no NaN or infinity, of some length at most.

    Raises:
        CorruptCheckpointError: it is no such JSON.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CorruptCheckpointError(f"It has more than {MAX_JSON_BYTES} bytes, and such are never written.")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise CorruptCheckpointError("It is nested too deeply.") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"It is no JSON as it is written here: {error}.") from error


def brief(value: object) -> str:
    """Return a value for a message: short, however large or deeply nested it is, and printable."""
    return _BRIEF.repr(value)


def fits_numpy(shape: Sequence[int]) -> bool:
    """Whether NumPy could have an array of this shape, of whatever dtype."""
    count = 1
    for size in shape:
        count *= size or 1
        if not 0 <= size <= count <= _MOST_ELEMENTS:
            return False
    return len(shape) <= _MOST_DIMENSIONS


def table_to_json(leaves: Sequence[Leaf]) -> list[dict[str, Any]]:
    """Return a leaf table as a list that ``json.dumps`` can write."""
    return [leaf_to_json(leaf) for leaf in leaves]


def table_from_json(rows: object) -> tuple[Leaf, ...]:
    """Return the leaf table that a JSON document holds.

    Raises:
        CorruptCheckpointError: it is no list of well-formed rows, or two rows have one path.
    """
    if not isinstance(rows, list):
        raise CorruptCheckpointError(f"The leaf table should be a list, but it is {brief(rows)}.")
    leaves = tuple(leaf_from_json(row) for row in rows)
    seen: set[str] = set()
    for leaf in leaves:
        if leaf.path in seen:
            raise CorruptCheckpointError(f"The leaf table has two rows for the path {brief(leaf.path)}.")
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
        raise CorruptCheckpointError(f"A row of the leaf table should be an object, but it is {brief(row)}.")
    unknown = sorted(str(name) for name in row if name not in _FIELDS)
    if unknown:
        raise CorruptCheckpointError(f"A row of the leaf table has the unknown field {brief(unknown[0])}.")
    path = row.get("path")
    if not isinstance(path, str):
        raise CorruptCheckpointError(f"A row of the leaf table has {brief(path)} for its path.")
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _bad(path, "kind", kind)
    leaf = Leaf(
        path=path,
        kind=kind,  # type: ignore[arg-type]  # one of LeafKind, as was just checked
        dtype=_dtype(row, path),
        shape=_shape(row, path),
        impl=_text(row, path, "impl"),
        value=_text(row, path, "value"),
        offset=_natural(row, path, "offset"),
        checksum=_checksum(row, path),
    )
    _check_kind(leaf)
    return leaf


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{brief(text)} is too large a number")
    return number


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
                f"The leaf table's row for {brief(leaf.path)}, of kind {leaf.kind!r}, {verb} a {name}."
            )
    if not stored and (leaf.offset is not None or leaf.checksum is not None):
        raise CorruptCheckpointError(
            f"The leaf table's row for {brief(leaf.path)}, of kind {leaf.kind!r}, says where data is stored."
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
                f"The leaf table's row for {brief(leaf.path)} has a value that is no base64: {error}."
            ) from error


def _text(row: Mapping[Any, object], path: str, name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise _bad(path, name, value)
    return value


def _dtype(row: Mapping[Any, object], path: str) -> str | None:
    value = _text(row, path, "dtype")
    if value is not None and _DTYPE.fullmatch(value) is None:
        raise _bad(path, "dtype", value)
    return value


def _natural(row: Mapping[Any, object], path: str, name: str) -> int | None:
    value = row.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**63:
        raise _bad(path, name, value)
    return value


def _shape(row: Mapping[Any, object], path: str) -> tuple[int, ...] | None:
    value = row.get("shape")
    if value is None:
        return None
    if not isinstance(value, list) or any(type(size) is not int for size in value) or not fits_numpy(value):
        raise _bad(path, "shape", value)
    return tuple(value)


def _checksum(row: Mapping[Any, object], path: str) -> str | None:
    value = _text(row, path, "checksum")
    if value is not None and (len(value) != 32 or not set(value) <= set("0123456789abcdef")):
        raise _bad(path, "checksum", value)
    return value


def _bad(path: str, name: str, value: object) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"The leaf table's row for {brief(path)} has {brief(value)} for its {name}."
    )


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 200
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 4
