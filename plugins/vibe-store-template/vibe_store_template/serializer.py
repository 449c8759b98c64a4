"""A serializer: each item is a file of the bytes of its arrays, one after another, and nothing else."""

from pathlib import Path

from vibe_store.interfaces import FileEntry, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers import (
    STORED_KINDS,
    flatten,
    item_file,
    load_item_file,
    snapshot,
    to_host,
)


class RawSerializer(Serializer):
    """Stores each item as ``<item>.raw``. What the bytes are is in the leaf table of the manifest."""

    name = "raw"

    def snapshot(self, tree: PyTree, *, reuse: PyTree = None) -> PyTree:
        return snapshot(tree, reuse=reuse)

    def save(self, tree: PyTree, directory: Path, item: str) -> SavedItem:
        flat = flatten(tree, to_save=True)  # refuses, by path, what cannot be stored
        values, rows = to_host(flat), list(flat.rows)
        with item_file(directory / f"{item}.raw") as writer:
            for index, row in enumerate(rows):
                if row.kind in STORED_KINDS:  # others, such as strings, are in the row itself
                    rows[index] = writer.write_leaf(row, values[index])
        return SavedItem((FileEntry(f"{item}.raw", writer.size, writer.checksum),), tuple(rows))

    def load(self, source: Source, item: str, like: PyTree, *, partial: bool = False) -> PyTree:
        return load_item_file(source, f"{item}.raw", item, like, partial=partial)
