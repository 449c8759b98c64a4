"""Reading what a manifest names, verified: sizes and checksums on the way, before anything is returned."""

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import xxhash

from vibe_store.checkpoint.commit import read_manifest
from vibe_store.checkpoint.layout import folder_of
from vibe_store.checkpoint.manifest import ItemRecord, Manifest, StoredFile, strict_json
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, VibeStoreError
from vibe_store.interfaces import FileEntry, Leaf, PyTree, Serializer, Source, StorageBackend
from vibe_store.registry import get_serializer

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["check_file", "load_items", "load_metadata_of"]

_CHUNK = 4 * 1024 * 1024


def load_items(
    storage: StorageBackend,
    step: int | None,
    likes: Mapping[str, PyTree],
    *,
    partial: bool,
    serializer: Serializer | None = None,
) -> dict[str, PyTree]:
    """Load items of one committed checkpoint into templates, by name.

    Where a file is missing because the checkpoint was replaced meanwhile, the new one is loaded.

    Args:
        storage: where the checkpoint is.
        step: its step; None for one without a step.
        likes: templates by item name.
        partial: allow items to hold leaves that their templates do not.
        serializer: an instance to use where it is the one that wrote an item; others are looked up by name.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or no such item of it.
        TemplateMismatchError: a template and an item differ.
        CorruptCheckpointError: the manifest or a file is missing or is not what was written.
    """
    manifest = read_manifest(storage, step)
    while True:
        try:
            return {
                name: _load_item(
                    storage, folder_of(step), manifest, name, like, partial=partial, serializer=serializer
                )
                for name, like in likes.items()
            }
        except CorruptCheckpointError:
            again = read_manifest(storage, step)
            if again.attempt == manifest.attempt:
                raise
            manifest = again


def load_metadata_of(storage: StorageBackend, step: int | None) -> dict[str, Any] | None:
    """Return the metadata of one committed checkpoint, or None where it has none."""
    manifest = read_manifest(storage, step)
    if manifest.metadata is None:
        return None
    with ExitStack() as stack:
        with _open(storage, folder_of(step), manifest.metadata, stack) as stream:
            data = stream.read()
        metadata: dict[str, Any] = strict_json(data)
        return metadata


def check_file(storage: StorageBackend, folder: str, file: StoredFile) -> None:
    """Read one file to its end.

    Raises:
        CorruptCheckpointError: it is missing, or not what was written.
    """
    buffer = bytearray(_CHUNK)
    with ExitStack() as stack, _open(storage, folder, file, stack) as stream:
        while stream.readinto(buffer):  # type: ignore[attr-defined] # BinaryIO lacks what our stream has
            pass


def _load_item(
    storage: StorageBackend,
    folder: str,
    manifest: Manifest,
    name: str,
    like: PyTree,
    *,
    partial: bool,
    serializer: Serializer | None,
) -> PyTree:
    where = f"{storage.url}/{folder}".rstrip("/")
    item = manifest.items.get(name)
    if item is None:
        raise CheckpointNotFoundError(
            f"The checkpoint {where} has no item {name!r}; it has {', '.join(sorted(manifest.items))}."
        )
    if serializer is None or serializer.name != item.serializer:
        serializer = get_serializer(item.serializer)
    with ExitStack() as stack:
        try:
            return serializer.load(_StoredSource(storage, folder, item, stack), name, like, partial=partial)
        except VibeStoreError as error:
            error.add_note(f"While loading the item {name!r} of {where}.")
            raise


class _StoredSource(Source):
    """The files of one item in a storage; what is fetched to a local disk for that goes with the stack."""

    def __init__(self, storage: StorageBackend, folder: str, item: ItemRecord, stack: ExitStack) -> None:
        self._storage, self._folder, self._item, self._stack = storage, folder, item, stack

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self._item.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return self._item.entries

    def path(self, name: str) -> Path:
        file = self._file(name)
        check_file(self._storage, self._folder, file)
        return _local(self._storage, f"{self._folder}{file.key}", self._stack)

    def open(self, name: str) -> BinaryIO:
        return self._stack.enter_context(_open(self._storage, self._folder, self._file(name), self._stack))

    def _file(self, name: str) -> StoredFile:
        try:
            return self._item.files[name]
        except KeyError:
            raise CorruptCheckpointError(
                f"The manifest of {self._storage.url}/{self._folder} names no file {name!r}."
            ) from None


class _VerifyingReader(io.RawIOBase):
    """Reads a file once, front to back, and raises at its end when it was not what the manifest says."""

    def __init__(self, raw: io.RawIOBase, file: StoredFile, where: str) -> None:
        super().__init__()
        self._raw, self._file, self._where = raw, file, where
        self._hash, self._read = xxhash.xxh3_128(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            chunk = view[filled : filled + _CHUNK]
            count = self._raw.readinto(chunk) or 0
            if count == 0:
                break
            self._hash.update(chunk[:count])
            filled += count
        self._read += filled
        if self._read >= self._file.size or filled < len(view):
            self._check()
        return filled

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _check(self) -> None:
        if self._read != self._file.size:
            raise CorruptCheckpointError(
                f"{self._where} has {self._read} bytes instead of {self._file.size}."
            )
        if self._hash.hexdigest() != self._file.checksum:
            raise CorruptCheckpointError(
                f"{self._where} is damaged: its checksum is {self._hash.hexdigest()}, "
                f"and {self._file.checksum} was written."
            )


@contextmanager
def _open(storage: StorageBackend, folder: str, file: StoredFile, stack: ExitStack) -> Iterator[BinaryIO]:
    where = f"{storage.url}/{folder}{file.key}"
    try:
        raw = _local(storage, f"{folder}{file.key}", stack).open("rb", buffering=0)
    except (FileNotFoundError, IsADirectoryError):
        raise _missing(where) from None
    with raw:
        size = os.fstat(raw.fileno()).st_size
        if size != file.size:
            raise CorruptCheckpointError(f"{where} has {size} bytes instead of {file.size}.")
        yield cast("BinaryIO", _VerifyingReader(raw, file, where))


def _local(storage: StorageBackend, key: str, stack: ExitStack) -> Path:
    """Return a local file with the bytes of an object, fetched where the storage is not a local disk."""
    local = storage.local_path(key)
    if local is None:
        local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vibe_store-"))) / "object"
        try:
            storage.get(key, local)
        except FileNotFoundError:
            raise _missing(f"{storage.url}/{key}") from None
    return local


def _missing(where: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} is missing, and the manifest names it.")
