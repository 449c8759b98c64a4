"""Each of these storages breaks one promise, and the contract of storages catches it."""

import os
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import StorageContract, StorageRoot

pytestmark = [pytest.mark.proof, pytest.mark.xdist_group("storage_mutants")]


class InMemory(StorageContract):
    """The contract, of a storage in memory."""

    Storage: ClassVar[Callable[[str], StorageBackend]] = MemoryStorage

    @pytest.fixture
    def root(self) -> StorageRoot:
        fs, path = MemoryFileSystem(), f"/{uuid.uuid4().hex}"

        def raw_set(key: str, data: bytes) -> None:
            fs.store[f"{path}/{key}"] = MemoryFile(fs, f"{path}/{key}", data)

        def raw_get(key: str) -> bytes | None:
            file = fs.store.get(f"{path}/{key}")
            return None if file is None else file.getvalue()

        return StorageRoot(
            lambda: type(self).Storage(f"memory:/{path}"), raw_set, raw_get, secrets=("hunter2",)
        )


class OnDisk(StorageContract):
    """The contract, of a storage on a local disk."""

    Storage: ClassVar[Callable[[str], StorageBackend]] = LocalStorage
    creates_conditionally: ClassVar[bool] = True

    @pytest.fixture
    def root(self, tmp_path: Path) -> StorageRoot:
        folder = tmp_path / "root"

        def raw_set(key: str, data: bytes) -> None:
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)

        def raw_get(key: str) -> bytes | None:
            return (folder / key).read_bytes() if (folder / key).is_file() else None

        return StorageRoot(
            lambda: type(self).Storage(str(folder)),
            raw_set,
            raw_get,
            creates_conditionally=self.creates_conditionally,
        )


class ThroughFsspec(OnDisk):
    """The contract, of a storage that cannot create conditionally."""

    Storage = FsspecStorage
    creates_conditionally = False


def test_a_mutant_is_caught_by_the_test_of_what_it_breaks(
    mutant: type[Any], assert_caught: Callable[[type[Any]], None]
) -> None:
    assert_caught(mutant)


def test_a_failure_shows_the_values(outcomes: dict[tuple[str, str], str]) -> None:
    said = outcomes[AppendsOnOverwrite.__name__, AppendsOnOverwrite.caught_by]
    assert "assert b'something longshort' == b'short'" in said


# --- Writing.


class AppendsOnOverwrite(InMemory):
    unmutated = InMemory
    caught_by = "test_a_write_replaces_the_whole_object"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            old = [blob for blob in self.list(key) if blob.key == key and options.get("overwrite", True)]
            super().write(key, (self.read(key) if old else b"") + data, **options)


class KeepsTheCallersBuffer(InMemory):
    unmutated = InMemory
    caught_by = "test_the_callers_buffer_is_not_kept"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            super().write(key, data, **options)
            self.__dict__.setdefault("kept", {})[key] = data

        def read(self, key: str, *window: Any) -> bytes:
            super().read(key, *window)
            return bytes(self.__dict__["kept"][key])


class CreatesUnconditionally(InMemory):
    unmutated = InMemory
    caught_by = "test_creating_an_object_that_exists_is_refused_and_leaves_it"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
            del overwrite
            super().write(key, data, durable=durable)


class LooksFirstAndThenCreates(InMemory):
    unmutated = InMemory
    caught_by = "test_of_several_threads_that_create_one_key_one_succeeds"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
            if not overwrite and any(blob.key == key for blob in self.list(key)):
                raise FileExistsError(key)
            super().write(key, data, durable=durable)


class RemembersWhatExists(InMemory):
    unmutated = InMemory
    caught_by = "test_what_others_stored_is_not_created_again"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
            known = self.__dict__.setdefault("known", set())
            if not overwrite and key in known:
                raise FileExistsError(key)
            known.add(key)
            super().write(key, data, durable=durable)


class CreatesAtRiskAndDoesNotSaySo(ThroughFsspec):
    unmutated = ThroughFsspec
    caught_by = "test_a_storage_that_cannot_create_conditionally_says_so"

    class Storage(FsspecStorage):
        def _warn_of_races(self) -> None:
            pass


