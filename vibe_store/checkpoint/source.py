"""The files of one saved item, as a serializer reads them: sizes and checksums verified on the way."""

import errno
import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import xxhash

from vibe_store.checkpoint.layout import is_local
from vibe_store.checkpoint.manifest import ItemRecord, StoredFile
from vibe_store.checkpoint.range_reader import RangeReader
from vibe_store.checkpoint.requests import at_once
from vibe_store.checkpoint.staging import check_room
from vibe_store.errors import CorruptCheckpointError, InvalidValueError
from vibe_store.interfaces import FileEntry, Leaf, Source, StorageBackend, Verify
from vibe_store.serializers.verifying_reader import CHUNK, Readable, VerifyingReader
from vibe_store.temporary_folders import temporary_folder

__all__ = ["StoredSource", "check_file", "open_file"]

_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})


def check_file(storage: StorageBackend, folder: str, file: StoredFile, *, verify: Verify = "full") -> None:
    """Check one file, reading it to its end where ``verify`` is ``"full"``.

    Raises:
        CorruptCheckpointError: it is missing, or not what was written.
    """
    if verify == "full" or is_local(storage):
        with open_file(storage, folder, file, verify=verify) as stream:
            if isinstance(stream, VerifyingReader):
                _read_to_the_end(stream, file.size)
        return
    size = _listed_size(storage, f"{folder}{file.key}")
    if verify == "sizes" and size != file.size:
        raise _other_size(f"{storage.url}/{folder}{file.key}", size, file)


@contextmanager
def open_file(
    storage: StorageBackend, folder: str, file: StoredFile, *, verify: Verify
) -> Iterator[BinaryIO]:
    """Open one file to be read once, front to back."""
    key, where = f"{folder}{file.key}", f"{storage.url}/{folder}{file.key}"
    if is_local(storage):
        with _open_local(_local(storage, key), file, where, verify) as raw:
            yield cast("BinaryIO", _verified(raw, file, where) if verify == "full" else raw)
        return
    if verify == "sizes":
        check_file(storage, folder, file, verify=verify)  # a serializer need not read to the end
    with closing(RangeReader(storage, key, None if verify == "off" else file.size)) as ranges:
        try:
            yield cast("BinaryIO", _verified(ranges, file, where) if verify == "full" else ranges)
        except FileNotFoundError as error:
            if error is not ranges.missing:
                raise
            raise _missing(where) from None


class StoredSource(Source):
    """The files of one item in a storage; what is fetched to a local disk for that goes with the stack."""

    def __init__(
        self, storage: StorageBackend, folder: str, item: ItemRecord, stack: ExitStack, *, verify: Verify
    ) -> None:
        self._storage, self._folder, self._item = storage, folder, item
        self._stack, self._verify = stack, verify
        self._fetched: dict[str, Path] | None = None

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self._item.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return self._item.entries

    def path(self, name: str) -> Path:
        file = self._file(name)
        if is_local(self._storage):
            local = _local(self._storage, self._key(file))
        else:
            if self._fetched is None:
                self._fetched = self._fetch_all()
            local = self._fetched[name]
        with _open_local(local, file, self._where(file), self._verify) as raw:
            if self._verify == "full":
                _read_to_the_end(_verified(raw, file, self._where(file)), file.size)
        return local

    def _fetch_all(self) -> dict[str, Path]:
        """Copy every file of the item to a local folder: whoever wants one of them wants all."""
        files = self._item.files
        check_room(
            sum(file.size for file in files.values()), f"an item of {self._storage.url}/{self._folder}"
        )
        folder = self._stack.enter_context(temporary_folder())
        places = {name: folder / str(number) for number, name in enumerate(files)}

        def fetch(name: str) -> None:
            try:
                self._storage.get(self._key(files[name]), places[name])
            except FileNotFoundError:
                raise _missing(self._where(files[name])) from None

        at_once(self._storage, fetch, files)
        return places

    def open(self, name: str) -> BinaryIO:
        return self._stack.enter_context(
            open_file(self._storage, self._folder, self._file(name), verify=self._verify)
        )

    def read_part(self, name: str, start: int, buffer: memoryview, checksum: str) -> None:
        file = self._file(name)
        if not is_local(self._storage):
            count = self._fetch_part(file, start, buffer)
        else:
            local = _local(self._storage, self._key(file))
            with _open_local(local, file, self._where(file), self._verify) as raw:
                raw.seek(start)
                count = _fill(raw, buffer)
        if count != len(buffer):
            raise CorruptCheckpointError(
                f"{self._where(file)} ends at byte {start + count}, within what is to be read of it."
            )
        if self._verify == "full" and xxhash.xxh3_128_hexdigest(buffer) != checksum:
            raise CorruptCheckpointError(
                f"{self._where(file)} is damaged: the {len(buffer)} bytes from byte {start} do not match "
                "their checksum."
            )

    def _fetch_part(self, file: StoredFile, start: int, buffer: memoryview) -> int:
        try:
            data = self._storage.read(self._key(file), start, start + len(buffer))
        except FileNotFoundError:
            raise _missing(self._where(file)) from None
        buffer[: len(data)] = data
        return len(data)

    def _file(self, name: str) -> StoredFile:
        try:
            return self._item.files[name]
        except KeyError:
            raise CorruptCheckpointError(
                f"The manifest of {self._storage.url}/{self._folder} names no file {name!r}."
            ) from None

    def _key(self, file: StoredFile) -> str:
        return f"{self._folder}{file.key}"

    def _where(self, file: StoredFile) -> str:
        return f"{self._storage.url}/{self._folder}{file.key}"


@contextmanager
def _open_local(local: Path, file: StoredFile, where: str, verify: Verify) -> Iterator[io.FileIO]:
    try:
        # A pipe is opened without waiting for somebody to write into it.
        raw = io.FileIO(os.open(local, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise _missing(where) from None
    with raw:
        status = os.fstat(raw.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _missing(where)
        size = status.st_size
        if verify != "off" and size != file.size:
            raise _other_size(where, size, file)
        yield raw


def _fill(raw: io.FileIO, buffer: memoryview) -> int:
    filled = 0
    while count := raw.readinto(buffer[filled : filled + CHUNK]):
        filled += count
    return filled


def _verified(raw: Readable, file: StoredFile, where: str) -> VerifyingReader:
    return VerifyingReader(raw, file.size, file.checksum, where)


def _read_to_the_end(reader: VerifyingReader, size: int) -> None:
    buffer = memoryview(bytearray(min(size, CHUNK)))
    while reader.readinto(buffer):
        pass


def _local(storage: StorageBackend, key: str) -> Path:
    """Return the local file that an object of a local disk is."""
    try:
        local = storage.local_path(key)
    except InvalidValueError as error:  # a link that leads out of the storage
        raise CorruptCheckpointError(str(error)) from error
    if local is None:
        raise ValueError(f"{storage.url} is no local disk.")
    return local


def _listed_size(storage: StorageBackend, key: str) -> int:
    """Return the size of an object."""
    size = next((blob.size for blob in storage.list(key) if blob.key == key), None)
    if size is None:
        raise _missing(f"{storage.url}/{key}")
    return size


def _missing(where: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} is missing, and the manifest names it.")


def _other_size(where: str, size: int, file: StoredFile) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} has {size} bytes instead of {file.size}.")
