"""Files of Orbax that were made to do harm, whose checksums hold, are refused before they take memory."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import FileEntry, SavedItem

pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')

import tensorstore as ts

from vibe_store.serializers.orbax import OrbaxSerializer
from vibe_store.serializers.tree import describe

TREE = {"a": np.arange(600.0).reshape(30, 20), "b": [np.ones(3, np.int32), 7]}

_LOAD = """
import resource, sys
from pathlib import Path
import numpy as np
from vibe_store.errors import CorruptCheckpointError
from vibe_store.interfaces import Source
from vibe_store.serializers.orbax import OrbaxSerializer
from vibe_store.serializers.tree import describe

folder, like = Path(sys.argv[1]), {"a": np.zeros((30, 20)), "b": [np.zeros(3, np.int32), 0]}

class Saved(Source):
    leaves = describe(like)
    files = {
        path.relative_to(folder).as_posix(): None
        for path in folder.rglob("*") if path.is_file()
    }
    def path(self, name):
        return folder / name
    def open(self, name):
        return (folder / name).open("rb")
    def read_part(self, *_):
        raise NotImplementedError

def in_use():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

limit = in_use() + int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    OrbaxSerializer().load(Saved(), "state", like)
except CorruptCheckpointError as error:
    print(error)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert peak - before < 200_000, (before, peak)
"""


def load_in_little_memory(folder: Path) -> str:
    """Load TREE from a folder in a process that may use 1 GiB more; return the error that it raises."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _LOAD, str(folder), str(1 << 30)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def database(folder: Path, **config: Any) -> Any:
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    return ts.KvStore.open(spec | ({"config": config} if config else {})).result()


class Forger:
    """An item of TREE, whose arrays can be changed, with checksums that hold."""

    def __init__(self, folder: Path, source_type: Any) -> None:
        self.folder, self._source = folder, source_type
        folder.mkdir()
        self.leaves = OrbaxSerializer(compress=True).save(TREE, folder, "state").leaves

    def metadata(self, name: str) -> Any:
        return json.loads(database(self.folder / "state").read(f"{name}/zarr.json").result().value)

    def write(self, key: str, value: bytes | None) -> None:
        database(self.folder / "state").write(key, value).result()

    def load(self, like: Any = TREE, *, partial: bool = False) -> Any:
        files = []
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                name = path.relative_to(self.folder).as_posix()
                files.append(FileEntry(name, len(data), xxhash.xxh3_128_hexdigest(data)))
        source = self._source(self.folder, SavedItem(tuple(files), self.leaves))
        return OrbaxSerializer().load(source, "state", like, partial=partial)


@pytest.fixture
def forger(tmp_path: Path, folder_source: Any) -> Forger:
    return Forger(tmp_path / "forged", folder_source)


