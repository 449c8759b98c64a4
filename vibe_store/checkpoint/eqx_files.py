"""Single ``.eqx`` files: on a local disk or in a bucket, by themselves or as part of a checkpoint."""

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vibe_store.checkpoint.layout import BEST, MANIFEST, folder_of
from vibe_store.checkpoint.lookup import read_manifest
from vibe_store.checkpoint.manifest import Manifest, StoredFile
from vibe_store.checkpoint.opening import locate, open_directory
from vibe_store.checkpoint.reading import of_one_manifest
from vibe_store.checkpoint.source import StoredSource
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
)
from vibe_store.interfaces import PyTree, StorageBackend
from vibe_store.serializers import eqx
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of
from vibe_store.temporary_folders import temporary_folder

__all__ = ["load_eqx", "local_file", "save_eqx"]


def load_eqx(
    path: str | os.PathLike[str] | UrlPath,
    like: PyTree = None,
    *,
    partial: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> PyTree:
    """Load one ``.eqx`` file, written by :func:`save_eqx`, by a checkpoint or by plain Equinox.

    Where the file belongs to a checkpoint that keeps it under another name (in a bucket always, on a disk
    where it was replaced), that file is read; of one that is replaced meanwhile, the new file. A file in a
    bucket is fetched whole, and compared with the manifest that names it.

    Args:
        path: the file, which may begin with ``~``, or its URL.
        like: a template of the same structure, shapes and dtypes; its leaves may be ``jax.ShapeDtypeStruct``.
            Without one, the tree comes back as :func:`load_checkpoint` says.
        partial: read only what the template has, of a file that may hold more.
        storage_options: options of the storage of a URL, such as credentials.

    Raises:
        CheckpointNotFoundError: there is no such file.
        TemplateMismatchError: template and file differ; every difference is in it, by path.
        CorruptCheckpointError: the file is not what was written.
    """
    place = place_of(path, storage_options)
    if isinstance(place, UrlPath):
        with ExitStack() as stack:
            file = _fetch(place, stack)
            return eqx.load_eqx(file, like, partial=partial, name=without_credentials(place.url))
    while True:
        file = _resolve(place)
        try:
            return eqx.load_eqx(file, like, partial=partial)
        except CheckpointNotFoundError:
            if _resolve(place) == file:
                raise  # else the checkpoint was replaced meanwhile


def save_eqx(path: str | os.PathLike[str], pytree: PyTree) -> None:
    """Save a pytree to one local file, whole or not at all; folders are made, and a file there is replaced.

    ``eqx.tree_deserialise_leaves`` reads the file too, as far as plain Equinox can store the leaves.

    Args:
        path: the file, which may begin with ``~``; no suffix is added.
        pytree: any pytree of arrays, typed PRNG keys, Python scalars, strings, bytes and callables (which are
            recorded by name only).

    Raises:
        UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each of them.
        InvalidValueError: the path is a URL, a folder, or another thing that is no file; or the file belongs
            to a checkpoint, by the manifest beside it.
        NewerFormatError: the manifest beside it is one that only a newer vibe_store can read.
        OSError: the file cannot be written; the one that was there is as it was.
    """
    place = place_of(path)
    if isinstance(place, UrlPath):
        raise InvalidValueError(
            f"save_eqx writes a local file, and {without_credentials(place.url)!r} is a URL. Save "
            "a checkpoint there with save_checkpoint(): load_eqx() reads the state.eqx of one from any URL."
        )
    _check_is_no_part_of_a_checkpoint(Path(os.path.realpath(place)))
    eqx.save_eqx(place, pytree)


def local_file(storage: StorageBackend, key: str, stack: ExitStack) -> Path | None:
    """Return a local file with the bytes of an object, fetched until the stack ends where it is elsewhere.

    None where there is no such object.
    """
    local = storage.local_path(key)
    if local is not None:
        return local if local.is_file() else None
    target = stack.enter_context(temporary_folder()) / "object"
    try:
        storage.get(key, target)
    except FileNotFoundError:
        return None
    return target


def _fetch(url: UrlPath, stack: ExitStack) -> Path:
    """Return a local copy of an object: of what the manifest beside it calls by its name, if there is one."""
    storage, where = _folder_around(url), without_credentials(url.url)
    was_read = False

    def fetch(manifest: Manifest) -> Path | None:
        nonlocal was_read
        was_read = True
        for item in manifest.items.values():
            if url.name in item.files:
                return StoredSource(storage, "", item, stack, verify="full").path(url.name)
        return None

    file, damage = None, None
    try:
        file = of_one_manifest(storage, None, fetch)
    except CheckpointNotFoundError:
        pass
    except CorruptCheckpointError as error:
        if was_read:
            raise  # it is the file that is damaged
        damage = error
    file = file or local_file(storage, url.name, stack)
    if file is None:
        raise damage or CheckpointNotFoundError(f"There is no object {where}.")
    if damage is not None:
        _warn_of(damage, where)
    return file


def _folder_around(url: UrlPath) -> StorageBackend:
    folder = url.parent
    if url.is_root:
        raise InvalidValueError(
            f"{without_credentials(url.url)!r} names no object. Give 'scheme://...' and its path."
        )
    if folder.name == BEST:
        _, step = locate(folder, None, None)
        folder = folder if step is None else folder.parent / folder_of(step)
    return open_directory(folder, None)


def _resolve(path: Path) -> Path:
    """Return the file that holds the bytes of ``path``, as the manifest beside it says, if there is one."""
    storage = LocalStorage(str(path.parent.absolute()))  # which keeps to this folder
    try:
        manifest = _manifest_in(storage)
    except CorruptCheckpointError as error:
        if not path.is_file():
            raise
        _warn_of(error, str(path))
        return path
    files = {} if manifest is None else _files_of(manifest)
    if path.name not in files:
        return path
    return storage.local_path(files[path.name].key)


def _check_is_no_part_of_a_checkpoint(path: Path) -> None:
    try:
        manifest = _manifest_in(LocalStorage(str(path.parent)))
    except CorruptCheckpointError:
        return  # that checkpoint is damaged already, and what it named cannot be known
    if manifest is None:
        return
    if path.name in {MANIFEST, *_files_of(manifest), *(file.key for file in manifest.files)}:
        raise InvalidValueError(
            f"{path} belongs to the checkpoint whose {MANIFEST} is beside it, which would not load any more. "
            "Choose another name, or replace the checkpoint with save_checkpoint()."
        )


def _manifest_in(storage: LocalStorage) -> Manifest | None:
    """Return the manifest of a folder, whatever the folder is called; None where there is none."""
    try:
        return read_manifest(storage, None)
    except (CheckpointNotFoundError, NotADirectoryError):
        return None


def _files_of(manifest: Manifest) -> dict[str, StoredFile]:
    """Return the files of every item, by the names that their serializers gave them."""
    return {name: file for item in manifest.items.values() for name, file in item.files.items()}


def _warn_of(damage: CorruptCheckpointError, where: str) -> None:
    warnings.warn(
        f"{where} is read as it is, although another file may have replaced it: {damage}",
        DamagedCheckpointWarning,
        stacklevel=4,
    )
