"""The leaf table: what it says of a tree, and how it is read back from JSON."""

import json
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Leaf
from vibe_store.serializers.eqx import EqxSerializer
from vibe_store.serializers.rows import table_from_json, table_to_json
from vibe_store.serializers.tree import describe, leaf_from_json, leaf_to_json


def test_every_kind_of_leaf_is_described() -> None:
    tree = [
        jnp.ones((2, 3), jnp.bfloat16), np.ones(2, ">f4"), np.int8(1),
        jax.random.split(jax.random.key(0, impl="rbg")),
        True, 2**63, 0.5, 1j, "text", b"\xff", jax.nn.relu, None, jax.ShapeDtypeStruct((3,), jnp.int4),
    ]  # fmt: skip
    assert describe(tree) == (
        Leaf("[0]", "array", "bfloat16", (2, 3)),
        Leaf("[1]", "numpy", ">f4", (2,)),
        Leaf("[2]", "numpy_scalar", "int8", ()),
        Leaf("[3]", "key", "uint32", (2, 4), "rbg"),
        Leaf("[4]", "bool", "bool", ()),
        Leaf("[5]", "int", "uint64", ()),
        Leaf("[6]", "float", "float64", ()),
        Leaf("[7]", "complex", "complex128", ()),
        Leaf("[8]", "str", value="text"),
        Leaf("[9]", "bytes", value="/w=="),
        Leaf("[10]", "callable", value=describe(jax.nn.relu)[0].value),
        Leaf("[12]", "array", "int4", (3,)),
    )
    assert str(describe(jax.nn.relu)[0].value).endswith(".relu")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        *((key, "[1]") for key in (1, np.int64(1), np.uint8(1), True, np.True_, 1.0, np.float32(1), 1 + 0j)),
        *((key, "[1]") for key in (Fraction(1), Decimal(1), ml_dtypes.bfloat16(1))),
        (np.float64(0.5), "[0.5]"),
        (float("inf"), "[inf]"),
        *((key, "['a']") for key in ("a", np.str_("a"))),
        ((1, np.int64(2)), "[(1, 2)]"),
    ],
)
def test_a_path_does_not_depend_on_the_trees_that_were_described_before(key: Any, path: str) -> None:
    for other in (np.int64(1), 1, np.str_("a"), "a"):  # to JAX some are the same tree
        describe({other: 0.0})
    assert [row.path for row in describe({key: 0.0})] == [path]


def test_a_snapshot_is_described_as_the_tree_is() -> None:
    tree = {"a": jnp.ones(2), "k": jax.random.key(0), "n": np.ones(2), "s": "x", "m": jnp.ones(2, jnp.int4)}
    assert describe(EqxSerializer().snapshot(tree)) == describe(tree)


def test_a_table_survives_json_and_has_no_empty_fields() -> None:
    table = describe(
        {"a": jnp.ones(2), "k": jax.random.key(0), "s": "\ud800 \U0001f600", "b": b"x", "f": jnp.sin}
    )
    table = (replace(table[0], offset=128, checksum="0" * 32), *table[1:])
    text = json.dumps(table_to_json(table))
    assert "null" not in text
    assert table_from_json(json.loads(text)) == table


def good() -> dict[str, Any]:
    return leaf_to_json(Leaf(".a", "array", "float32", (2,), offset=128, checksum="ab" * 16))


@pytest.mark.parametrize(
    "row",
    [
        None, [], "x", {}, {"path": 1, "kind": "array"}, {"path": ".a"}, {"path": ".a", "kind": ["array"]},
        *({**good(), **change} for change in (
            {"kind": "pickle"}, {"kind": "key"}, {"kind": "str"}, {"kind": "int"}, {"kind": "numpy_scalar"},
            {"dtype": 4}, {"dtype": None}, {"impl": "rbg"}, {"value": "x"}, {"more": 1},
            {"shape": [-1]}, {"shape": [1.0]}, {"shape": [True]}, {"shape": "2"}, {"shape": None},
            {"offset": -1}, {"offset": 1.5}, {"offset": True}, {"checksum": "ab"}, {"checksum": "AB" * 16},
        )),
        {"path": ".a", "kind": "str"}, {"path": ".a", "kind": "str", "value": 1},
        {"path": ".a", "kind": "bytes", "value": "*"}, {"path": ".a", "kind": "bytes", "value": "é"},
        {"path": ".a", "kind": "str", "value": "x", "offset": 1},
        {"path": ".a", "kind": "float", "dtype": "float64"},
        {"path": ".a", "kind": "int", "dtype": "object", "shape": []},
    ],
    ids=repr,
)  # fmt: skip
def test_a_row_that_is_not_well_formed_is_refused(row: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"leaf table.*\.$"):
        leaf_from_json(row)


@pytest.mark.parametrize("table", [None, {}, "[]", [good(), good()]], ids=["none", "object", "text", "twice"])
def test_a_table_that_is_not_well_formed_is_refused(table: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="leaf table"):
        table_from_json(table)


def test_reading_a_table_from_json_needs_only_the_standard_library() -> None:
    code = "import sys, vibe_store.serializers.rows; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
