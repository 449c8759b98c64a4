"""What the tests of serializers share: a comparison that sees every bit, and a verifying source."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from vibe_store.interfaces import FileEntry, Leaf, SavedItem, Source
from vibe_store.serializers.eqx_file import VerifyingReader


def _bits(leaf: Any) -> Any:
    """Everything that makes a leaf what it is, its type and every bit of its data included."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (
            "key",
            str(jax.random.key_impl(leaf)),
            leaf.shape,
            np.asarray(jax.random.key_data(leaf)).tobytes(),
        )
    if isinstance(leaf, jax.Array):
        return "jax", leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()
    if isinstance(leaf, np.ndarray | np.generic):
        kind = np.ndarray if isinstance(leaf, np.ndarray) else type(leaf)
        return kind, leaf.dtype.str, leaf.dtype.name, leaf.shape, leaf.tobytes()
    if isinstance(leaf, float):
        return float, struct.pack("d", leaf)
    if isinstance(leaf, complex):
        return complex, struct.pack("dd", leaf.real, leaf.imag)
    return type(leaf), leaf


def _assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert _bits(a) == _bits(b), jax.tree_util.keystr(path)


class FolderSource(Source):
    """Serves a saved item from the folder that it was saved into."""

    def __init__(self, folder: Path, saved: SavedItem) -> None:
        self._folder = folder
        self._saved = saved

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self._saved.leaves

    @property
    def files(self) -> Mapping[str, FileEntry]:
        return {entry.name: entry for entry in self._saved.files}

    def path(self, name: str) -> Path:
        data = (self._folder / name).read_bytes()
        assert xxhash.xxh3_128_hexdigest(data) == self.files[name].checksum
        return self._folder / name

    def open(self, name: str) -> BinaryIO:
        entry = self.files[name]
        return cast(BinaryIO, _Verified((self._folder / name).open("rb"), entry))


class _Verified(VerifyingReader):
    def __init__(self, file: BinaryIO, entry: FileEntry) -> None:
        super().__init__(cast(Any, file), entry.size, bytes.fromhex(entry.checksum), entry.name)
        self._opened = file

    def __enter__(self) -> "_Verified":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """Return a function that compares two trees bit for bit."""
    return _assert_same


@pytest.fixture(scope="session")
def folder_source() -> type[FolderSource]:
    """Return a source that reads a saved item where it was saved."""
    return FolderSource
