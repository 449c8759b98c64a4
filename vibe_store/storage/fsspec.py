"""Objects on any filesystem that fsspec knows, as safely as that filesystem allows."""

import errno
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError, MissingDependencyError, VibeStoreWarning
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.storage.about import about, exists, missing
from vibe_store.storage.keys import (
    check_key,
    check_keys,
    check_prefix,
    check_range,
    check_url,
    is_key,
)
from vibe_store.storage.redaction import redact, secrets_of, without_credentials

__all__ = ["FsspecStorage", "open_filesystem"]

_CREATE_CONDITIONALLY = frozenset({"abfs", "abfss", "az", "gcs", "gs", "s3", "s3a"})
"""Protocols whose fsspec filesystems pass ``pipe_file(mode="create")`` on to the server as a condition."""

_MODIFIED = ("mtime", "LastModified", "last_modified", "modified", "updated")
_under_way: set[str] = set()
"""The hidden names under which this process is uploading, which a sweep must spare."""


class FsspecStorage(StorageBackend):
    """Objects on a filesystem of fsspec, under one URL.

    What fsspec does not promise, this cannot either: durability is the filesystem's own; on a filesystem
    with symbolic links nothing keeps a link from leading elsewhere (open a local folder with
    ``LocalStorage``); empty folders stay. Object stores publish an upload when it is complete. Anywhere else
    an object is uploaded under a hidden name and renamed, as well as the filesystem renames.

    Args:
        url: as fsspec takes it, chained URLs included.
        storage_options: the options of the filesystem. They are shown nowhere, nor are the credentials in the
            URL; what the filesystem raises has ``***`` in their place.

    Attributes:
        fs: the filesystem.
        creates_conditionally: whether ``write(overwrite=False)`` is sure to have one winner. Where it is
            not, it looks first and then writes, and warns once that it does.

    Raises:
        InvalidValueError: fsspec knows no such protocol.
        MissingDependencyError: the package for this protocol is not installed.
    """

    publishes_whole: ClassVar[bool | None] = None
    """Whether the filesystem shows an upload only once it is complete; None to judge by its class."""

    def __init__(self, url: str, **storage_options: Any) -> None:
        self.fs, root = open_filesystem(url, storage_options)
        self.url = without_credentials(url)
        self._secrets = secrets_of(url, storage_options)
        self._root = root.rstrip("/")
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        self.creates_conditionally = bool(protocols & _CREATE_CONDITIONALLY)
        self._warned = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """Yield the objects whose keys begin with ``prefix``, sorted; see :meth:`StorageBackend.list`."""
        check_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        with self._about("listing", prefix):
            self.fs.invalidate_cache()
            found = self._find(f"{self._root}/{folder}" if folder else self._root)
        return self._blobs(found, prefix)

    def _blobs(self, found: Mapping[str, Mapping[str, Any]], prefix: str) -> Iterator[Blob]:
        """Return the objects among what the filesystem found whose keys begin with ``prefix``, sorted."""
        blobs = {}
        for name, info in found.items():
            key = self._key(name)
            if key.startswith(prefix) and info.get("type") == "file" and is_key(key):
                blobs[key] = Blob(key, int(info["size"]), self._modified(info))
        return iter([blobs[key] for key in sorted(blobs)])

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of one object; see :meth:`StorageBackend.read`."""
        check_range(start, end)
        path = self._path(key)
        with self._about("reading", key):
            try:
                if start == 0 and end is None:
                    return bytes(self.fs.cat_file(path))
                size = self._size(key)  # filesystems differ in what a range past the end gives
                end = size if end is None else min(end, size)
                return bytes(self.fs.cat_file(path, start=start, end=end)) if start < end else b""
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
                raise self._missing(key) from error

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        """Store a small object; see :meth:`StorageBackend.write`.

        Of several writers that create one key at the same moment, more than one may succeed unless
        ``creates_conditionally``.
        """
        del durable  # every change is, as far as this storage goes
        path = self._path(key)
        with self._about("writing", key):
            if overwrite:
                self._publish(path, lambda place: self.fs.pipe_file(place, data))
            elif self.creates_conditionally:
                try:
                    self.fs.pipe_file(path, data, mode="create")
                except FileExistsError as error:
                    raise self._exists(key) from error
            else:
                self._warn_of_races()
                info = self._info(path)
                if info is not None and info["type"] == "file":
                    raise self._exists(key)
                self._publish(path, lambda place: self.fs.pipe_file(place, data))

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        """Store a local file of any size; see :meth:`StorageBackend.put`."""
        del durable  # every change is, as far as this storage goes
        path = self._path(key)
        with self._about("writing", key):
            if not source.is_file():
                raise FileNotFoundError(errno.ENOENT, f"There is no file '{source}' to store as {key!r}.")
            self._publish(path, lambda place: self.fs.put_file(str(source), place))
            if move:
                source.unlink(missing_ok=True)

    def get(self, key: str, target: Path) -> None:
        """Copy an object to a local file; see :meth:`StorageBackend.get`. Missing parents of it are made."""
        path = self._path(key)
        with self._about("reading", key):
            self._size(key)  # a filesystem may make a folder of the target when the object is missing
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex}")
            try:
                self.fs.get_file(path, str(temporary))
                temporary.replace(target)
            except FileNotFoundError as error:
                raise self._missing(key) from error
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        """Remove exactly these objects; see :meth:`StorageBackend.delete`. Every key is checked first."""
        del durable  # every change is, as far as this storage goes
        for key in check_keys(keys):
            path = self._path(key)
            with self._about("removing", key):
                info = self._info(path)
                if info is not None and info["type"] == "file":
                    with suppress(FileNotFoundError):  # another's deletion came first
                        self.fs.rm_file(path)

    def sweep(self) -> None:
        """Remove what uploads that were cut off left under hidden names; those of this process are spared."""
        if self._publishes_whole():
            return
        with self._about("sweeping", ""):
            self.fs.invalidate_cache()
            for path in sorted(self._find(self._root)):
                name = path.rpartition("/")[2]
                if name.startswith(TEMPORARY_PREFIX) and name not in _under_way:
                    with suppress(FileNotFoundError):
                        self.fs.rm_file(path)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _key(self, path: str) -> str:
        """The key of a path as the filesystem writes it; ``""`` for one that isn't below the root."""
        root, path = self._root.lstrip("/"), path.lstrip("/")
        if not root:
            return path
        return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else ""

    def _info(self, path: str) -> Mapping[str, Any] | None:
        """What is at a path now; None where nothing is. (fsspec's ``exists`` takes any error for "no".)"""
        self.fs.invalidate_cache()
        try:
            info: Mapping[str, Any] = self.fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return info

    def _size(self, key: str) -> int:
        info = self._info(self._path(key))
        if info is None or info["type"] != "file":
            raise self._missing(key)
        return int(info["size"])

    def _modified(self, info: Mapping[str, Any]) -> float:
        for name in _MODIFIED:
            value = info.get(name)
            if isinstance(value, str):
                value = datetime.fromisoformat(value)
            if isinstance(value, datetime):
                return value.timestamp()
            if value is not None:
                return float(value)
        return 0.0

    def _find(self, folder: str) -> Mapping[str, Mapping[str, Any]]:
        """All that is below a folder, by path."""
        kind = type(self.fs)
        generic = kind.find is AbstractFileSystem.find
        if isinstance(self.fs, AsyncFileSystem):
            generic = kind._find is AsyncFileSystem._find
        if generic:
            return dict(self._walk(folder))
        try:
            found: Mapping[str, Mapping[str, Any]] = self.fs.find(folder, detail=True, withdirs=False)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def _walk(self, folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What fsspec's own ``find`` should do: it takes a folder that cannot be read for an empty one."""
        try:
            entries = self.fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        for info in entries:
            if info["type"] == "directory" and info["name"].rstrip("/") != folder:
                yield from self._walk(info["name"].rstrip("/"))
            else:
                yield info["name"], info

    def _publishes_whole(self) -> bool:
        if self.publishes_whole is not None:
            return self.publishes_whole
        # Object stores have asynchronous filesystems and no rename of their own.
        return isinstance(self.fs, AsyncFileSystem) and type(self.fs).mv is AbstractFileSystem.mv

    def _publish(self, path: str, upload: Callable[[str], object]) -> None:
        """Upload to a path so that nobody sees a part."""
        if self._publishes_whole():
            upload(path)
            return
        folder = path.rpartition("/")[0]
        name = f"{TEMPORARY_PREFIX}{uuid4().hex}"
        temporary = f"{folder}/{name}"
        self.fs.makedirs(folder, exist_ok=True)
        _under_way.add(name)
        try:
            upload(temporary)
            info = self._info(path)
            if info is not None and info["type"] == "directory":
                raise IsADirectoryError(errno.EISDIR, f"A folder is where the object would be: {path!r}.")
            self.fs.mv(temporary, path)
        except BaseException as error:
            try:
                self.fs.rm_file(temporary)
            except FileNotFoundError:
                pass
            except Exception as failure:  # noqa: BLE001 - what went wrong first must stay the error raised
                error.add_note(f"The unfinished object {temporary!r} could not be removed either: {failure}")
            raise
        finally:
            _under_way.discard(name)

    def _warn_of_races(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.url!r} cannot create an object only if it does not exist. Of two writers that create "
                "the same one at the same moment, the later replaces the other's: use one writer at a time.",
                VibeStoreWarning,
                stacklevel=3,
            )

    def _missing(self, key: str) -> FileNotFoundError:
        return missing(key, self.url)

    def _exists(self, key: str) -> FileExistsError:
        return exists(key, self.url)

    def _about(self, doing: str, key: str) -> AbstractContextManager[None]:
        return about(doing, key, self.url, self._secrets)


def open_filesystem(url: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the filesystem of fsspec that a URL names, and the path on it.

    Raises:
        InvalidValueError: fsspec knows no such protocol.
        MissingDependencyError: the package for this protocol is not installed.
    """
    check_url(url)
    try:
        filesystem, path = url_to_fs(url, **storage_options)
    except Exception as error:
        redact(error, secrets_of(url, storage_options))
        if isinstance(error, ImportError):
            raise MissingDependencyError(f"{without_credentials(url)!r} cannot be opened: {error}") from error
        if isinstance(error, ValueError):
            raise InvalidValueError(f"{without_credentials(url)!r} cannot be opened: {error}") from error
        raise
    return filesystem, str(path)
