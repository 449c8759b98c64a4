"""Damage to a file is found, wherever it is, and what is not trusted is not obeyed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NewerFormatError,
    TemplateMismatchError,
    UnverifiedCheckpointWarning,
    VibeStoreError,
)
from vibe_store.interfaces import SavedItem
from vibe_store.serializers import leaf_data
from vibe_store.serializers.eqx import EqxSerializer, load_eqx, save_eqx

FOOTER = 52


def tiny() -> Any:
    return {"a": np.int16(258), "s": "x"}


def records_end(data: bytes) -> int:
    return len(data) - FOOTER - int.from_bytes(data[-FOOTER + 12 : -FOOTER + 20], "little")


def with_table(data: bytes, text: bytes, version: int = 1) -> bytes:
    """Replace the leaf table of a file, checksums included."""
    footer = bytearray(data[-FOOTER:-16])
    footer[8:12] = version.to_bytes(4, "little")
    footer[12:20] = len(text).to_bytes(8, "little")
    return data[: records_end(data)] + text + footer + xxhash.xxh3_128_digest(text + bytes(footer))


def test_every_single_bit_flip_is_found(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, tiny())
    data = path.read_bytes()
    assert len(data) < 400
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises((CorruptCheckpointError, TemplateMismatchError), match=r"tree\.eqx"):
            load_eqx(path, tiny())


def test_bit_flips_are_found_by_the_serializer_too(tmp_path: Path, folder_source: Any) -> None:
    serializer = EqxSerializer()
    source = folder_source(tmp_path, serializer.save(np.int8(1), tmp_path, "state"))
    data = (tmp_path / "state.eqx").read_bytes()
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "state.eqx").write_bytes(flipped)
        with pytest.raises(CorruptCheckpointError):
            serializer.load(source, "state", np.int8(0))


def test_a_file_cut_short_anywhere_is_refused_or_whole_and_warned_about(
    tmp_path: Path, assert_same: Any
) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, tiny())
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if length == records_end(data):  # nothing but the trailer is gone: a file of plain Equinox
            with pytest.warns(UnverifiedCheckpointWarning):
                assert_same(load_eqx(path, tiny()), tiny())
            continue
        with pytest.raises((CorruptCheckpointError, TemplateMismatchError), match=r"tree\.eqx"):
            load_eqx(path, tiny())


@pytest.mark.parametrize("extra", [b"\0", b"\x93NUMPY"], ids=["byte", "record"])
def test_bytes_after_the_end_are_refused(extra: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, tiny())
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(CorruptCheckpointError, match=r"tree\.eqx"):
        load_eqx(path, tiny())


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree.eqx").touch()
    with pytest.raises(CorruptCheckpointError, match=r"tree\.eqx is empty"):
        load_eqx(tmp_path / "tree.eqx", tiny())


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tree.eqx").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(CorruptCheckpointError, match="no Equinox file"):
        load_eqx(tmp_path / "tree.eqx", tiny())


def test_a_file_that_is_not_there_is_an_error_of_ours_and_of_pythons(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"There is no file .*none\.eqx") as caught:
        load_eqx(str(tmp_path / "none.eqx"), tiny())
    assert isinstance(caught.value, FileNotFoundError)


def test_damage_at_the_end_of_a_large_leaf_is_found(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    tree = jnp.zeros(3 << 20)
    save_eqx(path, tree)
    with path.open("r+b") as file:
        file.seek((12 << 20) + 100)
        file.write(b"\1")
    with pytest.raises(CorruptCheckpointError, match="is damaged: its checksum"):
        load_eqx(path, tree)


def test_a_file_of_a_later_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, tiny())
    path.write_bytes(with_table(path.read_bytes(), b"whatever that version has", version=2))
    with pytest.raises(NewerFormatError, match=r"tree\.eqx has format version 2"):
        load_eqx(path, tiny())


@pytest.mark.parametrize(
    "text", [b"", b"{", b"{}", b"[1]", b"\xff", b"[" * 100_000, b'[{"path":"","kind":"set"}]']
)
def test_a_table_with_the_right_checksum_and_wrong_words_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, tiny())
    path.write_bytes(with_table(path.read_bytes(), text))
    with pytest.raises(CorruptCheckpointError, match=r"tree\.eqx has a leaf table that cannot be read"):
        load_eqx(path, tiny())


def test_a_table_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, tiny())
    data = bytearray(path.read_bytes())
    data[-FOOTER + 12 : -FOOTER + 20] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="longer than the file"):
        load_eqx(path, tiny())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 10**9}, "ends at byte"),
        ({"offset": None}, "does not say where"),
        ({"shape": [10**12]}, "ends at byte"),
        ({"shape": [2**62, 2**62]}, "for its shape"),
    ],
)
def test_a_hostile_table_allocates_nothing(
    change: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, {"a": np.arange(3)})
    data = path.read_bytes()
    (row,) = json.loads(data[records_end(data) : -FOOTER])
    row = {name: value for name, value in {**row, **change}.items() if value is not None}
    path.write_bytes(with_table(data, json.dumps([row]).encode()))
    like = {"a": jax.ShapeDtypeStruct(tuple(row["shape"]), np.dtype("int64"))}

    def allocate(*_: object) -> None:
        raise AssertionError("allocated before the table was checked")

    monkeypatch.setattr(leaf_data, "_empty", allocate)
    with jax.enable_x64(True), pytest.raises(CorruptCheckpointError, match=words):
        load_eqx(path, like)


def test_leaves_that_overlap_are_refused(tmp_path: Path, folder_source: Any) -> None:
    serializer = EqxSerializer()
    saved = serializer.save([np.arange(3), np.arange(3)], tmp_path, "state")
    first, second = saved.leaves
    assert first.offset is not None
    twisted = SavedItem(saved.files, (first, replace(second, offset=first.offset + 8)))
    with pytest.raises(CorruptCheckpointError, match=r"\[1\] begins at byte .* within what comes before"):
        serializer.load(folder_source(tmp_path, twisted), "state", [np.arange(3), np.arange(3)])


def test_a_manifest_that_names_no_file_for_the_item_is_refused(tmp_path: Path, folder_source: Any) -> None:
    serializer = EqxSerializer()
    saved = serializer.save(1, tmp_path, "state")
    with pytest.raises(CorruptCheckpointError, match=r"no file 'runner\.eqx'"):
        serializer.load(folder_source(tmp_path, saved), "runner", 1)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    with path.open("wb") as file:
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    for like in (jnp.ones(1), np.ones(1), 1.0):
        with pytest.raises(VibeStoreError):
            load_eqx(path, like)
    assert not (tmp_path / "sprung").exists()
