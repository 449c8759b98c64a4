"""SerializerContract: every promise of Serializer, as tests that the author of a serializer subclasses."""

import tempfile
import warnings
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vibe_store.errors import (
    CorruptCheckpointError,
    TemplateMismatchError,
    UnsupportedLeafError,
    VibeStoreWarning,
)
from vibe_store.interfaces import PyTree, Serializer
from vibe_store.serializers.tree import describe
from vibe_store.testing.generated_trees import Agent, ReorderedAgent, agent_trees, mutations
from vibe_store.testing.promise import promised_by
from vibe_store.testing.saving import FolderSource, Through
from vibe_store.testing.trees import (
    JAX_DTYPES,
    TREES,
    Model,
    assert_same,
    dtype_of,
    key_of,
    on_device,
    sample,
)

__all__ = ["SerializerContract"]

_Old = namedtuple("_Old", ["a", "b", "c"])
_New = namedtuple("_New", ["c", "a", "b"])


class SerializerContract:
    """Every promise of :class:`~vibe_store.interfaces.Serializer`. Subclass it and override ``serializer``::

    class TestMySerializer(SerializerContract):
        @pytest.fixture
        def serializer(self):
            return MySerializer()
    """

    refused_dtypes: ClassVar[frozenset[str]] = frozenset()
    """The element types that ``snapshot`` refuses with UnsupportedLeafError, as a leaf table names them."""

    examples: ClassVar[int] = 25
    """How many generated trees to try."""

    @pytest.fixture
    def serializer(self) -> Serializer:
        """The serializer under test. Override this."""
        raise NotImplementedError(f"{type(self).__name__} has to override the fixture 'serializer'.")

    @pytest.fixture
    def through(self, serializer: Serializer, tmp_path: Path) -> Through:
        """The serializer, and folders to save into and load from."""
        folder = tmp_path / "through"
        folder.mkdir()
        return Through(serializer, folder)

    # --- What is saved.

    @promised_by("Serializer.name")
    def test_it_has_the_name_by_which_it_is_found(self, serializer: Serializer) -> None:
        """``name`` is text that can stand in a manifest."""
        assert isinstance(serializer.name, str)
        assert serializer.name.strip()

    @pytest.mark.parametrize("kind", TREES)
    @promised_by("Serializer.save", "Serializer.load")
    def test_a_tree_comes_back_bit_for_bit(self, through: Through, kind: str) -> None:
        """What was saved is loaded with the type, the dtype, the shape and every bit of each leaf."""
        tree = TREES[kind](self.refused_dtypes)
        assert_same(through(through.serializer.snapshot(tree), tree), tree)

    @promised_by("Serializer.save")
    def test_a_live_tree_is_stored_like_its_snapshot(self, through: Through) -> None:
        """``save`` takes a tree as well as a snapshot of one, and stores the same."""
        tree = {"a": jnp.ones(2), "n": np.asfortranarray(np.eye(3)[:2]), "k": jax.random.key(0)}
        live, copied = through.save(tree), through.save(through.serializer.snapshot(tree))
        assert live.leaves == copied.leaves
        assert_same(through.load(live, tree), tree)
        assert_same(through.load(copied, tree), tree)

    @promised_by("SavedItem")
    def test_the_leaf_table_says_what_each_leaf_was(self, through: Through) -> None:
        """The leaf table has a row for each leaf, in the tree's order, that says what the leaf was."""
        tree = [
            on_device(np.ones((2, 3), ml_dtypes.bfloat16)), np.ones(2, np.int16), np.int8(1),
            key_of(0, "rbg", (2,)), True, 2**63, 0.5, 1j, "text", b"\xff",
            jax.nn.relu, None, {"b": 1, "a": on_device(np.float32(0))},
        ]  # fmt: skip
        for saved in (tree, through.serializer.snapshot(tree)):
            rows = through.save(saved).leaves
            assert [replace(row, offset=None, checksum=None) for row in rows] == [*describe(tree)]

    @promised_by("FileEntry")
    def test_every_file_is_listed_with_its_size_and_checksum(self, through: Through) -> None:
        """``save`` returns every file that it wrote, with its size and the xxh3-128 of its bytes."""
        source = through.save({"a": jnp.ones(2), "s": "x", "b": 1})
        found = {path.relative_to(source.folder).as_posix(): path for path in source.folder.rglob("*")}
        assert {*source.files} == {name for name, path in found.items() if not path.is_dir()}
        for name in source.files:
            source.path(name)  # which compares size and checksum

    @promised_by("Serializer.save")
    def test_two_items_share_a_folder(self, serializer: Serializer, tmp_path: Path) -> None:
        """Items of one checkpoint are saved into one folder: no file of one is a file of another."""
        trees = {"state": {"a": jnp.ones(2)}, "runner": {"b": np.zeros(3)}, "state-2": np.arange(5)}
        saved = {name: serializer.save(tree, tmp_path, name) for name, tree in trees.items()}
        names = [entry.name for item in saved.values() for entry in item.files]
        assert len({*names}) == len(names)
        for name, tree in trees.items():
            assert_same(serializer.load(FolderSource(tmp_path, saved[name]), name, tree), tree)

    @promised_by("Serializer")
    def test_no_option_is_needed_to_load(self, through: Through, serializer: Serializer) -> None:
        """A checkpoint is loaded by a serializer that was made without options, whatever its writer had."""
        tree = {"a": jnp.ones(2), "n": np.arange(3), "s": "x"}
        assert_same(type(serializer)().load(through.save(tree), "state", tree), tree)

    @promised_by("Serializer.save")
    def test_any_thread_saves(self, through: Through) -> None:
        """``save`` may be called from any thread, two of them at once as well."""
        trees = [{"a": jnp.full(1000, seed), "k": jax.random.key(seed)} for seed in range(4)]
        with ThreadPoolExecutor(2) as pool:
            saved = list(pool.map(through.save, map(through.serializer.snapshot, trees)))
        for source, tree in zip(saved, trees, strict=True):
            assert_same(through.load(source, tree), tree)

    @promised_by("Serializer.save", "Serializer.load")
    def test_numpy_arrays_of_any_layout_come_back_by_value(self, through: Through, tmp_path: Path) -> None:
        """A NumPy array of any layout comes back by value, as a contiguous array that can be written to."""
        base = np.arange(24, dtype=np.int16).reshape(4, 6)
        mapped = np.memmap(tmp_path / "data", np.float32, "w+", shape=(3,))
        mapped[:] = [1, 2, 3]
        tree: dict[str, Any] = {
            "F": np.asfortranarray(base),
            "strided": base[::-2, ::3],
            "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
            "read-only": np.frombuffer(base.tobytes(), np.int16),
            "broadcast": np.broadcast_to(np.int32(5), (2, 3)),
            "mapped": mapped,
        }
        if ">i2" not in self.refused_dtypes:
            tree["other order"] = base.astype(">i2")[::-1]
        for saved in (tree, through.serializer.snapshot(tree)):
            loaded = through(saved, tree)
            assert_same(loaded, tree)
            assert {name: type(array) for name, array in loaded.items()} == dict.fromkeys(tree, np.ndarray)
            assert [name for name, array in loaded.items() if not array.flags.c_contiguous] == []
            assert [name for name, array in loaded.items() if not array.flags.writeable] == []

    @promised_by("Serializer.save", "Serializer.load")
    def test_any_tree_comes_back_and_a_template_that_differs_in_one_leaf_is_refused(
        self, serializer: Serializer
    ) -> None:
        """Every tree comes back, and no template that differs from it in any one leaf is loaded into."""

        @settings(max_examples=self.examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(tree=agent_trees(self.refused_dtypes), data=st.data())
        def check(tree: PyTree, data: st.DataObject) -> None:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("error")
                saved = serializer.save(serializer.snapshot(tree), Path(folder), "state")
                source = FolderSource(Path(folder), saved)
                assert_same(serializer.load(source, "state", tree), tree)
                if isinstance(tree, Agent):
                    reordered = ReorderedAgent(**tree._asdict())
                    assert_same(serializer.load(source, "state", reordered), reordered)
                for how, like, paths in mutations(tree, lambda options: data.draw(st.sampled_from(options))):
                    refused = _refusal(serializer.load, source, "state", like)
                    assert {*refused.paths} == paths, how
                    assert [path for path in paths if path not in str(refused)] == [], how

        check()

    # --- Snapshots.

    @promised_by("Serializer.snapshot")
    def test_donation_and_mutation_after_a_snapshot_do_not_change_it(self, through: Through) -> None:
        """After ``snapshot`` the caller may donate its arrays and change its NumPy leaves in place."""
        tree: dict[str, Any] = {
            "jax": jnp.arange(100_000.0),
            "numpy": np.arange(1000),
            "strided": np.arange(20)[::2],
            "key": jax.random.key(5),
            "half": jnp.ones(64, jnp.bfloat16),
        }
        want = jax.tree.map(lambda leaf: leaf.copy(), tree)
        snapshot = through.serializer.snapshot(tree)
        donated = [tree["jax"], tree["half"], tree["key"]]
        overwrite = jax.jit(
            lambda a, b, key: (a * 0 - 1, b * 0, jax.random.split(key)[0]), donate_argnums=(0, 1, 2)
        )
        jax.block_until_ready(overwrite(*donated))
        tree["numpy"][:] = -1
        tree["strided"][:] = -1
        assert_same(through(snapshot, want), want)

    @promised_by("Serializer.snapshot")
    def test_a_snapshot_leaves_the_tree_as_it_was(self, serializer: Serializer) -> None:
        """``snapshot`` changes nothing of the tree, which may be saved again."""
        tree = {"a": jnp.arange(3.0), "n": np.arange(3), "k": jax.random.key(0), "s": "x"}
        before = jax.tree.map(lambda leaf: leaf if isinstance(leaf, str) else leaf.copy(), tree)
        first = serializer.snapshot(tree)
        serializer.snapshot(tree)
        serializer.snapshot({"a": jnp.zeros(3)}, reuse=first)
        assert_same(tree, before)

    @promised_by("Serializer.snapshot")
    def test_the_memory_of_a_snapshot_that_nobody_uses_may_be_taken(self, through: Through) -> None:
        """``reuse`` is memory and no more: the new snapshot is of its own tree, whatever the old one was."""
        snapshot = through.serializer.snapshot

        def tree(seed: int) -> dict[str, Any]:
            return {"j": jnp.arange(4096.0) + seed, "n": np.arange(10) + seed, "k": jax.random.key(seed)}

        again = snapshot(tree(2), reuse=snapshot(tree(1)))
        assert_same(through(again, tree(2)), tree(2))
        others: list[Any] = [
            {"j": jnp.arange(4096), "n": np.arange(11), "k": jax.random.key(3, impl="rbg")},
            {"j": np.arange(3), "k": "text"},
            [np.arange(10)],
            1,
            None,
        ]
        for other in others:
            assert_same(through(snapshot(other, reuse=snapshot(tree(1))), other), other)

    @promised_by("Serializer.snapshot")
    def test_a_leaf_that_cannot_be_stored_is_refused_by_path(self, serializer: Serializer) -> None:
        """``snapshot`` raises UnsupportedLeafError, which names the path of the leaf."""
        deleted = jnp.ones(3)
        deleted.delete()
        leaves: dict[str, Any] = {
            "an object": object(),
            "a set": {1},
            "objects": np.array([None, 1], dtype=object),
            "deleted": deleted,
            "a struct": jax.ShapeDtypeStruct((), jnp.float32),
        }
        for dtype in sorted(self.refused_dtypes):
            leaves[f"numpy {dtype}"] = sample(dtype_of(dtype))
            if dtype in JAX_DTYPES:
                leaves[f"jax {dtype}"] = on_device(sample(dtype_of(dtype)))
        raised: dict[str, Any] = {}
        for name, leaf in leaves.items():
            try:
                raised[name] = serializer.snapshot({"fine": 1, "params": {name: leaf}})
            except UnsupportedLeafError as error:
                if f"['params']['{name}']" in str(error):
                    continue
                raised[name] = error
        assert raised == {}

    @promised_by("Serializer.snapshot")
    def test_a_snapshot_inside_jit_says_so(self, serializer: Serializer) -> None:
        """An array that has no value yet, inside ``jit``, is refused by path as well."""

        def inside(x: jax.Array) -> jax.Array:
            serializer.snapshot({"x": x})
            return x

        with pytest.raises(UnsupportedLeafError, match=r"\['x'\]"):
            jax.jit(inside)(jnp.ones(3))

    # --- Templates.

    @promised_by("Serializer.load")
    def test_the_template_decides_between_jax_arrays_numpy_arrays_and_numpy_scalars(
        self, through: Through
    ) -> None:
        """Data of one dtype and shape becomes what the template has in its place."""
        tree = [jnp.float32(1), np.array(2, np.float32), np.float32(3), np.ones(2, np.int8)]
        like = [np.float32(0), jnp.float32(0), np.array(0, np.float32), jax.ShapeDtypeStruct((2,), jnp.int8)]
        want = [np.float32(1), jnp.float32(2), np.array(3, np.float32), jnp.ones(2, jnp.int8)]
        assert_same(through(tree, like), want)

    @promised_by("Serializer.load")
    def test_a_template_of_shapes_gives_the_saved_tree(self, through: Through) -> None:
        """A template may be of ``jax.ShapeDtypeStruct``, typed keys included."""

        def make() -> PyTree:
            keys = jax.random.split(jax.random.key(3, impl="rbg"), 2)
            return {
                "model": Model(jnp.ones(2), jax.nn.relu, 0.5, ""),
                "keys": keys,
                "b": jnp.ones(3, "bfloat16"),
            }

        tree = make()
        assert_same(through(tree, eqx.filter_eval_shape(make)), tree)

    @promised_by("Serializer.load")
    def test_a_template_whose_arrays_were_donated_still_serves(self, through: Through) -> None:
        """The values of a template are not looked at."""
        tree = {"a": jnp.arange(3), "key": jax.random.key(0)}
        like = {"a": jnp.zeros(3, jnp.int32), "key": jax.random.key(1)}
        like["a"].delete()
        like["key"].delete()
        assert_same(through(tree, like), tree)

    @promised_by("Serializer.load")
    def test_loaded_arrays_are_strongly_typed_uncommitted_and_can_be_donated(self, through: Through) -> None:
        """Loaded arrays own their memory: they can be donated. Nothing ties them to a device."""
        tree = {f"{size}": jnp.full((size,), 2.0) for size in (1, 16, 1 << 20)} | {"weak": jnp.asarray(1.0)}
        loaded = through(tree)
        assert [name for name, leaf in loaded.items() if leaf.weak_type or leaf.committed] == []
        doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)(loaded)
        assert [name for name, leaf in loaded.items() if not leaf.is_deleted()] == []
        assert float(doubled["16"].sum()) == 64

    @promised_by("Serializer.load")
    def test_a_committed_template_commits_what_is_loaded(self, through: Through) -> None:
        """Arrays and keys are put on the devices of a template that says which."""
        device = jax.devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        tree = {"a": jax.device_put(jnp.arange(3), device), "key": jax.device_put(jax.random.key(0), device)}
        structs = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in tree.items()
        }
        source = through.save(tree)
        for like in (tree, structs):
            loaded = through.load(source, like)
            assert_same(loaded, tree)
            assert {name: leaf.committed for name, leaf in loaded.items()} == {"a": True, "key": True}

    @promised_by("Serializer.load")
    def test_leaves_are_matched_by_path_so_a_reordered_namedtuple_loads_right(self, through: Through) -> None:
        """A leaf is found by its path, wherever it stands in the tree."""
        tree = _Old(jnp.arange(3), jnp.arange(3, 6), jnp.arange(6, 9))
        like = _New(*[jnp.zeros(3, jnp.int32)] * 3)
        assert_same(through(tree, like), _New(tree.c, tree.a, tree.b))

    @promised_by("Leaf")
    def test_callables_are_the_templates_without_a_warning_when_the_names_agree(
        self, through: Through
    ) -> None:
        """A callable is not stored: the template's own is taken."""
        tree = [jax.nn.relu, jax.jit(jnp.sin), np.add, int, abs]
        assert through(tree) == tree

    @promised_by("Serializer.load")
    def test_a_callable_of_another_name_is_warned_about_by_path(self, through: Through) -> None:
        """Where a callable of another name was saved, a VibeStoreWarning says so, with the path."""
        tree = Model(jnp.ones(2), jax.nn.relu, 0.5, "label")
        like = Model(jnp.zeros(2), jnp.tanh, 0.0, "label")
        with pytest.warns(VibeStoreWarning, match=r"\.activation"):
            loaded = through(tree, like)
        assert loaded.activation is jnp.tanh

    @promised_by("Serializer.load")
    def test_a_partial_template_gets_its_leaves(self, through: Through) -> None:
        """With ``partial=True`` the checkpoint may hold leaves that the template does not."""
        tree = {
            "a": jnp.arange(3),
            "b": [np.ones(5), np.zeros((0, 2)), "s"],
            "c": {"d": np.int8(7), "e": [1j, jax.random.key(3)]},
        }
        source = through.save(tree)
        parts: list[tuple[Any, Any]] = [
            ({"a": tree["a"]}, {"a": tree["a"]}),
            (
                {"b": [np.zeros(5)], "c": {"e": [0j, jax.random.key(0)]}},
                {"b": [np.ones(5)], "c": {"e": [1j, jax.random.key(3)]}},
            ),
            ({"b": [np.zeros(5), np.zeros((0, 2)), ""]}, {"b": [np.ones(5), np.zeros((0, 2)), "s"]}),
            ({}, {}),
        ]
        for like, want in parts:
            assert_same(through.load(source, like, partial=True), want)

    @promised_by("Serializer.load")
    def test_int64_comes_back_when_x64_is_enabled(self, through: Through) -> None:
        """JAX arrays of 64 bits come back as such where JAX has them."""
        if {"int64", "float64"} & self.refused_dtypes:
            pytest.skip("this serializer refuses int64 or float64 (refused_dtypes)")
        with jax.enable_x64(True):
            tree = {"i": jnp.asarray([2**40]), "f": jnp.asarray([1 + 2**-50])}
            loaded = through(tree, jax.eval_shape(lambda: tree))
            assert_same(loaded, tree)
            assert loaded["i"].dtype == jnp.int64

    # --- Refusals.

    @promised_by("Serializer.load")
    def test_one_differing_leaf_is_refused_by_path(self, through: Through) -> None:
        """TemplateMismatchError names the leaf that differs in path, shape, dtype or kind; none is cast."""
        source = through.save(_base())
        wrong: dict[str, Any] = {}
        for path, make in _CHANGES:
            like, place = _changed(path, make()), "".join(f"['{name}']" for name in path.split("/"))
            try:
                wrong[f"{path}: {make()}"] = through.load(source, like)
            except TemplateMismatchError as error:
                named = all(found.startswith(place) for found in error.paths) and place in str(error)
                if not named or not len(error.differences) == len(error.paths) >= 1:
                    wrong[f"{path}: {make()}"] = error
        assert wrong == {}

    @promised_by("Serializer.load")
    def test_all_differences_are_in_one_error(self, through: Through) -> None:
        """TemplateMismatchError holds every difference, a renamed leaf as one missing and one new."""
        like = _base()
        like["params"]["weight"] = like["params"].pop("w")
        refused = _refusal(through, _base(), like)
        assert {*refused.paths} == {"['params']['weight']", "['params']['w']"}
        refused = _refusal(through, (jnp.ones(2), jnp.ones(3)), (jnp.ones(3), jnp.ones(2)))
        assert refused.paths == ("[0]", "[1]")
        refused = _refusal(through, [jnp.ones(2)] * 30, [jnp.ones(3)] * 30)
        assert [*refused.paths] == [f"[{index}]" for index in range(30)]
        assert len(refused.differences) == 30

    @promised_by("Serializer.load")
    def test_a_template_that_jax_would_cast_without_x64_is_refused(self, through: Through) -> None:
        """Where JAX would make 32 bits of 64, TemplateMismatchError says so instead."""
        for dtype in {"float64", "int64", "uint64", "complex128"} - self.refused_dtypes:
            source = through.save({"a": np.ones(3, dtype)})
            like = {"a": jax.ShapeDtypeStruct((3,), np.dtype(dtype))}
            refused = _refusal(through.load, source, like)
            assert refused.paths == ("['a']",)

    @promised_by("Serializer.load")
    def test_partial_allows_extra_leaves_but_never_missing_or_differing_ones(self, through: Through) -> None:
        """``partial=True`` allows no leaf of the template to be missing or to differ."""
        source = through.save({"a": jnp.ones(2), "b": 1, "c": "x"})
        refused = _refusal(through.load, source, {"a": jnp.ones(3), "new": 1}, partial=True)
        assert refused.paths == ("['a']", "['new']")
        refused = _refusal(through.load, source, {"a": jnp.ones(2)})
        assert refused.paths == ("['b']", "['c']")

    @promised_by("Serializer.load", "Source")
    def test_a_changed_bit_is_never_loaded(self, through: Through) -> None:
        """Where a file is not what was saved, ``load`` raises CorruptCheckpointError and returns nothing."""
        tree = {"a": jnp.arange(50.0), "n": np.arange(40), "k": jax.random.key(3)}
        loaded: dict[tuple[str, int], Any] = {}
        source = through.save(tree)
        for name, entry in source.files.items():
            path = source.folder / name
            good = path.read_bytes()
            for place in {0, entry.size // 2, entry.size - 1} if good else set[int]():
                path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
                with suppress(CorruptCheckpointError):
                    loaded[name, place] = through.load(source, tree)
            path.write_bytes(good[: entry.size // 2] if good else b"more")
            with suppress(CorruptCheckpointError):
                loaded[name, -1] = through.load(source, tree)
            path.write_bytes(good)
        assert loaded == {}
        assert_same(through.load(source, tree), tree)


def _refusal(load: Callable[..., object], *arguments: object, **options: object) -> TemplateMismatchError:
    with pytest.raises(TemplateMismatchError) as refused:
        load(*arguments, **options)
    return refused.value


def _base() -> dict[str, Any]:
    return {
        "params": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3), "half": jnp.ones(2, jnp.bfloat16)},
        "key": jax.random.key(0),
        "numpy": np.arange(4, dtype=np.int32),
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


_CHANGES: list[tuple[str, Callable[[], Any]]] = [
    ("params/w", lambda: jnp.ones((3, 2))),
    ("params/w", lambda: jnp.ones((2, 3, 1))),
    ("params/w", lambda: jnp.ones((2, 3), jnp.float16)),
    ("params/w", lambda: jnp.ones((2, 3), jnp.int32)),
    ("params/w", lambda: None),
    ("params/w", lambda: [jnp.ones((2, 3))]),
    ("params/w", lambda: jax.random.key(0)),
    ("params/half", lambda: jnp.ones(2, jnp.float16)),
    ("params/half", lambda: jnp.ones(2, jnp.float32)),
    ("params/half", lambda: np.ones(2, ml_dtypes.float8_e4m3fn)),
    ("params/new", lambda: jnp.ones(2)),
    ("none", lambda: jnp.ones(2)),
    ("key", lambda: jax.random.key(0, impl="rbg")),
    ("key", lambda: jax.random.split(jax.random.key(0))),
    ("key", lambda: jax.random.PRNGKey(0)),
    ("key", lambda: jax.ShapeDtypeStruct((2,), jax.random.key(0).dtype)),
    ("numpy", lambda: np.arange(4, dtype=">i4")),
    ("numpy", lambda: np.arange(4, dtype=np.int64)),
    ("numpy", lambda: np.arange(4).astype("M8[s]")),
    ("scalar", lambda: np.float64(1)),
    ("scalar", lambda: 1.0),
    ("flag", lambda: 1),
    ("int", lambda: True),
    ("int", lambda: 1.0),
    ("int", lambda: np.int64(1)),
    ("float", lambda: jnp.float32(1)),
    ("complex", lambda: 1.0),
    ("str", lambda: b"a"),
    ("str", lambda: jnp.sin),
    ("bytes", lambda: "a"),
    ("function", lambda: "jax.numpy.sin"),
    ("function", lambda: None),
]
"""One leaf of the tree of ``_base``, and what a template has in its place."""


def _changed(path: str, value: Any) -> dict[str, Any]:
    tree = _base()
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
        node = node[parent]
    node[name] = value
    return tree
