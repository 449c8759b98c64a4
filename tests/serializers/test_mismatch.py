"""What a refused template is told: in words, by path, with every difference in one error."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vibe_store.errors import TemplateMismatchError
from vibe_store.serializers.tree import compare, describe, flatten

SHAPE = r"shape \(2, 3\) was saved, but the template has \(3, 2\)"
KEY = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
KEYS = jax.ShapeDtypeStruct((2,), jax.random.key(0).dtype)
RBG = jax.ShapeDtypeStruct((), jax.random.key(0, impl="rbg").dtype)


def refusal(saved: Any, like: Any, *, partial: bool = False) -> TemplateMismatchError:
    with pytest.raises(TemplateMismatchError) as caught:
        compare(describe(saved), flatten(like), partial=partial, what="saved item 'state'")
    return caught.value


@pytest.mark.parametrize(
    ("saved", "like", "words"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), SHAPE),
        (np.ones(2, np.float32), np.ones(2, np.float16), "dtype float32 was saved, but .* has float16"),
        (np.ones(2, ml_dtypes.bfloat16), np.ones(2, np.float16), "dtype bfloat16 was saved"),
        (np.arange(4), np.arange(4, dtype=">i8"), "dtype int64 was saved, but the template has >i8"),
        (np.ones(2), None, r"an array of dtype float64 and shape \(2,\) was saved, but .* has nothing there"),
        (None, np.ones(2), "the template has an array .*, but nothing was saved there"),
        (KEY, RBG, "key implementation 'threefry2x32' was saved"),
        (KEY, KEYS, "shape"),
        (KEY, np.ones(2), "a typed PRNG key .* was saved, but the template has an array"),
        (np.ones(2), KEY, "but the template has a typed PRNG key"),
        (np.float32(1), 1.0, "an array .* was saved, but the template has a Python float"),
        (True, 1, "a Python bool was saved, but the template has a Python int"),
        (1, True, "a Python int was saved, but the template has a Python bool"),
        (1j, 1.0, "a Python complex was saved"),
        ("a", b"a", "a string was saved, but the template has a bytes object"),
        ("a", jnp.sin, "a string was saved, but the template has a callable"),
        (jnp.sin, "jax.numpy.sin", "a callable .*sin.* was saved, but the template has a string"),
        (jnp.sin, None, "a callable .* was saved, but the template has nothing"),
    ],
)
def test_a_difference_is_said_in_words(saved: Any, like: Any, words: str) -> None:
    refused = refusal({"params": saved}, {"params": like})
    assert refused.paths == ("['params']",)
    assert refused.differences[0].startswith("['params']: ")
    with pytest.raises(TemplateMismatchError, match=words):
        raise refused


def test_the_message_says_which_item_it_is_about() -> None:
    assert "saved item 'state'" in str(refusal(1, 1.0))
    assert "saved item 'state'" in str(refusal({"a": 1}, {"b": 1}, partial=True))


def test_the_message_stays_readable_with_many_differences() -> None:
    refused = refusal([np.ones(2)] * 30, [np.ones(3)] * 30)
    assert len(refused.differences) == 30
    lines = str(refused).splitlines()
    assert "differ in 30 leaves" in lines[0]
    assert lines[-1].strip() == "... and 10 more"
    assert len(lines) == 22


def test_several_differences_of_one_leaf_are_all_said() -> None:
    refused = refusal(np.ones(2, np.float32), np.ones(3, np.int32))
    with pytest.raises(TemplateMismatchError, match=r"<root>: dtype float32 .*; shape \(2,\)"):
        raise refused


def test_a_template_that_jax_would_cast_without_x64_is_told_what_to_enable() -> None:
    like = {"a": jax.ShapeDtypeStruct((3,), np.dtype("float64"))}
    with pytest.raises(TemplateMismatchError, match=r"\['a'\]: JAX would cast .* jax_enable_x64"):
        raise refusal({"a": np.ones(3)}, like)


@pytest.mark.parametrize("dtype", [">f4", "M8[s]"])
def test_a_template_of_a_dtype_that_jax_has_not_is_refused(dtype: str) -> None:
    like = {"a": jax.ShapeDtypeStruct((3,), np.dtype(dtype))}
    with pytest.raises(TemplateMismatchError, match=r"\['a'\]: JAX has no arrays of dtype"):
        raise refusal({"a": np.ones(3, "i8").astype(dtype)}, like)


def test_the_template_is_compared_before_a_byte_of_the_data_is_read(through: Any) -> None:
    source = through.save(jnp.ones(2))
    for name in source.files:
        (source.folder / name).unlink()
    with pytest.raises(TemplateMismatchError):
        through.load(source, jnp.ones(3))
