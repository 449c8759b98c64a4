"""Files that were made to do harm: nothing of them is run, and no memory is taken for what is not there."""

import io
import json
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from vibe_store.checkpoint import load_checkpoint, load_eqx, load_metadata, save_eqx
from vibe_store.errors import (
    CorruptCheckpointError,
    NewerFormatError,
    TemplateMismatchError,
    UnverifiedCheckpointWarning,
)

FOOTER = struct.Struct("<8sIQ16s16s")


class Bomb:
    """Unpickled, it runs a program."""

    def __reduce__(self) -> Any:
        return exec, ("import antigravity",)


def split(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Take an .eqx file of ours apart: records, leaf table, footer."""
    footer = data[-FOOTER.size :]
    length = FOOTER.unpack(footer)[2]
    end = len(data) - FOOTER.size
    return data[: end - length], data[end - length : end], footer


def sealed(records: bytes, table: bytes, *, version: int = 1, length: int | None = None) -> bytes:
    """Put an .eqx file of ours together, so that all its checksums hold."""
    size = len(table) if length is None else length
    head = FOOTER.pack(b"\x89vstore\n", version, size, xxhash.xxh3_128_digest(records), bytes(16))[:-16]
    return records + table + head + xxhash.xxh3_128_digest(table + head)


def npy(header: str | bytes, data: bytes = b"", version: int = 1, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    text = text.ljust(118 - 1) + b"\n" if len(text) < 117 else text + b"\n"
    size = len(text) if length is None else length
    return (
        b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 if version == 1 else 4, "little") + text + data
    )


@contextmanager
def little_memory(limit: int = 5_000_000) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_the_watch_sees_what_it_is_there_for(watch: Any) -> None:
    file = io.BytesIO()
    np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    with watch() as seen:
        np.lib.format.read_array(io.BytesIO(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }")))
        pickle.loads(pickle.dumps(print))  # noqa: S301 - what must never happen is done here on purpose
        exec("1 + 1")  # noqa: S102 - as above
        Path(__file__).read_bytes()
    events = {code.split()[0] for code in seen.code}
    assert events >= {"compile", "pickle.find_class", "exec"}
    assert seen.outside(Path("/nowhere")) == [__file__]


PLAIN: dict[str, bytes] = {
    "code in the header": npy("__import__('os').system('touch pwned')"),
    "code for the dtype": npy("{'descr': __import__('os').name, 'fortran_order': False, 'shape': (3,), }"),
    "pickled objects": npy(
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([Bomb()])
    ),
    "a pickle": pickle.dumps(Bomb()),
    "a structured dtype": npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }", bytes(64)),
    "a dtype of no size": npy("{'descr': '|V0', 'fortran_order': False, 'shape': (3,), }"),
    "a dtype of great size": npy("{'descr': '<U999999999', 'fortran_order': False, 'shape': (3,), }"),
    "many parentheses": npy("(" * 9_000),
    "many signs": npy("-" * 9_000 + "1"),
    "a long header": npy("{" + " " * 60_000),
    "a header longer than the file": npy("{}", version=2, length=2**32 - 1),
    "a negative shape": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }", bytes(64)),
    "two negative sizes": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -3), }", bytes(64)),
    "a huge shape": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", bytes(64)),
    "a shape that overflows": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 4), }}"),
    "a shape that overflows to nothing": npy(
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {2**62}, {2**62}), }}"
    ),
    "a shape of many digits": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 5000},), }}"),
    "many dimensions": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'1, ' * 99}1), }}"),
    "a shape of truth values": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }", bytes(64)),
    "another version": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", bytes(12), version=3),
    "no UTF-8": npy(b"{'descr': '<f4\xff', 'fortran_order': False, 'shape': (3,), }", bytes(12)),
    "a control sequence": npy(b"{'descr': '\x1b[2J'}", bytes(12)),
    "nothing but the magic": b"\x93NUMPY",
}


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_a_hostile_npy_record_is_refused_unread(
    data: bytes, tmp_path: Path, watch: Any, is_sentence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.eqx"
    path.write_bytes(data)
    like = jnp.ones(3)
    with (
        watch() as seen,
        little_memory(),
        pytest.raises((CorruptCheckpointError, TemplateMismatchError)) as caught,
    ):
        load_eqx(path, like)
    is_sentence(caught.value)
    assert not seen.code
    assert not seen.outside(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["state.eqx"]


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_a_hostile_npy_record_in_a_checkpoint_is_never_parsed(
    data: bytes, tampering: Any, tree: Any, watch: Any
) -> None:
    """The records of a checkpoint are read by the places in the leaf table; their headers are skipped."""
    records, _, _ = split((tampering.root / "step_5/state.eqx").read_bytes())
    tampering.write_file(data[: len(records)].ljust(len(records)))
    with watch() as seen:
        loaded = load_checkpoint(tampering.root, tree, step=5)
    assert not seen.code
    assert loaded["text"] == "hello"


def test_a_file_of_holes_is_refused_by_its_headers_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.eqx"
    path.write_bytes(npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**40},), }}"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**40)
    with little_memory(), pytest.raises(TemplateMismatchError, match="1099511627776"):
        load_eqx(path, jnp.ones(3, jnp.uint8))


def _rows(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[bytes], bytes]:
    def changed(table: bytes) -> bytes:
        rows = json.loads(table)
        change(rows)
        return json.dumps(rows).encode("utf-8", "surrogatepass")

    return changed


def _in_row(**values: Any) -> Callable[[bytes], bytes]:
    return _rows(lambda rows: next(row for row in rows if row["kind"] == "array").update(values))


TABLES: dict[str, Callable[[bytes], bytes]] = {
    "a huge shape": _in_row(shape=[2**40]),
    "a shape that overflows": _in_row(shape=[2**62, 2**62]),
    "a negative shape": _in_row(shape=[-1]),
    "an object dtype": _in_row(dtype="object"),
    "a structured dtype": _in_row(dtype="f4,O"),
    "a name in ml_dtypes that is no dtype": _in_row(dtype="finfo"),
    "an offset within the leaf before": _rows(lambda rows: rows[-1].update(offset=1)),
    "an offset past the end": _rows(lambda rows: rows[-1].update(offset=2**40)),
    "a negative offset": _rows(lambda rows: rows[-1].update(offset=-1)),
    "no offset": _rows(lambda rows: rows[-1].pop("offset")),
    "two rows of one path": _rows(lambda rows: rows.append(dict(rows[0]))),
    "an unknown field": _in_row(pickle="gASV"),
    "no list": lambda _: b"{}",
    "a null": lambda _: b"null",
    "nothing": lambda _: b"",
    "a key twice": lambda table: table.replace(b'"kind"', b'"kind":"key","kind"', 1),
    "NaN": lambda table: table.replace(b'"shape":[2,3]', b'"shape":[NaN]', 1),
    "a number of 10001 digits": lambda table: table.replace(b"[2,3]", b"[1" + b"0" * 10_000 + b"]", 1),
    "10,000 levels": lambda _: b"[" * 10_000 + b"]" * 10_000,
    "levels in a value": lambda table: table.replace(b"[2,3]", b"[" * 500 + b"]" * 500, 1),
    "UTF-16": lambda table: table.decode().encode("utf-16"),
    "a byte order mark": lambda table: b"\xef\xbb\xbf" + table,
    "no UTF-8": lambda table: table.replace(b"array", b"arr\xff\xfe", 1),
}  # fmt: skip


@pytest.mark.parametrize("template", [True, False], ids=["with template", "without"])
@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_a_hostile_leaf_table_in_a_file_is_refused(
    change: Callable[[bytes], bytes], template: bool, tampering: Any, tree: Any, watch: Any, is_sentence: Any
) -> None:
    (tampering.root / "step_5/manifest.json").unlink()
    path = tampering.root / "step_5/state.eqx"
    records, table, _ = split(path.read_bytes())
    changed = change(table)
    assert changed != table
    path.write_bytes(sealed(records, changed))
    with (
        watch() as seen,
        little_memory(),
        pytest.raises((CorruptCheckpointError, TemplateMismatchError)) as caught,
    ):
        load_eqx(path, tree if template else None)
    is_sentence(caught.value)
    assert not seen.code
    assert not seen.outside(tampering.root)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**39, 200])
def test_a_leaf_table_that_cannot_be_there_is_refused(length: int, tmp_path: Path, is_sentence: Any) -> None:
    path = tmp_path / "state.eqx"
    data = sealed(b"", b"[]", length=length)
    with path.open("wb") as file:
        if length == 2**39:
            file.truncate(2**40)  # a hole, which takes no space
            file.seek(2**40)
        file.write(data)
    with little_memory(), pytest.raises(CorruptCheckpointError) as caught:
        load_eqx(path, jnp.ones(3))
    is_sentence(caught.value)


def test_a_file_of_a_later_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "state.eqx"
    path.write_bytes(sealed(b"", b"[]", version=2))
    with pytest.raises(NewerFormatError):
        load_eqx(path, jnp.ones(3))


@pytest.mark.parametrize("name", ["os.system", "antigravity.geohash", "__main__.<lambda>", "a b", "\ud800"])
def test_a_callable_is_never_looked_up_by_the_name_in_a_leaf_table(
    name: str, tampering: Any, tree: Any, watch: Any
) -> None:
    fields = tampering.manifest()
    row = next(row for row in fields["items"]["state"]["leaves"] if row["kind"] == "callable")
    row["value"] = name
    tampering.write_manifest(fields)
    load_checkpoint(tampering.root, None, step=4)  # imports what loading without a template needs
    with watch() as seen:
        loaded = load_checkpoint(tampering.root, None, step=5)
    assert not seen.code
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="cannot be called"):
        loaded["activation"]("touch pwned")
    with watch() as seen, pytest.warns(UserWarning, match="the template's is used"):
        assert load_checkpoint(tampering.root, tree, step=5)["activation"] is jnp.tanh
    assert not seen.code


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 10_000 + b"]" * 10_000, b'{"a": NaN}', b'{"a": 1, "a": 2}', b"{", b"",
        b'{"a": 1e999}', '{"a": 1}'.encode("utf-16"), b'\xef\xbb\xbf{"a": 1}', b'{"a": "\xff"}',
        b'{"a": 1' + b"0" * 10_000 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("manifest", [True, False], ids=["in a manifest", "by hand"])
def test_metadata_that_we_would_not_write_is_refused(
    data: bytes, manifest: bool, tampering: Any, is_sentence: Any
) -> None:
    tampering.write_file(data, "metadata.json")
    if not manifest:
        (tampering.root / "step_5/manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError) as caught:
        load_metadata(tampering.root, step=5)
    is_sentence(caught.value)


@pytest.mark.parametrize(
    "manifest",
    [True, False],
    ids=["in a manifest", "by hand"],
)
@pytest.mark.parametrize("data", [b"[]", b"null", b"5"])
def test_metadata_that_is_no_object_is_refused(data: bytes, manifest: bool, tampering: Any) -> None:
    tampering.write_file(data, "metadata.json")
    if not manifest:
        (tampering.root / "step_5/manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError):
        load_metadata(tampering.root, step=5)


@pytest.mark.parametrize("manifest", [True, False], ids=["in a manifest", "by hand"])
def test_metadata_without_end_is_not_read_to_its_end(manifest: bool, tampering: Any) -> None:
    fields = tampering.manifest()
    fields["metadata"]["size"] = 2**40
    tampering.write_manifest(fields)
    if not manifest:
        (tampering.root / "step_5/manifest.json").unlink()
    with (tampering.root / "step_5/metadata.json").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no space
    with little_memory(300_000_000), pytest.raises(CorruptCheckpointError, match=r"bytes|size"):
        load_metadata(tampering.root, step=5)


def test_plain_files_as_equinox_writes_them_still_load(tmp_path: Path, tree: Any) -> None:
    """The form of a header that is accepted is the one that NumPy writes, in whatever version it is."""
    arrays = [
        np.zeros(shape, dtype)
        for dtype in ("?", "i1", "u8", ">f4", "f2", "c16", "M8[25s]", "m8", "M8[ns]")
        for shape in ((), (1,), (0, 2), (2, 3, 1))
    ]
    arrays.append(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    with (tmp_path / "plain.eqx").open("wb") as file:
        for array in arrays:
            np.save(file, array)
    with pytest.warns(UnverifiedCheckpointWarning):
        loaded = load_eqx(tmp_path / "plain.eqx", arrays)
    for new, old in zip(loaded, arrays, strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)
    save_eqx(tmp_path / "ours.eqx", tree)
    assert load_eqx(tmp_path / "ours.eqx", tree)["raw"] == b"bytes"
