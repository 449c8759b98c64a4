"""Plain Equinox reads our files, and we read its files, but trust them less."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from vibe_store import save_checkpoint
from vibe_store.errors import CorruptCheckpointError, TemplateMismatchError, UnverifiedCheckpointWarning
from vibe_store.serializers.eqx import load_eqx, save_eqx


def plain_tree() -> Any:
    """A tree of everything that plain Equinox can store and load."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    return {
        "model": model,
        "optimiser": optax.adam(1e-3).init(eqx.filter(model, eqx.is_array)),
        "half": jnp.ones(3, jnp.bfloat16),
        "numpy": np.arange(4.0),
        "big endian": np.arange(4, dtype=">f4"),
        "empty": jnp.zeros((0, 2)),
        "generic": np.int16(3),
        "python": (True, 3, 0.5, 1j),
        "text": "text",
        "none": None,
    }


def plain_bytes(tree: Any) -> bytes:
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, tree)
    return file.getvalue()


def test_our_file_begins_with_exactly_what_equinox_writes(tmp_path: Path) -> None:
    arrays = [jnp.ones(3, dtype) for dtype in (jnp.int4, jnp.float8_e4m3fn, jnp.float8_e5m2)]
    tree = (plain_tree(), arrays, np.ones(3, ml_dtypes.bfloat16), 2**40, np.array(["2020"], "M8[D]"))
    save_eqx(tmp_path / "tree.eqx", tree)
    assert (tmp_path / "tree.eqx").read_bytes().startswith(plain_bytes(tree))


def test_plain_equinox_reads_our_file(tmp_path: Path, assert_same: Any) -> None:
    save_eqx(tmp_path / "tree.eqx", plain_tree())
    assert_same(eqx.tree_deserialise_leaves(tmp_path / "tree.eqx", plain_tree()), plain_tree())


PROGRAM = """
import sys
sys.modules["vibe_store"] = None  # as if it were not installed
import equinox as eqx, jax, jax.numpy as jnp, numpy as np
model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(1))
like = {"model": model, "replay": np.zeros((5, 2), np.uint8), "step": 0}
state = eqx.tree_deserialise_leaves(sys.argv[1], like)
expected = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
assert eqx.tree_equal(state["model"], expected)
assert (state["replay"] == 7).all() and state["step"] == 12
"""


def test_a_program_without_vibe_store_reads_a_checkpoint(tmp_path: Path) -> None:
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    tree = {"model": model, "replay": np.full((5, 2), 7, np.uint8), "step": 12}
    save_checkpoint(tmp_path, tree, step=3)
    program = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "step_3" / "state.eqx")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_we_read_plain_equinoxs_file_with_a_warning(tmp_path: Path, assert_same: Any) -> None:
    eqx.tree_serialise_leaves(tmp_path / "tree.eqx", plain_tree())
    with pytest.warns(UnverifiedCheckpointWarning, match=r"tree\.eqx was written by plain Equinox") as caught:
        loaded = load_eqx(tmp_path / "tree.eqx", plain_tree())
    assert_same(loaded, plain_tree())
    assert caught[0].filename == __file__


def test_we_read_what_equinox_writes_and_cannot_read(tmp_path: Path, assert_same: Any) -> None:
    tree = [
        np.ones(3, ml_dtypes.bfloat16),
        jnp.ones(3, jnp.int4),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
    ]
    tree.append(ml_dtypes.float8_e4m3fn(1))
    (tmp_path / "tree.eqx").write_bytes(plain_bytes(tree))
    with pytest.warns(UnverifiedCheckpointWarning):
        assert_same(load_eqx(tmp_path / "tree.eqx", tree), tree)


@pytest.mark.parametrize(
    ("saved", "like", "path"),
    [
        ({"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.ones(3), "b": jnp.ones(3)}, "['a']"),
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2, jnp.int32)}, "['a']"),
        ({"a": np.ones(2)}, {"a": jnp.ones(2)}, "['a']"),
        ({"a": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)}, "['b']"),
        ({"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": jnp.ones(2)}, "['a']"),
        ({"a": 1}, {"a": 1.0}, "['a']"),
        ({"a": jnp.float32(1)}, {"a": 1.0}, "['a']"),
        ({"a": jax.random.PRNGKey(0)}, {"a": jax.random.key(0)}, "['a']"),
        ({"a": np.ones(2, np.int64)}, {"a": jax.ShapeDtypeStruct((2,), np.dtype("int64"))}, "['a']"),
    ],
    ids=["shape", "dtype", "x64", "missing", "extra", "python", "scalar", "key", "cast"],
)
def test_a_plain_file_that_does_not_fit_is_refused_by_path(
    saved: Any, like: Any, path: str, tmp_path: Path
) -> None:
    eqx.tree_serialise_leaves(tmp_path / "tree.eqx", saved)
    with pytest.raises(TemplateMismatchError, match=r"tree\.eqx") as caught:
        load_eqx(tmp_path / "tree.eqx", like)
    assert caught.value.paths == (path,)


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(-1,)", "(4611686018427387904, 4611686018427387904)"])
def test_a_record_that_claims_more_than_the_file_holds_is_refused(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (117 - len(header)) + b"\n"
    (tmp_path / "tree.eqx").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(CorruptCheckpointError, match=r"tree\.eqx"):
        load_eqx(tmp_path / "tree.eqx", jnp.ones(3))


@pytest.mark.parametrize(
    "header",
    [
        "{#descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3$), }",
        "{'descr': '<04', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': ',i2', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '8i2', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, b'shape': (3,), }",
        "{'descr': '<a4', 'fortran_order': False, 'shape': (3,), }",
    ],
)
def test_a_record_whose_header_is_damaged_is_refused_in_a_sentence(header: str, tmp_path: Path) -> None:
    record = plain_bytes(jnp.ones(3))
    (tmp_path / "tree.eqx").write_bytes(record[:10] + header.encode().ljust(117) + b"\n" + record[128:])
    with pytest.raises((CorruptCheckpointError, TemplateMismatchError), match=r"tree\.eqx"):
        load_eqx(tmp_path / "tree.eqx", jnp.ones(3))