class WritesInTwoSteps(OnDisk):
    unmutated = OnDisk
    caught_by = "test_a_reader_never_sees_part_of_an_object_that_is_replaced"

    class Storage(LocalStorage):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            super().write(key, data[: len(data) // 2], **options)
            time.sleep(0.002)
            super().write(key, data, **options)


class PutsInTwoSteps(InMemory):
    unmutated = InMemory
    caught_by = "test_a_reader_never_sees_part_of_an_object_that_is_replaced"

    class Storage(MemoryStorage):
        def put(self, source: Path, key: str, **options: Any) -> None:
            self.write(key, b"")
            time.sleep(0.002)
            super().put(source, key, **options)


class LosesEmptyObjects(InMemory):
    unmutated = InMemory
    caught_by = "test_bytes_of_any_length_come_back[empty]"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            if data:
                super().write(key, data, **options)


class StoresUnderAnotherKey(InMemory):
    unmutated = InMemory
    caught_by = "test_what_was_stored_is_at_its_key"

    class Storage(MemoryStorage):
        def _path(self, key: str) -> str:
            return f"{super()._path(key)}.bin"

        def _key(self, path: str) -> str:
            return super()._key(path).removesuffix(".bin")


class KeepsWhatIsNotDurableToItself(InMemory):
    unmutated = InMemory
    caught_by = "test_what_need_not_be_durable_is_seen_all_the_same"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
            if durable:
                super().write(key, data, overwrite=overwrite)


class SharesAScratchPadAmongThreads(InMemory):
    unmutated = InMemory
    caught_by = "test_threads_do_not_disturb_each_other"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            self.__dict__["pad"] = data
            time.sleep(0)
            super().write(key, self.__dict__["pad"], **options)


# --- Keys.


class LetsKeysLeadOutside(InMemory):
    unmutated = InMemory
    caught_by = "test_no_method_takes_what_is_no_key"

    class Storage(MemoryStorage):
        def _path(self, key: str) -> str:
            return os.path.normpath(f"{self._root}/{key}")


class UnquotesKeys(InMemory):
    unmutated = InMemory
    caught_by = "test_a_key_is_taken_as_it_is"

    class Storage(MemoryStorage):
        def _path(self, key: str) -> str:
            super()._path(key)
            return f"{self._root}/{unquote(key)}"


class QuotesKeys(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_is_sorted_by_the_whole_key"

    class Storage(MemoryStorage):
        def _path(self, key: str) -> str:
            super()._path(key)
            return f"{self._root}/{quote(key)}"


class NormalisesKeys(InMemory):
    unmutated = InMemory
    caught_by = "test_a_key_is_taken_as_it_is"

    class Storage(MemoryStorage):
        def _path(self, key: str) -> str:
            return super()._path(unicodedata.normalize("NFC", key))


class IgnoresCase(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_is_sorted_by_the_whole_key"

    class Storage(MemoryStorage):
        def _path(self, key: str) -> str:
            return super()._path(key.lower())


class TakesFoldersForObjects(InMemory):
    unmutated = InMemory
    caught_by = "test_what_other_keys_begin_with_is_no_object"

    class Storage(MemoryStorage):
        def read(self, key: str, *window: Any) -> bytes:
            try:
                return super().read(key, *window)
            except FileNotFoundError:
                if any(self.list(f"{key}/")):
                    return b""
                raise


# --- Reading.


class RaisesAnotherErrorForWhatIsMissing(InMemory):
    unmutated = InMemory
    caught_by = "test_reading_what_is_not_there_is_file_not_found"

    class Storage(MemoryStorage):
        def read(self, key: str, *window: Any) -> bytes:
            try:
                return super().read(key, *window)
            except FileNotFoundError as error:
                raise KeyError(key) from error


class ReadsARangeWithItsEnd(InMemory):
    unmutated = InMemory
    caught_by = "test_a_range_gives_what_there_is_of_it"

    class Storage(MemoryStorage):
        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            return super().read(key, start, None if end is None else end + 1)


class CountsRangesFromTheEnd(InMemory):
    unmutated = InMemory
    caught_by = "test_a_range_that_counts_from_the_end_is_refused"

    class Storage(MemoryStorage):
        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            return super().read(key)[start:end]


class ReadsFromACache(InMemory):
    unmutated = InMemory
    caught_by = "test_what_others_stored_is_seen_at_once"

    class Storage(MemoryStorage):
        def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            cache = self.__dict__.setdefault("cache", {})
            if key not in cache:
                cache[key] = super().read(key)
            return bytes(cache[key][start:end])


# --- Listing.


class ListsFromACache(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_is_never_stale"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            cache = self.__dict__.setdefault("cache", {})
            if prefix not in cache:
                cache[prefix] = [*super().list(prefix)]
            return iter(cache[prefix])


class SortsByFolders(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_is_sorted_by_the_whole_key"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            return iter(sorted(super().list(prefix), key=lambda blob: blob.key.split("/")))


class ListsObjectsTwice(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_is_sorted_by_the_whole_key"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            for blob in super().list(prefix):
                yield from [blob] * (1 + ("é" in blob.key))


class TakesAPrefixForAFolder(InMemory):
    unmutated = InMemory
    caught_by = "test_a_prefix_is_text_and_not_a_folder"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            folder = f"{prefix.rstrip('/')}/" if prefix else ""
            return (
                blob for blob in super().list(prefix) if blob.key == prefix or blob.key.startswith(folder)
            )


class TakesAPrefixForAPattern(InMemory):
    unmutated = InMemory
    caught_by = "test_a_key_is_taken_as_it_is"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            return (blob for blob in super().list() if Path(blob.key).match(f"{prefix}*"))


class ListsWhileOthersDelete(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_that_is_being_read_stands_deletion"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            index = 0
            while index < len(page := [*super().list(prefix)]):
                yield page[index]
                index += 1


class ShowsMilliseconds(InMemory):
    unmutated = InMemory
    caught_by = "test_a_list_shows_size_and_time"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            return (replace(blob, modified=blob.modified * 1000) for blob in super().list(prefix))


class TakesTheSizeForAVersion(InMemory):
    unmutated = InMemory
    caught_by = "test_other_bytes_have_another_version"

    class Storage(MemoryStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            return (replace(blob, version=f"{blob.size}") for blob in super().list(prefix))


# --- Deleting.


class DeletesByPrefix(InMemory):
    unmutated = InMemory
    caught_by = "test_only_the_named_objects_are_removed"

    class Storage(MemoryStorage):
        def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
            doomed = [blob.key for key in [*keys] for blob in self.list(key)]
            super().delete(doomed, durable=durable)


class FailsToDeleteWhatIsMissing(InMemory):
    unmutated = InMemory
    caught_by = "test_deleting_what_is_not_there_is_no_error"

    class Storage(MemoryStorage):
        def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
            for key in keys:
                self.read(key)
                super().delete([key], durable=durable)


class DeletesUntilItMeetsABadKey(InMemory):
    unmutated = InMemory
    caught_by = "test_one_bad_key_removes_nothing"

    class Storage(MemoryStorage):
        def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
            for key in keys:
                super().delete([key], durable=durable)


class DeletesOnlyWhatItWrote(InMemory):
    unmutated = InMemory
    caught_by = "test_what_others_stored_is_deleted"

    class Storage(MemoryStorage):
        def write(self, key: str, data: bytes, **options: Any) -> None:
            self.__dict__.setdefault("mine", set()).add(key)
            super().write(key, data, **options)

        def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
            mine = self.__dict__.setdefault("mine", set())
            super().delete([key for key in keys if key in mine], durable=durable)


# --- Files.


class PutKeepsWhatWasThere(InMemory):
    unmutated = InMemory
    caught_by = "test_a_put_replaces_the_object_and_keeps_its_own_bytes[copied]"

    class Storage(MemoryStorage):
        def put(self, source: Path, key: str, **options: Any) -> None:
            if not any(blob.key == key for blob in self.list(key)):
                super().put(source, key, **options)


class PutLinksTheFile(OnDisk):
    unmutated = OnDisk
    caught_by = "test_a_put_replaces_the_object_and_keeps_its_own_bytes[copied]"

    class Storage(LocalStorage):
        def put(self, source: Path, key: str, **options: Any) -> None:
            del options
            self.delete([key])
            target = self.local_path(key)
            assert target is not None
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)


class PutTakesTheFileUnasked(InMemory):
    unmutated = InMemory
    caught_by = "test_a_file_goes_in_and_comes_out[copied-empty]"

    class Storage(MemoryStorage):
        def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
            del move
            super().put(source, key, move=True, durable=durable)


class PutOfNothingStoresNothing(InMemory):
    unmutated = InMemory
    caught_by = "test_putting_a_file_that_is_not_there_names_it_and_changes_nothing"

    class Storage(MemoryStorage):
        def put(self, source: Path, key: str, **options: Any) -> None:
            if source.exists():
                super().put(source, key, **options)
            else:
                self.write(key, b"")


class GetLeavesHalfAFile(InMemory):
    unmutated = InMemory
    caught_by = "test_a_get_of_what_is_not_there_leaves_the_target"

    class Storage(MemoryStorage):
        def get(self, key: str, target: Path) -> None:
            with target.open("wb") as file:
                file.write(self.read(key))


class GetKeepsTheTailOfTheTarget(InMemory):
    unmutated = InMemory
    caught_by = "test_a_get_replaces_the_target_and_leaves_nothing_else"

    class Storage(MemoryStorage):
        def get(self, key: str, target: Path) -> None:
            target.parent.mkdir(exist_ok=True)
            data = self.read(key)
            target.touch()
            with target.open("r+b") as file:
                file.write(data)


class GetLeavesItsTemporaryFile(InMemory):
    unmutated = InMemory
    caught_by = "test_a_get_replaces_the_target_and_leaves_nothing_else"

    class Storage(MemoryStorage):
        def get(self, key: str, target: Path) -> None:
            super().get(key, target)
            target.with_name(f"{target.name}.part").touch()


# --- The rest.


class ShowsASecret(InMemory):
    unmutated = InMemory
    caught_by = "test_no_secret_is_shown"

    class Storage(MemoryStorage):
        def __repr__(self) -> str:
            return "Storage(password='hunter2')"


class SweepsObjects(InMemory):
    unmutated = InMemory
    caught_by = "test_a_sweep_spares_every_object"

    class Storage(MemoryStorage):
        def sweep(self) -> None:
            self.delete([blob.key for blob in self.list(".")])


class SaysThatItIsWhereItIsNot(OnDisk):
    unmutated = OnDisk
    caught_by = "test_a_local_path_is_where_the_object_is"

    class Storage(LocalStorage):
        def local_path(self, key: str) -> Path | None:
            path = super().local_path(key)
            return path and path.with_suffix(".bin")


class FailsWhereNothingIsYet(OnDisk):
    unmutated = OnDisk
    caught_by = "test_an_empty_root_holds_nothing"

    class Storage(LocalStorage):
        def list(self, prefix: str = "") -> Iterator[Blob]:
            root = self.local_path("")
            assert root is not None
            if not any(root.iterdir()):
                raise InvalidValueError("nothing is here")
            return super().list(prefix)


class MakesANewRootEachTime(InMemory):
    unmutated = InMemory
    caught_by = "test_a_storage_says_what_its_root_is"

    class Storage(MemoryStorage):
        def __init__(self, url: str) -> None:
            super().__init__(url)
            self.url = f"{url}/{uuid.uuid4().hex}"


class AMoveTakesAnObjectWithIt(InMemory):
    unmutated = InMemory
    caught_by = "test_any_sequence_of_calls_does_what_a_dictionary_would"

    class Storage(MemoryStorage):
        def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
            super().put(source, key, move=move, durable=durable)
            if move:
                self.delete([blob.key for blob in self.list() if blob.key != key][:1])