def _at(*way: str | int, value: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        *before, last = way
        for step in before:
            metadata = metadata[step]
        metadata[last] = value

    return change


_SHARDS = ("codecs", 0, "configuration")
_GRID = ("chunk_grid", "configuration", "chunk_shape")
CHANGES = {
    "shape": (_at("shape", value=[30, 21]), "has the shape [30, 21], where [30, 20] was saved"),
    "huge shape": (_at("shape", value=[2**40, 2**20]), "has the shape"),
    "rank": (_at("shape", value=[600]), "has the shape [600]"),
    "dtype": (_at("data_type", value="int64"), "has the data_type 'int64', where 'float64' was saved"),
    "version": (_at("zarr_format", value=2), "has the zarr_format 2"),
    "float for integer": (_at("zarr_format", value=3.0), "has the zarr_format 3.0"),
    "huge chunk": (_at(*_GRID, value=[2**40, 20]), "has the chunk_grid"),
    "no chunk": (_at(*_GRID, value=[0, 20]), "has the chunk_grid"),
    "chunk of another rank": (_at(*_GRID, value=[30]), "has the chunk_grid"),
    "other grid": (_at("chunk_grid", "name", value="rectilinear"), "has the chunk_grid"),
    "huge inner chunk": (_at(*_SHARDS, "chunk_shape", value=[2**40, 20]), "has the codecs"),
    "many chunks": (_at(*_SHARDS, "chunk_shape", value=[1, 1]), "is of 600 chunks"),
    "other codec": (_at(*_SHARDS, "codecs", value=[{"name": "gzip"}]), "has the codecs"),
    "shards of shards": (
        lambda metadata: _at(*_SHARDS, "codecs", value=copy.deepcopy(metadata["codecs"]))(metadata),
        "has the codecs",
    ),
    "compressed index": (
        _at(*_SHARDS, "index_codecs", value=[{"name": "bytes"}, {"name": "zstd"}]),
        "has the codecs",
    ),
    "no codecs": (_at("codecs", value=None), "has the codecs None"),
    "fill value": (_at("fill_value", value="x"), "TensorStore says"),
    "key encoding": (_at("chunk_key_encoding", value={"name": "x"}), "TensorStore says"),
    "unknown field": (_at("x", value={"must_understand": True}), "TensorStore says"),
    "unequal inner chunks": (_at(*_SHARDS, "chunk_shape", value=[29, 20]), "TensorStore says"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_metadata_of_an_array_that_is_not_what_the_leaf_table_says_is_refused(
    change: str, forger: Forger
) -> None:
    metadata = forger.metadata("a")
    alter, words = CHANGES[change]
    alter(metadata)
    forger.write("a/zarr.json", json.dumps(metadata).encode())
    with pytest.raises(CorruptCheckpointError) as raised:
        forger.load()
    for part in ("the leaf ['a'] of the item 'state'", "state/manifest.ocdbt", words):
        assert part in str(raised.value)
    assert ("'a/zarr.json'" in str(raised.value)) == (words != "TensorStore says")
    assert forger.load({"b": TREE["b"]}, partial=True)["b"][1] == 7


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("a/zarr.json", None, "'a/zarr.json' is not there"),
        ("a/zarr.json", b"[" * 60_000, "'a/zarr.json': It is nested too deeply"),
        ("a/zarr.json", b"3", "'a/zarr.json' is 3"),
        ("a/zarr.json", b" " * 100_000, "has 100000 bytes"),
        ("a/c/0/0", None, "TensorStore says"),
        ("a/c/0/0", b"x" * 4820, "TensorStore says"),
    ],
)
def test_what_is_not_there_or_not_readable_is_named(
    key: str, value: bytes | None, words: str, forger: Forger
) -> None:
    forger.write(key, value)
    with pytest.raises(CorruptCheckpointError, match=r"does not hold the leaf \['a'\]") as raised:
        forger.load()
    assert words in str(raised.value)
    assert "spec" not in str(raised.value)


def test_a_huge_array_of_which_nothing_is_stored_takes_no_memory(forger: Forger) -> None:
    """As a leaf table may say where there is no template, or one that is as large."""
    metadata = forger.metadata("a")
    for way in (("shape",), _GRID, (*_SHARDS, "chunk_shape")):
        _at(*way, value=[2**36, 20])(metadata)
    forger.write("a/zarr.json", json.dumps(metadata).encode())
    huge = np.broadcast_to(np.zeros(()), (2**36, 20))
    forger.leaves = describe({**TREE, "a": huge})
    with pytest.raises(CorruptCheckpointError, match=r"an array of 10995116277760 bytes is not in files of"):
        forger.load({**TREE, "a": huge})


def _shard(tree: np.ndarray[Any, Any], metadata: Any) -> bytes:
    """The bytes of a chunk that TensorStore stores for an array of whatever size."""
    larger = copy.deepcopy(metadata)
    for way in (("shape",), _GRID, (*_SHARDS, "chunk_shape")):
        _at(*way, value=list(tree.shape))(larger)
    spec = {"driver": "zarr3", "kvstore": "memory://larger/", "metadata": larger}
    array = ts.open(
        spec | {"store_data_equal_to_fill_value": True}, create=True, context=ts.Context()
    ).result()
    array.write(tree).result()
    return bytes(array.kvstore.read("c/0/0").result().value)


def test_a_chunk_that_decompresses_to_gigabytes_is_decompressed_only_as_far_as_its_shape_goes(
    forger: Forger,
) -> None:
    """This is TensorStore's own doing: that the metadata is right is all that must be seen to."""
    bomb = _shard(np.broadcast_to(np.zeros(()), (1 << 13, 1 << 14)), forger.metadata("a"))  # 1 GiB
    assert len(bomb) < 1 << 18
    forger.write("a/c/0/0", bomb)
    said = load_in_little_memory(forger.folder)
    assert "does not hold the leaf ['a'] of the item 'state' as it was saved: TensorStore says" in said


def test_nodes_of_the_database_that_decompress_to_gigabytes_are_refused(forger: Forger) -> None:
    """TensorStore would decompress them whole, whatever limit their database claims."""
    folder = forger.folder / "state"
    old = database(folder)
    values = {key: old.read(key).result().value for key in old.list().result()}
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    new = database(
        folder,
        max_inline_value_bytes=1 << 20,
        max_decoded_node_bytes=(1 << 32) - 1,
        compression={"id": "zstd", "level": 1},
    )
    transaction = ts.Transaction()
    for key, value in (values | {b"z%d" % number: bytes(1 << 20) for number in range(500)}).items():
        new.with_transaction(transaction).write(key, value).result()
    transaction.commit_sync()
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1 << 20
    said = load_in_little_memory(forger.folder)
    assert "the nodes in 'state/d/" in said
    assert "would decompress to more than" in said


def test_an_item_of_many_small_leaves_is_within_the_limits(tmp_path: Path, folder_source: Any) -> None:
    tree = {f"leaf {number}": np.zeros(100) for number in range(1500)}
    tree |= {f"large {number}": np.zeros(1 << 17) for number in range(3)}
    for compress in (False, True):
        folder = tmp_path / str(compress)
        folder.mkdir()
        serializer = OrbaxSerializer(compress=compress)
        loaded = serializer.load(folder_source(folder, serializer.save(tree, folder, "state")), "state", tree)
        assert loaded.keys() == tree.keys()
