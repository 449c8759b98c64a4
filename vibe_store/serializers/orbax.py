"""The serializer ``orbax``: pytrees in the format of Orbax, readable by plain Orbax, verified when loaded."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from orbax.checkpoint import v1 as ocp

from vibe_store.errors import CorruptCheckpointError, InvalidValueError
from vibe_store.interfaces import FileEntry, Leaf, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers.host import rebuild, snapshot, table_values, to_host
from vibe_store.serializers.orbax_tree import (
    array_type,
    from_orbax,
    has_array,
    leaf_at,
    places,
    to_orbax,
)
from vibe_store.serializers.places import nest
from vibe_store.serializers.rows import brief
from vibe_store.serializers.tree import (
    HostCopy,
    NDArray,
    compare,
    dtype_named,
    flatten,
    show_path,
    warn_of_other_callables,
)

__all__ = ["OrbaxSerializer"]

_MARKERS = ("orbax.checkpoint", "_CHECKPOINT_METADATA")
"""The files by which Orbax knows a folder as a checkpoint, whatever is in the folders below it."""

_UNUSABLE_ITEM = re.compile(r"step_[0-9]+|metrics|_CHECKPOINT_.*")
_CHUNK = 4 << 20
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

    Files are the fewest that Orbax writes: all arrays of an item are packed in one OCDBT database. Sharded
    arrays are gathered on the host, and loading places arrays as the template asks, on any number of devices.
    The arrays must be in reach of one process, and only a job of one process can save and load.

    Args:
        compress: compress arrays with zstd. It saves little on random floats, and takes time and memory.
    """

    name = "orbax"

    def __init__(self, *, compress: bool = False) -> None:
        if not isinstance(compress, bool):
            raise InvalidValueError(f"compress is True or False; got {compress!r}.")
        self._compress = compress

    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        """Return the tree with every leaf on the host and owned by the snapshot alone, as ``eqx`` does.

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

        Every file of the item is verified first. With ``partial=True``, Orbax reads only what ``like`` has.

        Raises:
            TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
            CorruptCheckpointError: what is stored is not what was saved.
            InvalidValueError: an array cannot be put where the template wants it, or the job has several
                processes.
        """
        _check_job()
        flat = flatten(like)
        compare(source.leaves, flat, partial=partial, what=f"saved item {item!r}")
        wanted = {row.path for row in flat.rows}
        stored = [row for row in source.leaves if row.path in wanted and row.shape is not None]
        with tempfile.TemporaryDirectory(prefix="vibe_store-") as folder:
            _link(source, item, Path(folder))
            arrays = _read(Path(folder), item, source.leaves, [row for row in stored if has_array(row)])
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
            with _failure_of_storage(directory / item), _saving(compress=self._compress):
                ocp.save(beside, state, checkpointable_name=item)
            (beside / item).rename(directory / item)
            names = [path.relative_to(directory).as_posix() for path in _files(directory / item)]
            for marker in _MARKERS:
                if not (directory / marker).exists():  # else another item of the checkpoint has it
                    (beside / marker).rename(directory / marker)
                    names.append(marker)
        finally:
            for leftover in directory.glob(f"{beside.name}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        return names


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
    context.memory.deepcopy_host_arrays = False  # nobody changes them meanwhile
    with context:
        yield


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
    for marker in _MARKERS:
        (folder / marker).write_text("{}" if marker.startswith("_") else "")


def _read(folder: Path, item: str, rows: Sequence[Leaf], wanted: Sequence[Leaf]) -> Mapping[str, NDArray]:
    """Have Orbax read the data of the wanted leaves, by path."""
    if not wanted:
        return {}
    where = places(row.path for row in rows)
    template = {where[row.path]: ocp.PLACEHOLDER if has_array(row) else None for row in rows}
    template |= {where[row.path]: _template(row) for row in wanted}
    try:
        with ocp.Context():  # not the caller's, if there is one
            state = ocp.load(folder, nest(template), checkpointable_name=item)
        return {row.path: _checked(row, leaf_at(state, where[row.path])) for row in wanted}
    except MemoryError:
        raise
    except Exception as error:  # where files are verified: they are not what Orbax can read
        raise CorruptCheckpointError(f"Orbax cannot read the item {item!r}: {brief(str(error))}") from error


def _template(row: Leaf) -> NDArray:
    """Return what makes Orbax read a leaf into a NumPy array: one of that type, which takes no memory."""
    shape, dtype = array_type(row)
    return np.broadcast_to(np.empty((), dtype), shape)


def _checked(row: Leaf, array: Any) -> NDArray:
    if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != array_type(row):
        raise TypeError(f"{show_path(row.path)} is read as {array!r:.80}")
    return from_orbax(row, array)
