"""The files of one saved item, as a serializer reads them: sizes and checksums verified on the way."""

import errno
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import xxhash

from vibe_store.checkpoint.manifest import ItemRecord, StoredFile
from vibe_store.errors import CorruptCheckpointError, InvalidValueError
from vibe_store.interfaces import FileEntry, Leaf, Source, StorageBackend, Verify

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["StoredSource", "check_file", "open_file"]

_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
_CHUNK = 4 * 1024 * 1024


def check_file(storage: StorageBackend, folder: str, file: StoredFile, *, verify: Verify = "full") -> None:
    """Check one file, reading it to its end where ``verify`` is ``"full"``.

    Raises:
        CorruptCheckpointError: it is missing, or not what was written.
    """
    if verify == "full" or storage.local_path("") is not None:
        with ExitStack() as stack, open_file(storage, folder, file, stack, verify=verify) as stream:
            if verify == "full":
                _read_to_the_end(stream, file.size)
        return
    key = f"{folder}{file.key}"
    size = next((blob.size for blob in storage.list(key) if blob.key == key), None)
    if size is None:
        raise _missing(f"{storage.url}/{key}")
    if verify == "sizes" and size != file.size:
        raise _other_size(f"{storage.url}/{key}", size, file)


@contextmanager
def open_file(
    storage: StorageBackend, folder: str, file: StoredFile, stack: ExitStack, *, verify: Verify
) -> Iterator[BinaryIO]:
    """Open one file to be read once, front to back; a fetched copy of it goes with the stack."""
    local = _local(storage, f"{folder}{file.key}", stack)
    with _open_local(local, file, f"{storage.url}/{folder}{file.key}", verify) as raw:
        reader = _VerifyingReader(raw, file, f"{storage.url}/{folder}{file.key}") if verify == "full" else raw
        yield cast("BinaryIO", reader)


class StoredSource(Source):
    """The files of one item in a storage; what is fetched to a local disk for that goes with the stack."""

    def __init__(
        self, storage: StorageBackend, folder: str, item: ItemRecord, stack: ExitStack, *, verify: Verify
    ) -> None:
        self._storage, self._folder, self._item = storage, folder, item
        self._stack, self._verify = stack, verify

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self._item.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return self._item.entries

    def path(self, name: str) -> Path:
        file = self._file(name)
        local = _local(self._storage, self._key(file), self._stack)
        with _open_local(local, file, self._where(file), self._verify) as raw:
            if self._verify == "full":
                _read_to_the_end(cast("BinaryIO", _VerifyingReader(raw, file, self._where(file))), file.size)
        return local

    def open(self, name: str) -> BinaryIO:
        return self._stack.enter_context(
            open_file(self._storage, self._folder, self._file(name), self._stack, verify=self._verify)
        )

    def read_part(self, name: str, start: int, buffer: memoryview, checksum: str) -> None:
        file = self._file(name)
        if self._storage.local_path("") is None:
            count = self._fetch_part(file, start, buffer)
        else:
            local = _local(self._storage, self._key(file), self._stack)
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
            raise _other_size(self._where, self._read, self._file)
        if self._hash.hexdigest() != self._file.checksum:
            raise CorruptCheckpointError(
                f"{self._where} is damaged: its checksum is {self._hash.hexdigest()}, "
                f"and {self._file.checksum} was written."
            )


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
    while count := raw.readinto(buffer[filled : filled + _CHUNK]):
        filled += count
    return filled


def _read_to_the_end(stream: BinaryIO, size: int) -> None:
    buffer = bytearray(min(size, _CHUNK) + 1)
    while stream.readinto(buffer):  # type: ignore[attr-defined] # BinaryIO lacks what our stream has
        pass


def _local(storage: StorageBackend, key: str, stack: ExitStack) -> Path:
    """Return a local file with the bytes of an object, fetched where the storage is not a local disk."""
    try:
        local = storage.local_path(key)
    except InvalidValueError as error:  # a link that leads out of the storage
        raise CorruptCheckpointError(str(error)) from error
    if local is None:
        local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vibe_store-"))) / "object"
        try:
            storage.get(key, local)
        except FileNotFoundError:
            raise _missing(f"{storage.url}/{key}") from None
    return local


def _missing(where: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} is missing, and the manifest names it.")


def _other_size(where: str, size: int, file: StoredFile) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{where} has {size} bytes instead of {file.size}.")
