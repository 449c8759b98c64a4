"""Folders for what a process needs for a while, which the next one removes where the process was killed.

They are made in ``VIBE_STORE_STAGING_DIR``, or where temporary files go. Each holds a lock for as long as its
process lives, by which the next one tells what a killed process left.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vibe_store.errors import InvalidValueError

__all__ = ["STAGING_DIR", "temporary_folder", "temporary_root"]

STAGING_DIR = "VIBE_STORE_STAGING_DIR"
_PREFIX = "vibe_store-staging-"
_LOCK = "lock"
_JUST_MADE_SECS = 60.0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give a new folder that nobody else uses, and remove it.

    Raises:
        InvalidValueError: ``VIBE_STORE_STAGING_DIR`` names no folder.
    """
    root = temporary_root()
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


def temporary_root() -> Path:
    """Return the folder in which they are made.

    Raises:
        InvalidValueError: ``VIBE_STORE_STAGING_DIR`` names no folder.
    """
    chosen = os.environ.get(STAGING_DIR)
    if not chosen:
        return Path(tempfile.gettempdir())
    if not Path(chosen).is_dir():
        raise InvalidValueError(
            f"{STAGING_DIR} is {chosen!r}, which is no folder. Create it, or name another."
        )
    return Path(chosen)


def _remove_abandoned(root: Path) -> None:
    for top in root.glob(f"{_PREFIX}*"):
        # Another's, or made or removed at this moment: it is none of ours to judge.
        with suppress(OSError), (top / _LOCK).open("rb+") as lock:
            if time.time() - top.stat().st_mtime < _JUST_MADE_SECS:
                continue  # it may not be locked yet
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(top, ignore_errors=True)
