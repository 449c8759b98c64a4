"""From the directory that a user names to the storage of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vibe_store.checkpoint.layout import BEST, check_step, is_step_folder, read_best, split_step_folder
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import StorageBackend
from vibe_store.registry import open_storage
from vibe_store.storage.url_path import UrlPath, place_of, url_path_of

__all__ = ["Directory", "locate", "open_directory"]

Directory: TypeAlias = str | os.PathLike[str] | UrlPath | StorageBackend
"""A directory of checkpoints: a local folder, the URL of one (as text, as a UrlPath, which may bring
storage options, or as a path of universal-pathlib), or a storage that is open already."""


def open_directory(directory: Directory, options: Mapping[str, Any] | None) -> StorageBackend:
    """Return the storage of a directory of checkpoints.

    ``options`` come on top of those that the directory brings, and win over them by name.

    Raises:
        InvalidValueError: options were given for a storage that is open already, or for a local folder.
    """
    if isinstance(directory, StorageBackend):
        if options:
            raise InvalidValueError(
                f"{directory.url} is open already, so the storage_options {sorted(options)} would change "
                "nothing. Leave them out, or open the storage with them."
            )
        return directory
    if not isinstance(directory, str):
        url = url_path_of(directory, options)
        if url is not None:
            return open_storage(url.url, **url.storage_options)
        if isinstance(directory, UrlPath):  # on the local disk
            directory = directory.url
    return open_storage(directory, **(options or {}))


def locate(
    directory: Directory, step: int | None, options: Mapping[str, Any] | None
) -> tuple[StorageBackend, int | None]:
    """Return the storage of a directory of checkpoints, and the step in it.

    Without a step, a directory called ``step_N``, or a link to one, is step N of the directory around it; so
    is one called ``best`` where the directory around it marks a step as the best one.
    """
    if step is not None:
        return open_directory(directory, options), check_step(step)
    if isinstance(directory, StorageBackend):
        return open_directory(directory, options), None
    place = place_of(directory, options)
    if isinstance(place, UrlPath):
        return _locate_by_url(directory, place, options)
    split = split_step_folder(_target(place) if place.is_symlink() else os.fspath(place))
    if split is not None:
        directory, step = split
    return open_directory(directory, options), step


def _locate_by_url(
    directory: Directory, url: UrlPath, options: Mapping[str, Any] | None
) -> tuple[StorageBackend, int | None]:
    if not url.is_root:
        if is_step_folder(url.name):
            return open_directory(url.parent, None), int(url.name.partition("_")[2])
        if url.name == BEST:
            around = open_directory(url.parent, None)
            marked = read_best(around) if around.local_path("") is None else None
            if marked is not None:
                return around, marked
    return open_directory(directory, options), None


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
