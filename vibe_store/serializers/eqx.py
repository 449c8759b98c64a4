"""The default serializer: one ``.eqx`` file a pytree, readable by plain Equinox, verified when loaded."""

import functools
import io
import os
import stat
from pathlib import Path

import xxhash

from vibe_store.durable_files import (
    EarlyWriter,
    discarded,
    explained,
    in_folder,
    open_temporary,
    remove_abandoned,
    sync,
    sync_path,
)
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, InvalidValueError
from vibe_store.interfaces import FileEntry, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers.eqx_file import read_trailer, write_file
from vibe_store.serializers.eqx_plain import load_plain
from vibe_store.serializers.host import rebuild, snapshot, table_values, to_host
from vibe_store.serializers.leaf_data import LeafWriter, read_parts, read_records
from vibe_store.serializers.single_file import item_file, load_item_file, wanted_dtypes
from vibe_store.serializers.template import in_containers, template_of
from vibe_store.serializers.tree import (
    compare,
    flatten,
    warn_of_other_callables,
)
from vibe_store.serializers.verifying_reader import VerifyingReader

__all__ = ["EqxSerializer", "load_eqx", "save_eqx"]


class EqxSerializer(Serializer):
    """Stores each item as ``<item>.eqx``, in the format of :mod:`vibe_store.serializers.eqx_file`."""

    name = "eqx"

    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        """Return the tree taken apart, with every leaf on the host and owned by the snapshot alone.

        The arrays of ``reuse`` are written over where shape and dtype are the same.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
        """
        return snapshot(tree, reuse=reuse)

    def save(self, tree: PyTree, directory: Path, item: str) -> SavedItem:
        """Write ``<item>.eqx``, from a tree or a snapshot of one.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
            OSError: the file cannot be written; nothing of it is left.
        """
        name = f"{item}.eqx"
        flat = flatten(tree, to_save=True)
        values = to_host(flat)
        with item_file(directory / name) as writer:
            leaves = write_file(writer, flat.rows, values)
        return SavedItem((FileEntry(name, writer.size, writer.checksum),), leaves)

    def load(self, source: Source, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
        """Return a tree of the structure of ``like`` with the saved leaves.

        Where ``like`` has only a part of them, only the bytes of that part are read.

        Raises:
            TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
            CorruptCheckpointError: what is stored is not what was saved.
            InvalidValueError: an array cannot be put where the template wants it.
        """
        return load_item_file(source, f"{item}.eqx", item, like, partial=partial)


def save_eqx(path: str | os.PathLike[str], pytree: PyTree) -> None:
    """Save a pytree to one local file; see :func:`vibe_store.checkpoint.save_eqx`."""
    # A symbolic link stays one: the file that it leads to is replaced.
    target = Path(os.path.realpath(path))
    flat = flatten(pytree, to_save=True)
    values = to_host(flat)
    with explained(f"write '{target}'"):
        mode = _mode(target)
        remove_abandoned(target.parent)
    with (
        explained(f"write '{target}'"),
        discarded(*in_folder(target.parent, lambda: open_temporary(target.parent), sync_path)) as opened,
    ):
        file, temporary = opened
        if mode is not None:  # before anything is in it that not everybody may read
            os.fchmod(file.fileno(), mode)
        write_file(LeafWriter(EarlyWriter(file)), flat.rows, values)
        file.flush()
        sync(file.fileno())
        temporary.replace(target)
        sync_path(target.parent)


def load_eqx(
    path: str | os.PathLike[str], like: PyTree = None, *, partial: bool = False, name: str | None = None
) -> PyTree:
    """Load a pytree from a file of :func:`save_eqx` or of plain ``eqx.tree_serialise_leaves``.

    Args:
        path: the file.
        like: a pytree of the same structure, of arrays or of ``jax.ShapeDtypeStruct``; its leaves decide the
            types of the new ones, and where arrays go. None gives dicts and lists after the paths of the
            leaves.
        partial: read only what ``like`` has, of a file that may hold more.
        name: what errors call the file; its path by default.

    Returns:
        A new tree of the structure of ``like``. A file of plain Equinox gives an
        :class:`~vibe_store.errors.UnverifiedCheckpointWarning`.

    Raises:
        CheckpointNotFoundError: there is no such file.
        TemplateMismatchError: the file and ``like`` differ; all differences are in it, by path.
        CorruptCheckpointError: the file is not what was written.
        NewerFormatError: the file was written by a later vibe_store.
        InvalidValueError: the path is a folder, or an array cannot be put where ``like`` wants it; or the
            file is one of plain Equinox, which has no leaf table, and ``like`` is missing or partial.
    """
    name = os.fspath(path) if name is None else name
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        trailer = read_trailer(file, size, name)
        if trailer is None:
            if like is None or partial:
                raise InvalidValueError(
                    f"{name} has no leaf table (plain Equinox wrote it, say), so it cannot be loaded without "
                    "a template (like=...) of the whole tree."
                )
            return load_plain(file, size, flatten(like), name)
        saved, data_size = trailer.leaves, trailer.data_size
        flat = flatten(template_of(saved) if like is None else like)
        compare(saved, flat, partial=partial, what=f"file {name}")
        dtypes = wanted_dtypes(saved, flat)
        if len(flat.rows) < len(saved):
            arrays = read_parts(functools.partial(_read_part, file, name), data_size, saved, dtypes, name)
        else:
            reader = VerifyingReader(file, data_size, trailer.data_checksum.hex(), name)
            arrays = read_records(reader, data_size, saved, dtypes, name)
    warn_of_other_callables(saved, flat, stacklevel=3)
    tree = rebuild(flat, {**table_values(saved), **arrays})
    return in_containers(tree) if like is None else tree


def _open(path: str | os.PathLike[str]) -> io.BufferedReader:
    try:
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"There is no file {os.fspath(path)}.") from error
    except IsADirectoryError as error:
        raise InvalidValueError(f"{os.fspath(path)} is a folder; load_eqx reads a single file.") from error


def _read_part(file: io.BufferedReader, name: str, start: int, buffer: memoryview, checksum: str) -> None:
    file.seek(start)
    if file.readinto(buffer) != len(buffer):
        raise CorruptCheckpointError(f"{name} ended early, in the middle of a leaf.")
    if xxhash.xxh3_128_hexdigest(buffer) != checksum:
        raise CorruptCheckpointError(
            f"{name} is damaged: the {len(buffer)} bytes from byte {start} do not match their checksum."
        )


def _mode(target: Path) -> int | None:
    """Return the permissions of the file that is to be replaced, or None where there is none."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise InvalidValueError(f"{target} is {what}; save_eqx writes a single file.")
    return stat.S_IMODE(status.st_mode)
