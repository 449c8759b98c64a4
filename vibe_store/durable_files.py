"""Files on a local disk that appear whole and durable, or not at all."""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from uuid import uuid4

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "TEMPORARY_PREFIX",
    "EarlyWriter",
    "beginning_with",
    "copy",
    "create",
    "discarded",
    "explained",
    "in_folder",
    "open_temporary",
    "remove_abandoned",
    "remove_if_abandoned",
    "sync",
    "sync_path",
]

_T = TypeVar("_T")

TEMPORARY_PREFIX = ".vibe-store-tmp-"
"""How the names of unfinished files begin; no key of a storage may hold such a name."""

_EARLY = 8 << 20

_ATTEMPTS = 100
"""How often a writer makes its folder anew, when somebody who deletes keeps removing the folder as empty."""

_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK})
_NO_HARD_LINKS = _UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}
_NO_FAST_COPY = _UNSUPPORTED | {errno.EPERM, errno.EXDEV, errno.EBADF, errno.ETXTBSY}

_ADVICE = {
    errno.ENOSPC: "Free some space there, or choose another place",
    errno.EDQUOT: "Free some of your quota there, or choose another place",
    errno.EACCES: "Check the permissions of the folder, or choose another place",
    errno.EPERM: "Check the permissions of the folder, or choose another place",
    errno.EROFS: "Choose a place that can be written to",
    errno.ENOTDIR: "A part of its path is a file, so choose another place",
    errno.ENAMETOOLONG: "Choose shorter names",
}


def in_folder(folder: Path, action: Callable[[], _T], changed: Callable[[Path], None]) -> _T:
    """Make a folder and do something in it; again, if somebody removed it in between as empty.

    ``changed`` is told of each folder that got a new one.
    """
    for _ in range(_ATTEMPTS):
        try:
            _make_folder(folder, changed)
            return action()
        except FileNotFoundError:
            continue
    _make_folder(folder, changed)
    return action()


def _make_folder(folder: Path, changed: Callable[[Path], None]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        changed(new.parent)


def open_temporary(folder: Path) -> tuple[BinaryIO, Path]:
    """Make an empty hidden file, locked while it is open, so that nobody takes it for a dead writer's."""
    while True:
        path = folder / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        file = path.open("xb")
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                file.close()
                path.unlink()
                raise
        if os.fstat(file.fileno()).st_nlink > 0:
            return file, path
        file.close()  # swept before it was locked


class EarlyWriter:
    """Writes to a file whose bytes begin to go to the disk while more come, so that its sync is short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._written = self._told = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of it."""
        count = self._file.write(data)
        self._written += count
        if self._written - self._told >= _EARLY:
            self._tell()
        return count

    def flush(self) -> None:
        """Leave nothing in the file's own buffer, and nothing that does not begin to go to the disk."""
        self._file.flush()
        self._tell()

    def _tell(self) -> None:
        # Told that bytes are not needed in memory, Linux begins to write those that are not on the disk.
        if hasattr(os, "posix_fadvise"):
            extent = self._written - self._told
            os.posix_fadvise(self._file.fileno(), self._told, extent, os.POSIX_FADV_DONTNEED)
        self._told = self._written


@contextmanager
def discarded(file: BinaryIO, path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Pass on a file, then close it and remove what the body did not rename."""
    try:
        with file:
            yield file, path
    finally:
        path.unlink(missing_ok=True)


def create(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "it exists already") from error
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with _locked(path.parent):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "it exists already") from None
            temporary.replace(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the one lock of a folder; it goes with its process."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove what dead writers of files in a folder left there; nothing where there is no folder."""
    for path in beginning_with(TEMPORARY_PREFIX, folder):
        remove_if_abandoned(path)


def beginning_with(prefix: str, folder: Path) -> list[Path]:
    """Return what a folder holds whose name begins so; nothing where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return [folder / entry.name for entry in entries if entry.name.startswith(prefix)]
    except FileNotFoundError:
        return []


def remove_if_abandoned(path: Path) -> bool:
    """Remove an unfinished file unless its writer may be alive."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):
        return False  # finished meanwhile, or another user's
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False  # a symbolic link, which no writer of ours makes
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        if isinstance(error, BlockingIOError) or error.errno in _UNSUPPORTED:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def copy(source: BinaryIO, target: BinaryIO) -> None:
    """Copy to the end: in the kernel where it can, which shares the blocks where the file system can."""
    if sys.platform == "linux":
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                pass
        except OSError as error:
            if error.errno not in _NO_FAST_COPY:
                raise
    # Whatever is left: everything where there is no fast path, else nothing.
    shutil.copyfileobj(source, target, 1 << 20)
    target.flush()


def sync(descriptor: int) -> None:
    """Return once the file is on the disk itself."""
    if sys.platform == "darwin":
        with suppress(OSError):  # network volumes have no full sync, only the plain one
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk, as far as its file system can tell.

    What is no longer there needs nothing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explained(attempt: str) -> Iterator[None]:
    """Make an error of the operating system a sentence that says what, where, why and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        advice = _ADVICE.get(error.errno)
        message = f"Could not {attempt}: {error.strerror}" + (f". {advice}." if advice else ".")
        raise OSError(error.errno, message) from error
