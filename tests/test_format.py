"""docs/format.md is enough to write a reader of what is stored."""

import ast
import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import xxhash

from vibe_store import CheckpointManager, open_storage, save_checkpoint, save_eqx

HERE = Path(__file__).parent
READER = HERE / "format_reader.py"
GOLDEN = HERE / "golden" / "v1"


@pytest.fixture(scope="module")
def golden(load: Callable[[Path], ModuleType]) -> ModuleType:
    return load(HERE / "golden" / "trees.py")


@pytest.fixture(scope="module")
def reader(load: Callable[[Path], ModuleType]) -> ModuleType:
    return load(READER)


def stored(value: Any) -> object:
    """What the format stores of a leaf: the bits of its data, or its text."""
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value) is int:
        value = np.asarray(value, "uint64" if value >= 2**63 else "int64")
    return bits(np.asarray(value))


def bits(array: np.ndarray[Any, Any]) -> tuple[tuple[int, ...], bytes]:
    return array.shape, array.tobytes()


def assert_holds(found: dict[str, Any], tree: Any) -> None:
    """Compare what was read with a tree, leaf by leaf, bit for bit."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert list(found) == list(leaves)
    got = {path: bits(leaf) if isinstance(leaf, np.ndarray) else leaf for path, leaf in found.items()}
    assert [path for path, leaf in leaves.items() if got[path] != stored(leaf)] == []


def flips(data: bytes) -> Iterator[bytes]:
    """Copies of some bytes with one bit changed, at places all over them."""
    for place in range(0, len(data), max(1, len(data) // 100)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        yield bytes(changed)


def test_the_reader_needs_nothing_of_ours() -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(READER.read_text("utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
        )
    }
    assert imported == {"json", "math", "numpy", "pathlib", "re", "struct", "xxhash"}


@pytest.mark.parametrize("item", ["state", "runner"])
def test_what_an_earlier_version_wrote_is_read_bit_for_bit(
    item: str, reader: ModuleType, golden: ModuleType
) -> None:
    assert reader.steps(GOLDEN / "eqx") == [golden.STEP]
    assert_holds(reader.read_item(GOLDEN / "eqx" / f"step_{golden.STEP}", item), getattr(golden, item)())


def test_a_single_file_is_read_bit_for_bit(reader: ModuleType, golden: ModuleType, tmp_path: Path) -> None:
    assert_holds(reader.read_file(GOLDEN / "single.eqx"), golden.state())
    save_eqx(tmp_path / "new.eqx", golden.state())
    assert_holds(reader.read_file(tmp_path / "new.eqx"), golden.state())


def test_what_was_just_saved_and_replaced_is_read_bit_for_bit(
    reader: ModuleType, golden: ModuleType, tmp_path: Path
) -> None:
    for tree in ({"old": np.zeros(3)}, golden.state()):
        save_checkpoint(tmp_path, tree, step=12, items={"runner": golden.runner()}, metadata={"a": 1})
    folder = tmp_path / "step_12"
    assert not (folder / "state.eqx").exists()  # its key has the id of the attempt
    assert_holds(reader.read_item(folder, "state"), golden.state())
    assert_holds(reader.read_item(folder, "runner"), golden.runner())
    assert reader.steps(tmp_path) == [12]
    metadata = reader.read_manifest(folder)["metadata"]
    data = (folder / metadata["key"]).read_bytes()
    assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (metadata["size"], metadata["xxh3_128"])
    assert json.loads(data) == {"a": 1}


def test_a_folder_in_memory_holds_what_the_page_says(
    reader: ModuleType, golden: ModuleType, tmp_path: Path
) -> None:
    storage = open_storage("memory://run")
    with CheckpointManager(storage) as manager:
        manager.save(7, golden.runner())
        manager.pin(7)
    for blob in storage.list():
        storage.get(blob.key, tmp_path / blob.key)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    attempt = reader.read_manifest(tmp_path / "step_7")["attempt"]
    assert re.fullmatch(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{10}", attempt)
    assert names == {
        "step_7/manifest.json",
        f"step_7/state.{attempt}.eqx",
        "step_7/pinned",
        ".vibe_store/writer.json",
        f".vibe_store/steps/{10**18 - 1 - 7:018d}",
    }
    assert {*json.loads((tmp_path / ".vibe_store/writer.json").read_bytes())} == {
        "id",
        "pid",
        "host",
        "since",
    }
    assert_holds(reader.read_item(tmp_path / "step_7", "state"), golden.runner())


def test_a_changed_bit_is_noticed(reader: ModuleType, tmp_path: Path) -> None:
    tree = {"weights": np.arange(3.0), "name": "x"}
    save_checkpoint(tmp_path, tree, step=1)
    folder = tmp_path / "step_1"
    for path in (folder / "manifest.json", folder / "state.eqx"):
        whole = path.read_bytes()
        for changed in flips(whole):
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"damaged|no leaf table"):
                reader.read_item(folder, "state")
            if path.suffix == ".eqx":
                with pytest.raises(ValueError, match=r"damaged|no leaf table"):
                    reader.read_file(path)
        path.write_bytes(whole)
    assert_holds(reader.read_item(folder, "state"), tree)
