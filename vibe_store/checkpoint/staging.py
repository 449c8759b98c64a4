"""Folders for what is on its way between a pytree and a storage that is no local disk."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vibe_store.checkpoint.pending import staging_key
from vibe_store.interfaces import StorageBackend
from vibe_store.temporary_folders import STAGING_DIR, temporary_folder, temporary_root

__all__ = ["check_room", "staged"]


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


def check_room(needed: int, what: str) -> None:
    """Raise before anything is written where ``needed`` bytes will not fit.

    Raises:
        OSError: they will not.
    """
    root = temporary_root()
    free = shutil.disk_usage(root).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"'{root}' has {free:,} bytes free, and {what} passes through it with {needed:,}. Make room, "
            f"or set {STAGING_DIR} to a folder that has it",
        )
