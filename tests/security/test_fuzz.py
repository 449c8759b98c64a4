"""Checkpoints changed at random, with checksums that hold: they load as the template says, or are refused.

Refused means: one of our errors, with a text that can be read, in little time and memory, without code run or
a file touched outside the directory.

In the checks each test takes a few seconds. To search for hours, by hand::

    VIBE_STORE_FUZZ_EXAMPLES=100000 python -m pytest tests/security/test_fuzz.py -n 2

An example that fails is printed whole, and kept in ``.hypothesis`` to be tried first the next time.
"""

import copy
import json
import os
import shutil
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_eqx,
    load_metadata,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.errors import VibeStoreError

EXAMPLES = int(os.environ.get("VIBE_STORE_FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
fuzz_orbax = settings(fuzz, max_examples=max(EXAMPLES // 6, 10))

MOST_SECONDS = 20.0
MOST_MEMORY = 100_000_000

_texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["..", "../x", "/etc/passwd", "state.eqx", "manifest.json", "float32", "object", "O", "V8",
         "datetime64[ns]", "array", "key", "str", "callable", "numpy_scalar", "eqx", "orbax", "os.system",
         "NaN", "", "\0", "\ud800", "[0]", "['weights']", ".x", "rbg", "threefry2x32", "0" * 32]
    ),
)  # fmt: skip
_numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from(
        [2**31, 2**32, 2**53, 2**59, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 10**4000]
    ),
)
_junk = st.recursive(
    st.none() | st.booleans() | _numbers | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a JSON document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield (*path, name)
        yield from _places(inner, (*path, name))


@st.composite
def _changed(draw: st.DrawFn, document: Any) -> tuple[Any, set[Any]]:
    """Draw a document with some values replaced, removed, doubled or renamed; and the names on their ways."""
    new, touched = copy.deepcopy(document), set()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(sorted(_places(new), key=repr) or [()]))
        if not place:
            continue
        touched |= set(place)
        holder = new
        for name in place[:-1]:
            holder = holder[name]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double"]))
        if change == "replace":
            holder[place[-1]] = draw(_junk)
        elif change == "remove":
            del holder[place[-1]]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        else:
            holder[draw(_texts)] = copy.deepcopy(holder[place[-1]])
    return new, touched


@st.composite
def _bytes_changed(draw: st.DrawFn, data: bytes) -> bytes:
    new = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(new) - 1, 0)))
        change = draw(st.sampled_from(["set", "insert", "remove", "cut", "copy"]))
        piece = draw(
            st.binary(min_size=1, max_size=12)
            | st.sampled_from([b"(9999999999999,)", b"|O", b"-", b"'", b"\xff" * 8])
        )
        if change == "set":
            new[start : start + len(piece)] = piece
        elif change == "insert":
            new[start:start] = piece
        elif change == "remove":
            del new[start : start + len(piece)]
        elif change == "cut":
            del new[start:]
        else:
            new[start:start] = new[: draw(st.integers(0, 200))]
    return bytes(new)


class Target:
    """A directory with one good step, to be changed and put right again."""

    def __init__(self, root: Path, tree: Any, serializer: str) -> None:
        self.root, self.tree = root, tree
        save_checkpoint(
            root, tree, step=5, metadata={"env": "Pong"}, metrics={"loss": 0.5}, serializer=serializer
        )
        self.folder = root / "step_5"
        self.good = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.fields = json.loads((self.folder / "manifest.json").read_bytes())
        del self.fields["checksum"]

    def reset(self) -> None:
        for name, data in self.good.items():
            (self.root / name).write_bytes(data)

    def write_manifest(self, fields: Any) -> None:
        body = json.dumps(fields)[1:].encode()
        line = b'{"checksum": "' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n'
        (self.folder / "manifest.json").write_bytes(line + body)


def _target(fast_folder: Any, tree: Any, serializer: str) -> Iterator[Target]:
    with fast_folder() as folder:
        target = Target(folder, tree, serializer)
        for like in (tree, None):
            load_checkpoint(folder, like, step=5)  # once unwatched
        yield target


@pytest.fixture(scope="module")
def target(fast_folder: Any, tree: Any) -> Iterator[Target]:
    yield from _target(fast_folder, tree, "eqx")


@pytest.fixture(scope="module")
def orbax_target(fast_folder: Any, tree: Any) -> Iterator[Target]:
    pytest.importorskip("orbax", reason='needs pip install "vibe-store[orbax]"')
    yield from _target(fast_folder, tree, "orbax")


