"""Each of these serializers breaks one promise, and the contract of serializers catches it."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.errors import CorruptCheckpointError, TemplateMismatchError, VibeStoreWarning
from vibe_store.interfaces import FileEntry, Leaf, SavedItem, Serializer, Source
from vibe_store.serializers.eqx import EqxSerializer
from vibe_store.serializers.template import template_of
from vibe_store.testing import SerializerContract

pytestmark = [pytest.mark.proof, pytest.mark.xdist_group("serializer_mutants")]


class Eqx(SerializerContract):
    """The contract, of the serializer ``eqx``."""

    Serializer: ClassVar[Callable[[], Serializer]] = EqxSerializer
    examples = 5

    @pytest.fixture
    def serializer(self) -> Serializer:
        return type(self).Serializer()


def test_a_mutant_is_caught_by_the_test_of_what_it_breaks(
    mutant: type[Any], assert_caught: Callable[[type[Any]], None]
) -> None:
    assert_caught(mutant)


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class LoadsWhatever(EqxSerializer):
    """Loads what there is, whatever the template, for mutants to make something of it."""

    def saved(self, source: Source, item: str) -> dict[str, Any]:
        like = template_of(source.leaves)
        loaded = super().load(source, item, like)
        return dict(zip((row.path for row in source.leaves), jax.tree.leaves(loaded), strict=True))


def by_path(like: Any, change: Callable[[str, Any], Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(jax.tree_util.keystr(path), leaf), like)


# --- Saving.


class MakesFloat32OfBfloat16(Eqx):
    unmutated = Eqx
    caught_by = "test_a_tree_comes_back_bit_for_bit[jax arrays]"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            widened = jax.tree.map(
                lambda leaf: (
                    leaf.astype(jnp.float32) if getattr(leaf, "dtype", None) == jnp.bfloat16 else leaf
                ),
                tree,
            )
            return super().snapshot(widened, **options)

        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            def widened(leaf: Any) -> Any:
                if getattr(leaf, "dtype", None) != jnp.bfloat16:
                    return leaf
                return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)

            return super().load(source, item, jax.tree.map(widened, like), **options)


class NeedsItsOptionToLoad(Eqx):
    unmutated = Eqx
    caught_by = "test_no_option_is_needed_to_load"

    class Serializer(EqxSerializer):
        def __init__(self, secret: int = 0) -> None:
            self.secret = secret

        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            if self.secret == 0:
                raise CorruptCheckpointError("That is not how it was written.")
            return super().load(source, item, like, **options)

    @pytest.fixture
    def serializer(self) -> Serializer:
        return type(self).Serializer(3)


class LosesTheImplementationOfKeys(Eqx):
    unmutated = Eqx
    caught_by = "test_a_tree_comes_back_bit_for_bit[keys]"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            def as_rbg(leaf: Any) -> Any:
                if is_key(leaf) and str(jax.random.key_impl(leaf)) == "unsafe_rbg":
                    return jax.random.wrap_key_data(jax.random.key_data(leaf), impl="rbg")
                return leaf

            return jax.tree.map(as_rbg, super().load(source, item, like, **options))


class LosesTheSignOfZero(Eqx):
    unmutated = Eqx
    caught_by = "test_a_tree_comes_back_bit_for_bit[scalars]"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            plain = jax.tree.map(lambda leaf: leaf + 0.0 if type(leaf) is float else leaf, tree)
            return super().snapshot(plain, **options)


class MakesOneNaNOfAll(Eqx):
    unmutated = Eqx
    caught_by = "test_a_tree_comes_back_bit_for_bit[float bits]"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            def plain(leaf: Any) -> Any:
                if isinstance(leaf, np.ndarray) and leaf.dtype == np.float32:
                    return np.where(np.isnan(leaf), np.float32("nan"), leaf)
                return leaf

            return super().snapshot(jax.tree.map(plain, tree), **options)


class SwallowsALeaf(Eqx):
    unmutated = Eqx
    caught_by = "test_the_leaf_table_says_what_each_leaf_was"

    class Serializer(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            saved = super().save(tree, directory, item)
            return replace(saved, leaves=tuple(row for row in saved.leaves if row.kind != "callable"))


class ReordersTheLeafTable(Eqx):
    unmutated = Eqx
    caught_by = "test_the_leaf_table_says_what_each_leaf_was"

    class Serializer(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            saved = super().save(tree, directory, item)
            return replace(saved, leaves=saved.leaves[::-1])


class LeavesAFileThatItDoesNotList(Eqx):
    unmutated = Eqx
    caught_by = "test_every_file_is_listed_with_its_size_and_checksum"

    class Serializer(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            (directory / f"{item}.tmp").touch()
            return super().save(tree, directory, item)


class ListsAnotherChecksum(Eqx):
    unmutated = Eqx
    caught_by = "test_every_file_is_listed_with_its_size_and_checksum"

    class Serializer(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            saved = super().save(tree, directory, item)
            return replace(saved, files=tuple(replace(file, checksum="0" * 32) for file in saved.files))


class NamesAllFilesAlike(Eqx):
    unmutated = Eqx
    caught_by = "test_two_items_share_a_folder"

    class Serializer(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            (directory / f"{item[0]}.eqx").unlink(missing_ok=True)
            return super().save(tree, directory, item[0])

        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            return super().load(source, item[0], like, **options)


class SharesAScratchPadAmongThreads(Eqx):
    unmutated = Eqx
    caught_by = "test_any_thread_saves"

    class Serializer(EqxSerializer):
        def save(self, tree: Any, directory: Path, item: str) -> SavedItem:
            self.__dict__["pad"] = tree
            time.sleep(0.01)
            return super().save(self.__dict__["pad"], directory, item)


# --- Snapshots.


class SnapshotsShareMemory(Eqx):
    unmutated = Eqx
    caught_by = "test_donation_and_mutation_after_a_snapshot_do_not_change_it"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            super().snapshot(tree, **options)
            return jax.tree.map(lambda leaf: leaf if isinstance(leaf, np.ndarray) else jnp.copy(leaf), tree)


class ReusesTheValuesToo(Eqx):
    unmutated = Eqx
    caught_by = "test_the_memory_of_a_snapshot_that_nobody_uses_may_be_taken"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, *, reuse: Any = None) -> Any:
            return super().snapshot(tree) if reuse is None else reuse


class SnapshotsSpoilTheTree(Eqx):
    unmutated = Eqx
    caught_by = "test_a_snapshot_leaves_the_tree_as_it_was"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            taken = super().snapshot(tree, **options)
            for leaf in jax.tree.leaves(tree):
                if isinstance(leaf, np.ndarray) and leaf.flags.writeable:
                    leaf[...] = 0
            return taken


class StoresTheTextOfAnObject(Eqx):
    unmutated = Eqx
    caught_by = "test_a_leaf_that_cannot_be_stored_is_refused_by_path"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            return super().snapshot(
                jax.tree.map(lambda leaf: str(leaf) if type(leaf) is object else leaf, tree), **options
            )


class RefusesALeafWithoutItsPath(Eqx):
    unmutated = Eqx
    caught_by = "test_a_leaf_that_cannot_be_stored_is_refused_by_path"

    class Serializer(EqxSerializer):
        def snapshot(self, tree: Any, **options: Any) -> Any:
            try:
                return super().snapshot(tree, **options)
            except TypeError as error:
                raise type(error)("A leaf cannot be stored.") from None


# --- Loading.


class CastsToTheTemplate(Eqx):
    unmutated = Eqx
    caught_by = "test_one_differing_leaf_is_refused_by_path"

    class Serializer(LoadsWhatever):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            try:
                return super().load(source, item, like, **options)
            except TemplateMismatchError as error:
                if not all(": dtype" in each and ";" not in each for each in error.differences):
                    raise
            saved = self.saved(source, item)
            return by_path(
                like,
                lambda path, leaf: saved[path].astype(leaf.dtype) if hasattr(leaf, "dtype") else saved[path],
            )


class LoadsIntoAnyShape(Eqx):
    unmutated = Eqx
    caught_by = "test_all_differences_are_in_one_error"

    class Serializer(LoadsWhatever):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            try:
                return super().load(source, item, like, **options)
            except TemplateMismatchError as error:
                if not all(": shape" in each for each in error.differences):
                    raise
            saved = self.saved(source, item)
            return by_path(like, lambda path, _: saved[path])


class MatchesLeavesByTheirOrder(Eqx):
    unmutated = Eqx
    caught_by = "test_leaves_are_matched_by_path_so_a_reordered_namedtuple_loads_right"

    class Serializer(LoadsWhatever):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            super().load(source, item, like, **options)
            return jax.tree.unflatten(jax.tree.structure(like), self.saved(source, item).values())


class KeepsTheTemplatesLeafWhereNothingWasSaved(Eqx):
    unmutated = Eqx
    caught_by = "test_partial_allows_extra_leaves_but_never_missing_or_differing_ones"

    class Serializer(LoadsWhatever):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            saved = self.saved(source, item)
            try:
                return super().load(source, item, like, **options)
            except TemplateMismatchError as error:
                if any("nothing was saved there" not in each for each in error.differences[1:]):
                    raise
            return by_path(like, lambda path, leaf: saved.get(path, leaf))


class IsAlwaysPartial(Eqx):
    unmutated = Eqx
    caught_by = "test_partial_allows_extra_leaves_but_never_missing_or_differing_ones"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, *, partial: bool = False) -> Any:
            del partial
            return super().load(source, item, like, partial=True)


class SaysOneDifferenceOfAll(Eqx):
    unmutated = Eqx
    caught_by = "test_all_differences_are_in_one_error"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            try:
                return super().load(source, item, like, **options)
            except TemplateMismatchError as error:
                raise TemplateMismatchError(
                    error.differences[0], differences=error.differences[:1], paths=error.paths[:1]
                ) from None


class LetsJaxCast64Bits(Eqx):
    unmutated = Eqx
    caught_by = "test_a_template_that_jax_would_cast_without_x64_is_refused"

    class Serializer(LoadsWhatever):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            try:
                return super().load(source, item, like, **options)
            except TemplateMismatchError as error:
                if "jax_enable_x64" not in str(error):
                    raise
            saved = self.saved(source, item)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return by_path(like, lambda path, _: jnp.asarray(saved[path]))


class MakesJaxArraysOfAll(Eqx):
    unmutated = Eqx
    caught_by = "test_the_template_decides_between_jax_arrays_numpy_arrays_and_numpy_scalars"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            loaded = super().load(source, item, like, **options)
            return jax.tree.map(lambda leaf: jnp.asarray(leaf) if hasattr(leaf, "dtype") else leaf, loaded)


class ReadsTheValuesOfTheTemplate(Eqx):
    unmutated = Eqx
    caught_by = "test_a_template_whose_arrays_were_donated_still_serves"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            like = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, like)
            return super().load(source, item, like, **options)


class TiesArraysToADevice(Eqx):
    unmutated = Eqx
    caught_by = "test_loaded_arrays_are_strongly_typed_uncommitted_and_can_be_donated"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            loaded = super().load(source, item, like, **options)
            return jax.tree.map(
                lambda leaf: jax.device_put(leaf, jax.devices()[0]) if isinstance(leaf, jax.Array) else leaf,
                loaded,
            )


class ForgetsWhereTheTemplateIs(Eqx):
    unmutated = Eqx
    caught_by = "test_a_committed_template_commits_what_is_loaded"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            anywhere = jax.tree.map(
                lambda leaf: (
                    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
                    else leaf
                ),
                like,
            )
            return super().load(source, item, anywhere, **options)


class ReturnsArraysThatCannotBeWrittenTo(Eqx):
    unmutated = Eqx
    caught_by = "test_numpy_arrays_of_any_layout_come_back_by_value"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            loaded = super().load(source, item, like, **options)
            for leaf in jax.tree.leaves(loaded):
                if isinstance(leaf, np.ndarray):
                    leaf.setflags(write=False)
            return loaded


class SaysNothingOfAnotherCallable(Eqx):
    unmutated = Eqx
    caught_by = "test_a_callable_of_another_name_is_warned_about_by_path"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VibeStoreWarning)
                return super().load(source, item, like, **options)


class Unverified(Source):
    """The files as they are."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self.inner.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return self.inner.files

    def path(self, name: str) -> Path:
        return self.inner.folder / name

    def open(self, name: str) -> BinaryIO:
        return (self.inner.folder / name).open("rb", buffering=0)

    def read_part(self, name: str, start: int, buffer: memoryview, checksum: str) -> None:
        del checksum
        buffer[:] = (self.inner.folder / name).read_bytes()[start : start + len(buffer)]


class DoesNotVerify(Eqx):
    unmutated = Eqx
    caught_by = "test_a_changed_bit_is_never_loaded"

    class Serializer(EqxSerializer):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            return super().load(Unverified(source), item, like, **options)


class HasNoName(Eqx):
    unmutated = Eqx
    caught_by = "test_it_has_the_name_by_which_it_is_found"

    class Serializer(EqxSerializer):
        name = ""


class CannotTakeADictOfOneKind(Eqx):
    unmutated = Eqx
    caught_by = "test_any_tree_comes_back_and_a_template_that_differs_in_one_leaf_is_refused"

    class Serializer(LoadsWhatever):
        def load(self, source: Source, item: str, like: Any, **options: Any) -> Any:
            try:
                return super().load(source, item, like, **options)
            except TemplateMismatchError as error:
                if any("key implementation" not in each for each in error.differences):
                    raise
            return like
