"""Saving into a local folder with a serializer, and loading from there, verified, as a checkpoint does it."""

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, cast

import xxhash

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import FileEntry, Leaf, PyTree, SavedItem, Serializer, Source
from vibe_store.serializers.verifying_reader import VerifyingReader

__all__ = ["FolderSource", "Through"]


class FolderSource(Source):
    """Serves a saved item from the folder that it was saved into.

    Attributes:
        folder: that folder.
        saved: what the serializer said that it saved.
    """

    def __init__(self, folder: Path, saved: SavedItem) -> None:
        self.folder, self.saved = folder, saved

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self.saved.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return {entry.name: entry for entry in self.saved.files}

    def path(self, name: str) -> Path:
        with self.open(name) as stream:
            stream.read()
        return self.folder / name

    def open(self, name: str) -> BinaryIO:
        if name not in self.files:
            raise CorruptCheckpointError(f"No file {name!r} was saved.")
        entry, data = self.files[name], (self.folder / name).read_bytes()
        if len(data) != entry.size:
            raise CorruptCheckpointError(f"{name} has {len(data)} bytes instead of {entry.size}.")
        return cast(BinaryIO, VerifyingReader(io.BytesIO(data), entry.size, entry.checksum, name))

    def read_part(self, name: str, start: int, buffer: memoryview, checksum: str) -> None:
        data = (self.folder / name).read_bytes()[start : start + len(buffer)]
        if len(data) != len(buffer) or xxhash.xxh3_128_hexdigest(data) != checksum:
            raise CorruptCheckpointError(f"{name}: the bytes from {start} are not those that were saved.")
        buffer[:] = data


class Through:
    """A serializer, and a folder for what goes through it.

    Args:
        serializer: the serializer.
        folder: an empty folder; each tree that is saved gets a new one in it.
    """

    def __init__(self, serializer: Serializer, folder: Path) -> None:
        self.serializer = serializer
        self._folder = folder
        self._numbers = itertools.count()

    def save(self, tree: PyTree) -> FolderSource:
        """Save a tree, and return what it can be loaded from."""
        folder = self._folder / f"saved_{next(self._numbers)}"
        folder.mkdir()
        return FolderSource(folder, self.serializer.save(tree, folder, "state"))

    def load(self, source: Source, like: PyTree, *, partial: bool = False) -> PyTree:
        """Load what was saved."""
        return self.serializer.load(source, "state", like, partial=partial)

    def __call__(self, tree: PyTree, like: PyTree = None) -> PyTree:
        """Save a tree, and return what is loaded into ``like``, or into the tree itself."""
        return self.load(self.save(tree), tree if like is None else like)
