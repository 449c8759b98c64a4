"""The serializer ``safetensors``: each item is a file that anything that reads safetensors can read."""

from pathlib import Path

from vibe_store.interfaces import FileEntry, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers import flatten, item_file, load_item_file, snapshot, to_host
from vibe_store_safetensors.layout import header, tensors

__all__ = ["SafetensorsSerializer"]


class SafetensorsSerializer(Serializer):
    """Stores each item as ``<item>.safetensors``.

    In the file is a tensor for each leaf that has data, named after its path: ``layers.0.weight`` (where two
    names could be mistaken for each other, by the paths as JAX writes them). Bool, int, float and complex of
    Python are tensors without dimensions; of a typed PRNG key there is its key data. Dtypes that safetensors
    lacks (``complex128``, ``int4``, ``datetime64``, other orders of bytes, ...) are stored as U8, with one
    more axis that is as long as an element. Strings, bytes, the names of callables, and what each leaf was
    are in the leaf table, in the manifest and in the file's own metadata.

    It is written in one pass, hashed on the way. Arrays are read into their own memory, which JAX on CPU
    takes over as it is. Where a template has only a part of the leaves, only that part is read.
    """

    name = "safetensors"

    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        """Return the tree with every leaf on the host and owned by the snapshot alone.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
        """
        return snapshot(tree, reuse=reuse)

    def save(self, tree: PyTree, directory: Path, item: str) -> SavedItem:
        """Write ``<item>.safetensors``, from a tree or a snapshot of one.

        Raises:
            UnsupportedLeafError: leaves cannot be stored; the message names the path and type of each.
            InvalidValueError: the names and strings of the tree are more than safetensors reads.
            OSError: the file cannot be written; nothing of it is left.
        """
        flat = flatten(tree, to_save=True)
        values, rows = to_host(flat), list(flat.rows)
        layout = tensors(rows, item)
        name = f"{item}.safetensors"
        with item_file(directory / name) as writer:
            writer.write(header(layout, rows))
            for tensor in layout:
                rows[tensor.leaf] = writer.write_leaf(rows[tensor.leaf], values[tensor.leaf])
        return SavedItem((FileEntry(name, writer.size, writer.checksum),), tuple(rows))

    def load(self, source: Source, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
        """Return a tree of the structure of ``like`` with the saved leaves.

        Raises:
            TemplateMismatchError: a leaf differs in path, shape, dtype or kind; all differences are in it.
            CorruptCheckpointError: what is stored is not what was saved.
            InvalidValueError: an array cannot be put where the template wants it.
        """
        return load_item_file(source, f"{item}.safetensors", item, like, partial=partial)
