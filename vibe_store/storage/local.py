"""Objects as files under one folder of a local disk: atomic, durable, and never outside that folder."""

import errno
import logging
import os
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from vibe_store.durable_files import (
    TEMPORARY_PREFIX,
    copy,
    create,
    discarded,
    explained,
    in_folder,
    open_temporary,
    remove_if_abandoned,
    sync,
    sync_path,
)
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.storage.keys import (
    check_key,
    check_keys,
    check_prefix,
    check_range,
    check_url,
    is_key,
)
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import with_home

__all__ = ["LocalStorage"]

_logger = logging.getLogger("vibe_store")


class LocalStorage(StorageBackend):
    """Objects as files under one folder, which the first write makes.

    An object is written to a hidden file beside its place, made durable, and renamed. A process that dies on
    the way leaves such a file, which no listing shows and which :meth:`sweep` removes.

    An object is a regular file whose path below the root is a key. Symbolic links are followed within the
    root only; a listing shows linked files, but doesn't descend into linked folders. Files get the
    permissions that the process's umask leaves; a file that ``put`` moves keeps its own.

    Args:
        url: a path, which may begin with ``~``, or ``file:///`` and an absolute path (taken as it is: ``%20``
            is no space).
        options: there are none; naming one is an error.

    Raises:
        InvalidValueError: ``url`` is neither, or an option was given.
    """

    def __init__(self, url: str, **options: Any) -> None:
        if options:
            raise InvalidValueError(
                f"A local storage has no options, but {url!r} was given {sorted(options)}. Leave them out."
            )
        self._root = _path_of(check_url(url))
        self.url = str(self._root)
        self._known_root: Path | None = None
        # What was changed and may not be on the disk yet, and whether it is a folder.
        self._loose: dict[Path, bool] = {}
        self._loose_lock = threading.Lock()
        _open_storages.add(self)

    def __repr__(self) -> str:
        return f"LocalStorage({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[Blob]:
        """Yield the objects whose keys begin with ``prefix``, sorted; see :meth:`StorageBackend.list`.

        Raises:
            OSError: a folder cannot be read; what is in it is never passed over in silence.
        """
        check_prefix(prefix)
        folder, _, start = prefix.rpartition("/")
        with explained(f"list {self.url!r}"):
            root = self._real_root()
        if folder and _has_link(root, folder):
            return iter(())  # behind a symbolic link: those files are listed where they are, not here
        return self._walk(root, root / folder, folder and f"{folder}/", start)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Return the bytes of one object; see :meth:`StorageBackend.read`."""
        check_range(start, end)
        with self._reading(key) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            return file.read() if end is None else file.read(max(0, min(end, size) - start))

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        """Store a small object, whole or not at all; see :meth:`StorageBackend.write`.

        With ``overwrite=False`` a hard link puts the object in its place, which fails where something is.
        On a file system without hard links, writers take turns by a lock on the folder instead: of writers
        on other machines, to which such a file system may not show the lock, two could then succeed.
        """
        with explained(f"write {key!r} to {self.url!r}"):
            path = self._resolve(key)
            with self._temporary(path.parent) as (file, temporary):
                file.write(data)
                file.flush()
                if durable:
                    sync(file.fileno())
                    self._sync_loose()
                if overwrite:
                    temporary.replace(path)
                else:
                    create(temporary, path)
            self._changed(path, durable=durable)

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        """Store a local file of any size, whole or not at all; see :meth:`StorageBackend.put`.

        With ``move=True`` a file of the same file system is renamed, without a copy.
        """
        with explained(f"store the file '{source}' as {key!r} in {self.url!r}"):
            path = self._resolve(key)
            with source.open("rb") as original:
                if not (move and self._move(original, source, path, durable=durable)):
                    with self._temporary(path.parent) as (file, temporary):
                        copy(original, file)
                        if durable:
                            sync(file.fileno())
                            self._sync_loose()
                        temporary.replace(path)
                    if move:
                        source.unlink(missing_ok=True)
            self._changed(path, durable=durable)

    def get(self, key: str, target: Path) -> None:
        """Copy an object to a local file; see :meth:`StorageBackend.get`. Missing parents of it are made."""
        with self._reading(key) as original, explained(f"copy {key!r} of {self.url!r} to '{target}'"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with discarded(*open_temporary(target.parent)) as (file, temporary):
                copy(original, file)
                temporary.replace(target)

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        """Remove exactly these objects, and folders that this empties; see :meth:`StorageBackend.delete`.

        Every key is checked before anything is removed. A key that names a folder names no object.
        """
        with explained(f"remove objects of {self.url!r}"):
            folders = set()
            for path in [self._resolve(key) for key in check_keys(keys)]:
                if _is_object(path):
                    path.unlink(missing_ok=True)
                folders.add(path.parent)  # a writer that died may have made no more than the folder
            self._tidy(folders, durable=durable)

    def local_path(self, key: str) -> Path:
        """Where this key is, whether or not it exists; ``""`` stands for the root."""
        if key:
            self._resolve(key)
        return self._root / key

    def sweep(self) -> None:
        """Remove the unfinished files that dead writers left, and folders that this empties.

        The writer of an unfinished file holds a lock on it, which goes with its process, so a file whose
        writer may be alive stays.
        """
        with explained(f"sweep {self.url!r}"):
            root = self._real_root()
            folders = set()
            for folder, names in _folders(root):
                for name in names:
                    if name.startswith(TEMPORARY_PREFIX) and remove_if_abandoned(Path(folder, name)):
                        _logger.info("Removed %s, which a writer that died had left.", Path(folder, name))
                        folders.add(Path(folder))
            self._tidy(folders)

    def _real_root(self) -> Path:
        """The root without symbolic links, which need not exist, but is no file."""
        if self._known_root is not None:
            # Found out once: a root that somebody makes a link later leads out of the one that it was.
            return self._known_root
        root = Path(os.path.realpath(self._root))
        try:
            is_folder = stat.S_ISDIR(root.stat().st_mode)
        except FileNotFoundError:
            return root
        except NotADirectoryError:
            is_folder = False
        if not is_folder:
            raise NotADirectoryError(
                errno.ENOTDIR, f"The root {self.url!r} is, or lies below, a file. Choose a folder instead"
            )
        self._known_root = root
        return root

    def _resolve(self, key: str) -> Path:
        """Where a key is, its parents free of symbolic links; refused where a link leads out of the root."""
        check_key(key)
        root = self._real_root()
        if not _has_link(root, key):
            return root / key
        folder, _, name = key.rpartition("/")
        path = Path(os.path.realpath(root / folder)) / name
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        if not (path.is_relative_to(root) and target.is_relative_to(root)):
            raise InvalidValueError(
                f"The key {key!r} leads out of {self.url!r} through a symbolic link, to '{target}'. "
                "Remove the link, or open the folder that it leads to."
            )
        return path

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        with explained(f"read {key!r} of {self.url!r}"):
            path = self._resolve(key)
            try:
                if not _is_object(path):
                    raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path))
                file = path.open("rb")
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, "there is no such object") from error
        with file:
            yield file

    def _walk(self, root: Path, folder: Path, prefix: str, start: str) -> Iterator[Blob]:
        """Yield what is under one folder in the order of whole keys, in which ``a.b`` precedes ``a/b``."""
        unfinished = [self._entries(folder, prefix, start)]  # however deep folders are, nothing recurs
        while unfinished:
            key, entry = next(unfinished[-1], ("", None))
            if entry is None:
                unfinished.pop()
                continue
            if key.endswith("/"):
                unfinished.append(self._entries(Path(entry.path), key, ""))
                continue
            with explained(f"list {key!r} of {self.url!r}"):
                status = _status(entry.path)
            if status is None:
                continue
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
                continue
            yield Blob(key, status.st_size, status.st_mtime)

    def _entries(self, folder: Path, prefix: str, start: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Return what is in one folder, by key and in their order; the keys of folders end in ``"/"``."""
        found: list[tuple[str, os.DirEntry[str]]] = []
        with explained(f"list the folder '{folder}'"):
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith(start) and is_key(entry.name):
                            is_folder = entry.is_dir(follow_symlinks=False)
                            found.append((prefix + entry.name + "/" * is_folder, entry))
            except (FileNotFoundError, NotADirectoryError):
                pass  # it never was there, or vanished meanwhile
        return iter(sorted(found, key=lambda pair: pair[0]))

    @contextmanager
    def _temporary(self, folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
        """A new file in a folder, which is made; removed unless the body renames it, as are empty folders."""
        try:
            with discarded(*in_folder(folder, lambda: open_temporary(folder), self._note_folder)) as opened:
                yield opened
        except BaseException:
            with suppress(OSError):  # what went wrong first is what the caller must see
                self._tidy({folder})
            raise

    def _move(self, original: BinaryIO, source: Path, path: Path, *, durable: bool) -> bool:
        """Rename a file to its place, or return False where only a copy can get there."""
        if source.is_symlink():
            return False
        if durable:
            sync(original.fileno())
            self._sync_loose()
        try:
            in_folder(path.parent, lambda: source.replace(path), self._note_folder)
        except OSError as error:
            with suppress(OSError):
                self._tidy({path.parent})
            if error.errno != errno.EXDEV:
                raise
            return False
        return True

    def _changed(self, path: Path, *, durable: bool) -> None:
        """Make the name of a file durable, now or later with the file itself."""
        self._note_folder(path.parent)
        if durable:
            self._sync_loose()
        else:
            self._note(path, is_folder=False)

    def _note_folder(self, path: Path) -> None:
        self._note(path, is_folder=True)

    def _note(self, path: Path, *, is_folder: bool) -> None:
        """Remember what the next durable change has to make durable first."""
        with self._loose_lock:
            self._loose[path] = is_folder

    def _sync_loose(self) -> None:
        """Make durable what was noted; while something cannot be, no later change is durable either."""
        with self._loose_lock:
            # Files first: a file system with a journal then has little left to do for their folders.
            for path in sorted(self._loose, key=self._loose.__getitem__):
                try:
                    sync_path(path)
                except OSError as error:
                    raise OSError(error.errno, f"{error.strerror} (for '{path}')") from error
                del self._loose[path]

    def _tidy(self, folders: set[Path], *, durable: bool = True) -> None:
        """Remove those of the folders that are empty, and parents that this empties."""
        root = self._real_root()
        remaining = set()
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            while root in folder.parents:
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    break  # not empty, or not ours to remove; an empty folder holds no object
                folder = folder.parent
            remaining.add(folder)
        for folder in remaining:
            self._note_folder(folder)
        if durable:
            self._sync_loose()


_open_storages: "weakref.WeakSet[LocalStorage]" = weakref.WeakSet()


def _unlock_in_child() -> None:
    # The thread of the parent that may hold a lock does not exist in a forked child.
    for storage in _open_storages:
        storage._loose_lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def _has_link(root: Path, key: str) -> bool:
    """Whether a part of the path of a key below the root is a symbolic link."""
    path = str(root)
    for name in key.split("/"):
        path = os.path.join(path, name)  # noqa: PTH118 - pathlib took a tenth of the time of a small save
        try:
            if stat.S_ISLNK(os.lstat(path).st_mode):
                return True
        except OSError:
            return False  # there is nothing, or whoever uses the path is told what is wrong with it
    return False


def _path_of(url: str) -> Path:
    text = url.removeprefix("file://").removeprefix("local://")
    if "://" in text or (text != url and not text.startswith("/")):
        raise InvalidValueError(
            f"{without_credentials(url)!r} is no place on a local disk. Write a path, or 'file:///' and an "
            "absolute path."
        )
    path = with_home(text) if text == url else Path(text)
    # Only a path with ".." needs its links resolved to be short; any other is best shown as it was given.
    return path.resolve() if ".." in path.parts else path.absolute()


def _status(path: str | Path) -> os.stat_result | None:
    """The status of a regular file, links followed; None for anything else and for nothing."""
    try:
        status = os.stat(path)  # noqa: PTH116 - takes the path of a directory entry as it is
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None


def _is_object(path: Path) -> bool:
    return _status(path) is not None


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder and the names of its files, following no links and however deep they are."""
    left = [root]
    while left:
        for folder, inner, names in os.walk(left.pop(), onerror=_raise_unless_gone):
            left += [path for path in (Path(folder, name) for name in inner) if not path.is_symlink()]
            inner.clear()  # os.walk itself would recur
            yield folder, names


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
