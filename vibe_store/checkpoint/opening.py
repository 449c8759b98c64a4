"""From the directory that a user names to the storage of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vibe_store.checkpoint.layout import BEST, check_step, is_step_folder, split_step_folder
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import StorageBackend
from vibe_store.registry import open_storage

__all__ = ["Directory", "locate", "open_directory"]

Directory: TypeAlias = str | os.PathLike[str] | StorageBackend
"""A directory of checkpoints: a local folder, the URL of one, or a storage that is open already."""


def open_directory(directory: Directory, options: Mapping[str, Any] | None) -> StorageBackend:
    """Return the storage of a directory of checkpoints."""
    if isinstance(directory, StorageBackend):
        return directory
    return open_storage(directory, **(options or {}))


def locate(
    directory: Directory, step: int | None, options: Mapping[str, Any] | None
) -> tuple[StorageBackend, int | None]:
    """Return the storage of a directory of checkpoints, and the step in it.

    Without a step, a directory called ``step_N``, or a link to one, is step N of the directory around it.
    """
    if step is not None:
        return open_directory(directory, options), check_step(step)
    if not isinstance(directory, StorageBackend):
        link = Path(directory).expanduser()
        split = split_step_folder(_target(link) if link.is_symlink() else os.fspath(directory))
        if split is not None:
            directory, step = split
    return open_directory(directory, options), step


def _target(link: Path) -> str:
    """Return where a link of the user's leads; `best`, which comes with its directory, stays in it."""
    if link.name != BEST:
        return os.path.realpath(link)
    target = link.readlink()
    if not is_step_folder(os.fspath(target)):
        raise InvalidValueError(
            f"{link} points to '{target}', which is no step_N beside it. Remove it, or mark another step."
        )
    return os.fspath(link.parent / target)