def _check_same(new: Any, old: Any, *, values: bool) -> None:
    """Assert that a tree is of the structure and types of another, and, where ``values``, the same."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert type(one) is type(other) or callable(other)
        if isinstance(other, jax.Array | np.ndarray):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            if isinstance(other.dtype, np.dtype) and values:
                assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        elif values and not callable(other):
            assert one == other


def _try(watch: Any, is_sentence: Any, root: Path, door: Callable[[], Any]) -> Any:
    """Go through a door; return what is behind it, or None where it was refused as it should be."""
    result = None
    tracemalloc.start()
    start = time.monotonic()
    try:
        with watch() as seen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = door()
            except VibeStoreError as error:
                is_sentence(error)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < MOST_SECONDS
    # (Where a traceback is shortened, as JAX does, lines of source are read and compiled.)
    assert not [code for code in seen.code if not code.startswith("compile")]
    outside = seen.outside(root, Path(tempfile.gettempdir()) / "vibe_store-")
    # What a killed process left is looked for where temporary files are.
    assert not [path for path in outside if not path.endswith(".py") and path != tempfile.gettempdir()]
    return result


@fuzz
@given(data=st.data())
def test_a_manifest_changed_at_random(
    data: st.DataObject, target: Target, watch: Any, is_sentence: Any
) -> None:
    fields, touched = data.draw(_changed(target.fields))
    target.reset()
    target.write_manifest(fields)
    root, tree = target.root, target.tree
    loaded = _try(watch, is_sentence, root, lambda: load_checkpoint(root, tree, step=5))
    if loaded is not None:
        _check_same(loaded, tree, values="leaves" not in touched)
    _try(watch, is_sentence, root, lambda: load_checkpoint(root, None, step=5))
    _try(
        watch,
        is_sentence,
        root,
        lambda: load_checkpoint(root, {"weights": tree["weights"]}, step=5, partial=True),
    )
    _try(watch, is_sentence, root, lambda: load_metadata(root, step=5))
    _try(watch, is_sentence, root, lambda: load_eqx(root / "step_5/state.eqx", tree))
    _try(watch, is_sentence, root, lambda: verify_checkpoint(root))
    _try(watch, is_sentence, root, lambda: list_checkpoints(root))


@fuzz
@given(data=st.data())
def test_a_leaf_table_changed_at_random(
    data: st.DataObject, target: Target, watch: Any, is_sentence: Any
) -> None:
    good = target.good[Path("step_5/state.eqx")]
    length = int.from_bytes(good[-40:-32], "little")
    records, table, head = good[: -(length + 52)], good[-(length + 52) : -52], good[-52:-16]
    if data.draw(st.booleans()):
        table = json.dumps(data.draw(_changed(json.loads(table)))[0]).encode()
    else:
        table = data.draw(_bytes_changed(table))
    head = head[:12] + len(table).to_bytes(8, "little") + head[20:]
    path = target.root / "file.eqx"
    path.write_bytes(records + table + head + xxhash.xxh3_128_digest(table + head))
    try:
        loaded = _try(watch, is_sentence, target.root, lambda: load_eqx(path, target.tree))
        if loaded is not None:
            _check_same(loaded, target.tree, values=False)
        _try(watch, is_sentence, target.root, lambda: load_eqx(path, None))
    finally:
        path.unlink()


@fuzz
@given(data=st.data())
def test_a_file_changed_at_random_is_what_was_saved_or_refused(
    data: st.DataObject, target: Target, watch: Any, is_sentence: Any
) -> None:
    name = data.draw(st.sampled_from(sorted(name for name in target.good if name.parts[0] == "step_5")))
    target.reset()
    (target.root / name).write_bytes(data.draw(_bytes_changed(target.good[name])))
    loaded = _try(watch, is_sentence, target.root, lambda: load_checkpoint(target.root, target.tree, step=5))
    if loaded is not None:
        _check_same(loaded, target.tree, values=True)
    _try(watch, is_sentence, target.root, lambda: load_metadata(target.root, step=5))


@fuzz
@given(data=st.data())
def test_a_file_of_plain_equinox_changed_at_random(
    data: st.DataObject, target: Target, watch: Any, is_sentence: Any
) -> None:
    like = {"a": jnp.ones((2, 3)), "b": np.arange(4), "c": jnp.zeros(2, jnp.bfloat16), "d": 3, "e": True}
    path = target.root / "plain.eqx"
    eqx.tree_serialise_leaves(path, like)
    path.write_bytes(data.draw(_bytes_changed(path.read_bytes())))
    try:
        loaded = _try(watch, is_sentence, target.root, lambda: load_eqx(path, like))
        if loaded is not None:
            _check_same(loaded, like, values=False)
    finally:
        path.unlink()


@fuzz_orbax
@given(data=st.data())
def test_a_manifest_of_orbax_changed_at_random(
    data: st.DataObject, orbax_target: Target, watch: Any, is_sentence: Any
) -> None:
    target = orbax_target
    fields, touched = data.draw(_changed(target.fields))
    target.reset()
    target.write_manifest(fields)
    loaded = _try(watch, is_sentence, target.root, lambda: load_checkpoint(target.root, target.tree, step=5))
    if loaded is not None:
        _check_same(loaded, target.tree, values="leaves" not in touched)


@fuzz_orbax
@given(data=st.data())
def test_a_file_of_orbax_changed_at_random(
    data: st.DataObject, orbax_target: Target, watch: Any, is_sentence: Any
) -> None:
    target = orbax_target
    files = target.fields["items"]["state"]["files"]
    name = data.draw(st.sampled_from(sorted(files)))
    changed = data.draw(_bytes_changed(target.good[Path("step_5") / files[name]["key"]]))
    target.reset()
    (target.folder / files[name]["key"]).write_bytes(changed)
    fields = copy.deepcopy(target.fields)
    fields["items"]["state"]["files"][name] |= {
        "size": len(changed),
        "xxh3_128": xxhash.xxh3_128_hexdigest(changed),
    }
    target.write_manifest(fields)
    loaded = _try(watch, is_sentence, target.root, lambda: load_checkpoint(target.root, target.tree, step=5))
    if loaded is not None:
        _check_same(loaded, target.tree, values=False)


def test_the_good_checkpoint_loads(target: Target, watch: Any, is_sentence: Any) -> None:
    target.reset()
    loaded = _try(watch, is_sentence, target.root, lambda: load_checkpoint(target.root, target.tree, step=5))
    _check_same(loaded, target.tree, values=True)
    shutil.rmtree(target.root / ".vibe_store", ignore_errors=True)
