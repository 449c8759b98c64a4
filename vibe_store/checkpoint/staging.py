"""Folders for what is on its way between a pytree and a storage that is no local disk.

They are made in ``VIBE_STORE_STAGING_DIR``, or where temporary files go. Each holds a lock for as long as its
process lives, by which the next one tells what a killed process left.
"""

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vibe_store.checkpoint.pending import staging_key
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import StorageBackend

__all__ = ["STAGING_DIR", "check_room", "staged", "temporary_folder"]

STAGING_DIR = "VIBE_STORE_STAGING_DIR"
_PREFIX = "vibe_store-staging-"
_LOCK = "lock"
_JUST_MADE_SECS = 60.0


@contextmanager
def staged(storage: StorageBackend, attempt: str, size: int) -> Iterator[Path]:
    """Give a folder for the files of an attempt: beside the storage's own files where it is a local disk.

    Args:
        storage: where the files go from there.
        attempt: whose they are.
        size: about how many bytes they are.

    Raises:
        OSError: they do not fit there.
    """
    local = storage.local_path(staging_key(attempt))
    if local is None:
        check_room(size, f"a checkpoint on its way to {storage.url}")
        with temporary_folder() as folder:
            yield folder
        return
    local.mkdir(parents=True)
    try:
        yield local
    finally:
        try:
            local.rmdir()  # a commit has moved away all that was in it
        except OSError:
            shutil.rmtree(local, ignore_errors=True)  # what stays is swept by the next writer


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a new folder that nobody else uses, and remove it.

    Raises:
        InvalidValueError: ``VIBE_STORE_STAGING_DIR`` names no folder.
    """
    root = _root()
    _remove_abandoned(root)
    top = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    try:
        with (top / _LOCK).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder = top / "files"
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(top, ignore_errors=True)  # what stays is removed by the next process


def _root() -> Path:
    chosen = os.environ.get(STAGING_DIR)
    if not chosen:
        return Path(tempfile.gettempdir())
    if not Path(chosen).is_dir():
        raise InvalidValueError(
            f"{STAGING_DIR} is {chosen!r}, which is no folder. Create it, or name another."
        )
    return Path(chosen)


def check_room(needed: int, what: str) -> None:
    """Raise before anything is written where ``needed`` bytes will not fit.

    Raises:
        OSError: they will not.
    """
    root = _root()
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"'{root}' has {free:,} bytes free, and {what} passes through it with {needed:,}. Make room, "
            f"or set {STAGING_DIR} to a folder that has it",
        )


def _remove_abandoned(root: Path) -> None:
    for top in root.glob(f"{_PREFIX}*"):
        # Another's, or made or removed at this moment: it is none of ours to judge.
        with suppress(OSError), (top / _LOCK).open("rb+") as lock:
            if time.time() - top.stat().st_mtime < _JUST_MADE_SECS:
                continue  # it may not be locked yet
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(top, ignore_errors=True)
