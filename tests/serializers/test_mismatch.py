"""A template that differs from what was saved is refused, with every difference in one error."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vibe_store.errors import TemplateMismatchError
from vibe_store.interfaces import Source


def base() -> dict[str, Any]:
    return {
        "params": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3), "half": jnp.ones(2, jnp.bfloat16)},
        "key": jax.random.key(0),
        "numpy": np.arange(4),
        "scalar": np.float32(1),
        "flag": True,
        "int": 1,
        "float": 1.0,
        "complex": 1j,
        "str": "a",
        "bytes": b"a",
        "function": jnp.sin,
        "none": None,
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = base()
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
        node = node[parent]
    node[name] = value
    return tree


def keystr(path: str) -> str:
    return "".join(f"['{name}']" for name in path.split("/"))


CHANGES: list[tuple[str, Callable[[], Any], str]] = [
    ("params/w", lambda: jnp.ones((3, 2)), r"shape \(2, 3\) was saved, but the template has \(3, 2\)"),
    ("params/w", lambda: jnp.ones((2, 3, 1)), "shape"),
    (
        "params/w",
        lambda: jnp.ones((2, 3), jnp.float16),
        "dtype float32 was saved, but the template has float16",
    ),
    ("params/w", lambda: jnp.ones((2, 3), jnp.int32), "dtype"),
    (
        "params/w",
        lambda: None,
        "an array of dtype float32 and shape .* was saved, but the template has nothing",
    ),
    ("params/w", lambda: [jnp.ones((2, 3))], "was saved, but the template has nothing there"),
    ("params/half", lambda: jnp.ones(2, jnp.float16), "dtype bfloat16"),
    ("params/half", lambda: np.ones(2, ml_dtypes.float8_e4m3fn), "dtype bfloat16"),
    ("params/new", lambda: jnp.ones(2), "the template has an array .*, but nothing was saved there"),
    ("none", lambda: jnp.ones(2), "nothing was saved there"),
    ("key", lambda: jax.random.key(0, impl="rbg"), "key implementation 'threefry2x32' was saved"),
    ("key", lambda: jax.random.split(jax.random.key(0)), "shape"),
    ("key", lambda: jax.random.PRNGKey(0), "a typed PRNG key .* was saved, but the template has an array"),
    ("key", lambda: jax.ShapeDtypeStruct((2,), jax.random.key(0).dtype), "shape"),
    ("params/w", lambda: jax.random.key(0), "but the template has a typed PRNG key"),
    ("numpy", lambda: np.arange(4, dtype=">i8"), "dtype int64 was saved, but the template has >i8"),
    ("numpy", lambda: np.arange(4).astype("M8[s]"), "dtype"),
    ("scalar", lambda: np.float64(1), "dtype"),
    ("scalar", lambda: 1.0, "an array .* was saved, but the template has a Python float"),
    ("flag", lambda: 1, "a Python bool was saved, but the template has a Python int"),
    ("int", lambda: True, "a Python int was saved, but the template has a Python bool"),
    ("int", lambda: 1.0, "a Python int was saved"),
    ("int", lambda: np.int64(1), "a Python int was saved"),
    ("float", lambda: jnp.float32(1), "a Python float was saved"),
    ("complex", lambda: 1.0, "a Python complex was saved"),
    ("str", lambda: b"a", "a string was saved, but the template has a bytes object"),
    ("bytes", lambda: "a", "a bytes object was saved"),
    ("str", lambda: jnp.sin, "a string was saved, but the template has a callable"),
    ("function", lambda: "jax.numpy.sin", "a callable .*sin.* was saved, but the template has a string"),
    ("function", lambda: None, "a callable .* was saved, but the template has nothing"),
]


@pytest.fixture(scope="module")
def saved(through: Any) -> Source:
    source: Source = through.save(base())
    return source


@pytest.mark.parametrize(
    ("path", "make", "words"), CHANGES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_one_differing_leaf_is_refused_by_path(
    path: str, make: Callable[[], Any], words: str, through: Any, saved: Source
) -> None:
    with pytest.raises(TemplateMismatchError, match=words) as caught:
        through.load(saved, changed(path, make()))
    assert all(found.startswith(keystr(path)) for found in caught.value.paths)
    assert keystr(path) in str(caught.value)
    assert "saved item 'state'" in str(caught.value)
    assert len(caught.value.differences) == len(caught.value.paths) >= 1


def test_a_renamed_leaf_is_one_missing_and_one_extra(through: Any, saved: Source) -> None:
    like = base()
    like["params"]["weight"] = like["params"].pop("w")
    with pytest.raises(TemplateMismatchError) as caught:
        through.load(saved, like)
    assert set(caught.value.paths) == {"['params']['weight']", "['params']['w']"}


def test_leaves_of_a_tuple_that_changed_places_are_refused_where_they_differ(through: Any) -> None:
    source = through.save((jnp.ones(2), jnp.ones(3)))
    with pytest.raises(TemplateMismatchError) as caught:
        through.load(source, (jnp.ones(3), jnp.ones(2)))
    assert caught.value.paths == ("[0]", "[1]")


def test_all_differences_are_in_one_error_and_the_message_stays_readable(through: Any) -> None:
    source = through.save([jnp.ones(2)] * 30)
    with pytest.raises(TemplateMismatchError) as caught:
        through.load(source, [jnp.ones(3)] * 30)
    assert len(caught.value.differences) == 30
    assert caught.value.paths[29] == "[29]"
    lines = str(caught.value).splitlines()
    assert "differ in 30 leaves" in lines[0]
    assert lines[-1].strip() == "... and 10 more"
    assert len(lines) == 22


def test_several_differences_of_one_leaf_are_all_said(through: Any) -> None:
    source = through.save(jnp.ones(2))
    with pytest.raises(TemplateMismatchError, match=r"<root>: dtype float32 .*; shape \(2,\)"):
        through.load(source, jnp.ones(3, jnp.int32))


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "complex128"])
def test_a_template_that_jax_would_cast_without_x64_is_refused(dtype: str, through: Any) -> None:
    source = through.save({"a": np.ones(3, dtype)})
    with pytest.raises(TemplateMismatchError, match=r"\['a'\]: JAX would cast .* jax_enable_x64"):
        through.load(source, {"a": jax.ShapeDtypeStruct((3,), np.dtype(dtype))})


@pytest.mark.parametrize("dtype", [">f4", "M8[s]"])
def test_a_template_of_a_dtype_that_jax_has_not_is_refused(dtype: str, through: Any) -> None:
    source = through.save({"a": np.ones(3, "i8").astype(dtype)})
    with pytest.raises(TemplateMismatchError, match=r"\['a'\]: JAX has no arrays of dtype"):
        through.load(source, {"a": jax.ShapeDtypeStruct((3,), np.dtype(dtype))})


def test_partial_allows_extra_leaves_but_never_missing_or_differing_ones(through: Any) -> None:
    source = through.save({"a": jnp.ones(2), "b": 1, "c": "x"})
    with pytest.raises(TemplateMismatchError) as caught:
        through.load(source, {"a": jnp.ones(3), "new": 1}, partial=True)
    assert caught.value.paths == ("['a']", "['new']")
    with pytest.raises(TemplateMismatchError) as caught:
        through.load(source, {"a": jnp.ones(2)})
    assert caught.value.paths == ("['b']", "['c']")
    assert "state" in str(caught.value)


def test_the_template_is_compared_before_a_byte_of_the_data_is_read(through: Any) -> None:
    source = through.save(jnp.ones(2))
    for name in source.files:
        (source.folder / name).unlink()
    with pytest.raises(TemplateMismatchError):
        through.load(source, jnp.ones(3))
