"""The serializer ``orbax``: pytrees in the format of Orbax, readable by plain Orbax, verified when loaded."""

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from orbax.checkpoint import v1 as ocp

from vibe_store.errors import CorruptCheckpointError, InvalidValueError
from vibe_store.interfaces import FileEntry, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers.host import rebuild, snapshot, table_values, to_host
from vibe_store.serializers.orbax_read import read_arrays
from vibe_store.serializers.orbax_tree import has_array, places, stored_name, to_orbax
from vibe_store.serializers.places import nest
from vibe_store.serializers.tree import HostCopy, compare, dtype_named, flatten, warn_of_other_callables
from vibe_store.temporary_folders import temporary_folder

__all__ = ["OrbaxSerializer"]

_MARKERS = ("orbax.checkpoint", "_CHECKPOINT_METADATA")
"""The files by which Orbax knows a folder as a checkpoint, whatever is in the folders below it."""

_UNUSABLE_ITEM = re.compile(r"step_[0-9]+|metrics|_CHECKPOINT_.*")
_CHUNK = 4 << 20
_MOMENTS, _MOMENT_SECS = 10, 0.05
_OS_ERROR = re.compile(r"\[os_error_code='([0-9]+)'\]")


class OrbaxSerializer(Serializer):
    """Stores each item as the checkpointable ``<item>`` of an Orbax v1 checkpoint.

    A step's folder is then a checkpoint of plain Orbax::

        from orbax.checkpoint import v1 as ocp

        state = ocp.load("checkpoints/step_5")
        runner = ocp.load("checkpoints/step_5", checkpointable_name="runner")

    (A step that was replaced keeps its files under names with the id of the attempt:
    ``ocp.load("checkpoints/step_5/state.<attempt>", checkpointable_name=None)``.)

    What Orbax is given is a tree of dicts and lists after the paths of the leaves: attributes and dict keys
    are names, tuples are lists. (Where names could be mistaken for each other, ``{"a.b": 1, "a": {"b": 2}}``,
    it is a flat dict by path.) In it are

    * arrays of the types that Orbax has, 64-bit ones included, as NumPy arrays (plain Orbax makes them JAX
      arrays, sharded as is wished, where its template says so); bool and complex numbers and NumPy scalars
      as arrays without dimensions;
    * int and float as such;
    * the key data of typed PRNG keys, as ``jax.random.key_data`` gives it;
    * arrays of the types that it lacks (``uint4``, ``float6_e2m3fn``, ``datetime64``, other orders of bytes,
      ...) as unsigned bytes, with one more axis that is as long as an element: ``array.view(dtype)[..., 0]``;
    * None for strings, bytes and callables, which are in the leaf table of the manifest,
      and for arrays without elements, whose shape and dtype are there. A tree of such leaves alone, or of
      none, is ``{"nothing_stored": 1}``.

    Files are the fewest that Orbax writes: all arrays of an item are packed in one OCDBT database. Loading
    reads them with TensorStore, as Orbax would, having checked what each claims to be. Sharded arrays are
    gathered on the host, and loading places arrays as the template asks, on any number of devices. The arrays
    must be in reach of one process, and only a job of one process can save and load.

    Args:
        compress: compress arrays with zstd. It saves little on random floats, and takes time and memory.
    """

    name = "orbax"

    def __init__(self, *, compress: bool = False) -> None:
        if not isinstance(compress, bool):
            raise InvalidValueError(f"compress is True or False; got {compress!r}.")
        self._compress = compress

    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        """Return the tree taken apart, with every leaf on the host and owned by the snapshot alone.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
        """
        return snapshot(tree, reuse=reuse)

    def save(self, tree: PyTree, directory: Path, item: str) -> SavedItem:
        """Write the folder ``<item>``, from a tree or a snapshot of one, and the marks of a checkpoint.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
            InvalidValueError: the item's name means something else to Orbax or in a directory of checkpoints,
                or the job has several processes.
            OSError: the files cannot be written.
        """
        _check_job()
        if _UNUSABLE_ITEM.fullmatch(item):
            raise InvalidValueError(
                f"The serializer 'orbax' cannot store an item {item!r}: a folder of that name means "
                "something else. Choose another name."
            )
        flat = flatten(tree, to_save=True)
        arrays = {
            row.path: to_orbax(row, value.data if isinstance(value, HostCopy) else value)
            for row, value in zip(flat.rows, to_host(flat), strict=True)
            if has_array(row)
        }
        where = places(row.path for row in flat.rows)
        state = nest({place: arrays.get(path) for path, place in where.items()})
        names = self._write(state if arrays else {"nothing_stored": 1}, directory, item)
        return SavedItem(tuple(_entry(directory, name) for name in names), flat.rows)

    def load(self, source: Source, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
        """Return a tree of the structure of ``like`` with the saved leaves.

        Every file of the item is verified first. With ``partial=True``, only what ``like`` has is read.

        Raises:
            TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
            CorruptCheckpointError: what is stored is not what was saved.
            InvalidValueError: an array cannot be put where the template wants it, the job has several
                processes, or ``VIBE_STORE_STAGING_DIR``, where links to the files are made, is no folder.
        """
        _check_job()
        flat = flatten(like)
        compare(source.leaves, flat, partial=partial, what=f"saved item {item!r}")
        wanted = {row.path for row in flat.rows}
        stored = [row for row in source.leaves if row.path in wanted and row.shape is not None]
        with temporary_folder() as folder:
            _link(source, item, folder)
            where = places(row.path for row in source.leaves)
            arrays = read_arrays(
                folder / item,
                {stored_name(where[row.path]): row for row in stored if has_array(row)},
                leaves=len(source.leaves),
            )
        empty = {
            row.path: np.empty(row.shape or (), dtype_named(row.dtype))
            for row in stored
            if not has_array(row)
        }
        warn_of_other_callables(source.leaves, flat, stacklevel=3)
        return rebuild(flat, {**table_values(source.leaves), **empty, **arrays})

    def _write(self, state: Any, directory: Path, item: str) -> list[str]:
        """Have Orbax write a tree, and return the names of the files that are new in the directory."""
        # Orbax makes a folder of its own, so its parts are moved out of one that is beside their places.
        beside = directory / f".{item}-orbax"
        try:
            with _failure_of_storage(directory / item), _not_logged(), _saving(compress=self._compress):
                ocp.save(beside, state, checkpointable_name=item)
            (beside / item).rename(directory / item)
            names = [path.relative_to(directory).as_posix() for path in _files(directory / item)]
            for marker in _MARKERS:
                if not (directory / marker).exists():  # else another item of the checkpoint has it
                    (beside / marker).rename(directory / marker)
                    names.append(marker)
        except BaseException:
            # Writes that were under way when another failed may still make files for a moment.
            for _ in range(_MOMENTS):
                _remove(directory, beside.name)
                time.sleep(_MOMENT_SECS)
            raise
        finally:
            _remove(directory, beside.name)
        return names


def _remove(directory: Path, prefix: str) -> None:
    for leftover in directory.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_job() -> None:
    count = jax.process_count()
    if count > 1:
        raise InvalidValueError(
            f"The serializer 'orbax' works in jobs of one process, and this one has {count}: Orbax would "
            "wait for all of them to save and load together. Use the serializer 'eqx' in one of them."
        )


@contextlib.contextmanager
def _saving(*, compress: bool) -> Iterator[None]:
    context = ocp.Context()
    context.array.saving.use_compression = compress
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True  # which is what is read here
    # Otherwise, where folders cannot be made, threads wait for them for minutes after that was raised.
    context.asynchronous.create_directories_asynchronously = False
    context.memory.deepcopy_host_arrays = False  # nobody changes them meanwhile
    with context:
        yield


@contextlib.contextmanager
def _not_logged() -> Iterator[None]:
    """Have Orbax not log as an error what it also raises.

    That its event loop is closed when it fails, while other writes are under way, it may still print: who
    makes those loops is a setting of the whole process, and so the caller's.
    """
    logger = logging.getLogger("absl")
    of_orbax = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or of_orbax not in record.pathname

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


@contextlib.contextmanager
def _failure_of_storage(target: Path) -> Iterator[None]:
    """Make what TensorStore says of a full disk, say, the OSError that it was."""
    try:
        yield
    except ValueError as error:
        code = _OS_ERROR.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), os.fspath(target)) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _entry(directory: Path, name: str) -> FileEntry:
    checksum, size = xxhash.xxh3_128(), 0
    with (directory / name).open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(os.fstat(file.fileno()).st_size, _CHUNK) + 1))
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            size += count
    return FileEntry(name, size, checksum.hexdigest())


def _link(source: Source, item: str, folder: Path) -> None:
    """Verify every file of an item, and make a folder with links to those of Orbax and to no others.

    What else may lie beside the files (where they are on a local disk) is nothing that Orbax ought to read.
    """
    for name in source.files:
        path = source.path(name).absolute()
        if not name.startswith(f"{item}/"):
            continue
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path)
        except (FileExistsError, NotADirectoryError) as error:
            raise CorruptCheckpointError(
                f"The checkpoint's item {item!r} has the file {name!r} and another in its place."
            ) from error
    if not (folder / item).is_dir():
        raise CorruptCheckpointError(f"The checkpoint names no file of Orbax for its item {item!r}.")
