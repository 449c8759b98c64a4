"""A manifest that was made to do harm is refused before anything that it names is opened or allocated."""

import copy
import json
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    list_checkpoints,
    load_checkpoint,
    load_manifest,
    load_metadata,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.errors import (
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    UnknownProviderError,
)
from vibe_store.serializers.rows import MAX_JSON_BYTES

Change = Callable[[dict[str, Any]], None]

BAD_KEYS: list[Any] = [
    "/etc/passwd", "//host/x", "../step_4/state.eqx", "a/../../b", "..", ".", "", "a//b", "a/", "a\\b",
    "C:/x", "a\0b", "a\nb", "\x1b[2J", "\ud800", ".vibe_store/writer.lock", "manifest.json", "best", "pinned",
    "step_4/state.eqx", "step_4", "x" * 256, "é" * 128, "a/" * 600 + "b", 5, None, True, ["state.eqx"], {},
]  # fmt: skip

BAD_DTYPES: list[Any] = [
    "object", "O", "|O", "void", "V8", "|V8", "S5", "<U4", "str", "bytes", "f4,f4", "(2,)f4", "float128", "g",
    "[('a', 'f4')]", "nonsense", "finfo", "iinfo", "__name__", "__builtins__", "float32\n",
    "", 5, True, ["float32"], "datetime64[generic]", "datetime64[10000000000s]", ">V8", ">O8", "longdouble",
    "p",
]  # fmt: skip

BAD_SHAPES: list[Any] = [
    [-1], [2, -3], [2**62] * 3, [2**63], [2**60], [10**4000], [1.0], [True], [None], "3", 3, {}, [[2]],
    [1] * 65, [0, 2**62], [0, 2**62, 2**62], [2**62] * 100_000,
]  # fmt: skip


def _file(fields: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(fields["items"]["state"]["files"], "state.eqx")  # type: ignore[no-any-return] # it is JSON


def _leaf(fields: dict[str, Any], kind: str = "array") -> dict[str, Any]:
    return next(leaf for leaf in fields["items"]["state"]["leaves"] if leaf["kind"] == kind)


def _set(*path: str, to: Any) -> Change:
    def change(fields: dict[str, Any]) -> None:
        place = fields
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to

    return change


def _drop(*path: str) -> Change:
    def change(fields: dict[str, Any]) -> None:
        place = fields
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]

    return change


def _rename(*path: str, to: str) -> Change:
    def change(fields: dict[str, Any]) -> None:
        place = fields
        for name in path[:-1]:
            place = place[name]
        place[to] = place.pop(path[-1])

    return change


def _set_leaf(name: str, value: Any, kind: str = "array") -> Change:
    return lambda fields: _leaf(fields, kind).update({name: value})


def _twice(fields: dict[str, Any]) -> None:
    leaves = fields["items"]["state"]["leaves"]
    leaves.append(copy.deepcopy(leaves[0]))


def _named(prefix: str, changes: list[tuple[Any, Change]]) -> list[Any]:
    return [
        pytest.param(change, id=f"{prefix}-{index}-{ascii(value)[:20]}")
        for index, (value, change) in enumerate(changes)
    ]


_FILE = ("items", "state", "files", "state.eqx")
_LEAVES = ("items", "state", "leaves")
_WRONG: list[Any] = [None, True, 5, 1.5, "x", [], [[]], {"a": 1}]

_RIGHT = [("attempt", "x"), ("metrics", None), ("metadata", None), ("metrics", {"a": 1})]

CASES = [
    *_named("key", [(key, _set(*_FILE, "key", to=key)) for key in BAD_KEYS]),
    *_named("name", [(key, _rename(*_FILE, to=key)) for key in BAD_KEYS if isinstance(key, str)]),
    *_named("metadata-key", [(key, _set("metadata", "key", to=key)) for key in BAD_KEYS[:5]]),
    *_named("dtype", [(dtype, _set_leaf("dtype", dtype)) for dtype in BAD_DTYPES]),
    *_named("shape", [(shape, _set_leaf("shape", shape)) for shape in BAD_SHAPES]),
    *_named(
        "size",
        [(size, _set(*_FILE, "size", to=size)) for size in (-1, 2**63, 10**4000, 1.0, True, "12", None, [])],
    ),
    *_named("checksum", [(c, _set(*_FILE, "xxh3_128", to=c)) for c in (None, 5, "", "F" * 32, "0" * 33, [])]),
    *_named("step", [(s, _set("step", to=s)) for s in (-1, True, 5.0, "5", 10**18, 4, None, [], 10**4000)]),
    *_named("offset", [(o, _set_leaf("offset", o)) for o in (-1, 2**63, 1.5, True, "0", 10**4000)]),
    *_named("leaf-checksum", [(c, _set_leaf("checksum", c)) for c in (5, "", "F" * 32, "0" * 31)]),
    *_named("kind", [(k, _set_leaf("kind", k)) for k in ("object", "pickle", 5, None, [], {}, "str")]),
    *_named("path", [(p, _set_leaf("path", p)) for p in (None, 5, [], {})]),
    *_named("impl", [(i, _set_leaf("impl", i, "key")) for i in (None, 5, [])]),
    *_named("base64", [(v, _set_leaf("value", v, "bytes")) for v in ("?", "A", "\ud800", 5, None)]),
    *_named("unknown-field", [("pickle", _set_leaf("pickle", "gASVAAAA"))]),
    *_named("same-path-twice", [("leaf", _twice)]),
    *_named("row", [(row, _set(*_LEAVES, to=[row])) for row in _WRONG]),
    *_named("leaves", [(value, _set(*_LEAVES, to=value)) for value in (None, True, 5, "x", {"a": 1})]),
    *_named("created", [
        (value, _set("created", to=value))
        for value in (
            None, 5, "", "now", "2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00",
            "9999-12-31T23:59:59-14:00", "2026-13-01T00:00:00+00:00", "1" * 1_000_000,
        )
    ]),
    *_named("item", [
        (name, _rename("items", "state", to=name))
        for name in ("../x", "", "a b", "a/b", "-x", "x" * 256, "\ud800", ".")
    ]),
    *_named("serializer", [
        (name, _set("items", "state", "serializer", to=name))
        for name in (None, 5, "", "../eqx", "os:system", "a b", "x" * 1_000_000)
    ]),
    *_named("metric", [(m, _set("metrics", to={"a": m})) for m in ("1", "nan", True, None, 10**400, [], {})]),
    *_named("version", [(v, _set("versions", to={"jax": v})) for v in (None, 5, [], {})]),
    *_named("format", [(f, _set("format", to=f)) for f in (None, 0, -1, True, 1.0, "1", [])]),
    *[
        case
        for name in ("items", "versions", "metrics", "metadata", "attempt")
        for case in _named(
            f"type-of-{name}",
            [
                (value, _set(name, to=value))
                for value in _WRONG
                if (name, value) not in _RIGHT
            ],
        )
    ],
    *_named("type-of-item", [(value, _set("items", "state", to=value)) for value in _WRONG]),
    *_named("type-of-file", [(value, _set(*_FILE, to=value)) for value in _WRONG]),
    *_named("missing", [
        (path, _drop(*path))
        for path in (
            *[(name,) for name in ("format", "step", "attempt", "created")],
            *[(name,) for name in ("versions", "metrics", "metadata", "items")],
            *[("items", "state", name) for name in ("serializer", "files", "leaves")],
            *[(*_FILE, name) for name in ("key", "size", "xxh3_128")],
        )
    ]),
]  # fmt: skip


def _nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def _replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(body: bytes) -> bytes:
        assert old in body
        return body.replace(old, new, 1)

    return change


BODIES: dict[str, Callable[[bytes], bytes]] = {
    "a key twice": _replaced(b'"format": 1', b'"format": 1, "format": 1'),
    "a key twice in a leaf": _replaced(b'"kind": "array"', b'"kind": "array", "kind": "array"'),
    "a key twice, spelled otherwise": _replaced(b'"format": 1', b'"format": 1, "\\u0066ormat": 1'),
    "NaN": _replaced(b'"loss": 0.5', b'"loss": NaN'),
    "Infinity": _replaced(b'"loss": 0.5', b'"loss": Infinity'),
    "-Infinity": _replaced(b'"loss": 0.5', b'"loss": -Infinity'),
    "a number that is infinite": _replaced(b'"loss": 0.5', b'"loss": 1e999'),
    "a number of 10001 digits": _replaced(b'"step": 5', b'"step": 1' + b"0" * 10_000),
    "10,000 levels": _replaced(b'"step": 5', b'"step": ' + _nested(10_000)),
    "10,000 levels of objects": _replaced(
        b'"step": 5', b'"step": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000
    ),
    "many levels": _replaced(b'"step": 5', b'"step": ' + _nested(500)),
    "many levels as a version": _replaced(b'"jax": "', b'"x": ' + _nested(700) + b', "jax": "'),
    "UTF-16": lambda body: body.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda body: body.decode().encode("utf-16-le"),
    "UTF-32": lambda body: body.decode().encode("utf-32-be"),
    "a byte order mark": lambda body: b"\xef\xbb\xbf" + body,
    "no UTF-8": _replaced(b'"loss"', b'"lo\xff\xfess"'),
    "a surrogate as UTF-8": _replaced(b'"loss"', b'"lo\xed\xa0\x80ss"'),
    "an over-long slash": _replaced(b'"key": "state.eqx"', b'"key": "a\xc0\xafb"'),
    "NUL": _replaced(b'"loss"', b'"lo\0ss"'),
    "nothing": lambda _: b"",
    "an end": lambda _: b"}",
    "two documents": lambda body: body + body,
    "half a document": lambda body: body[: len(body) // 2],
    "a comment": lambda body: body + b"// really",
    "single quotes": lambda body: body.replace(b'"', b"'"),
    "Python": _replaced(b'"step": 5', b'"step": None'),
    "a line end of another system, later": lambda body: body.replace(b": ", b":\0"),
}


def _doors(root: Path, tree: Any) -> dict[str, Callable[[], Any]]:
    return {
        "load_manifest": lambda: load_manifest(root, step=5),
        "load_checkpoint": lambda: load_checkpoint(root, tree, step=5),
        "load_metadata": lambda: load_metadata(root, step=5),
        "restore": lambda: CheckpointManager(root).restore(5, tree),
        "info": lambda: CheckpointManager(root).info(5),
    }


def _check_refused(tampering: Any, tree: Any, watch: Any, is_sentence: Any) -> None:
    root = tampering.root
    for name, door in _doors(root, tree).items():
        with watch() as seen, pytest.raises(CorruptCheckpointError) as caught:
            door()
        is_sentence(caught.value)
        assert "step_5/manifest.json" in str(caught.value), name
        assert not seen.code, name
        assert not seen.outside(root), name
        assert not [path for path in seen.paths if path.endswith(".eqx")], name
    assert [fault.file for fault in verify_checkpoint(root, step=5)] == ["step_5/manifest.json"]
    assert [entry.status for entry in list_checkpoints(root)] == ["committed", "damaged"]


@pytest.mark.parametrize("change", CASES)
def test_a_hostile_value_is_refused_at_every_door(
    change: Change, tampering: Any, tree: Any, watch: Any, is_sentence: Any
) -> None:
    fields = tampering.manifest()
    change(fields)
    tampering.write_manifest(fields)
    _check_refused(tampering, tree, watch, is_sentence)


@pytest.mark.parametrize("change", BODIES.values(), ids=BODIES)
def test_json_that_we_would_not_write_is_refused_at_every_door(
    change: Callable[[bytes], bytes], tampering: Any, tree: Any, watch: Any, is_sentence: Any
) -> None:
    body = (tampering.root / "step_5/manifest.json").read_bytes().partition(b"\n")[2]
    tampering.write_body(change(body))
    _check_refused(tampering, tree, watch, is_sentence)


def test_the_newest_good_step_is_restored_past_a_hostile_one(tampering: Any, tree: Any) -> None:
    fields = tampering.manifest()
    fields["items"]["state"]["files"]["state.eqx"]["key"] = "../../etc/passwd"
    tampering.write_manifest(fields)
    with pytest.warns(DamagedCheckpointWarning, match="Step 5"):
        restored = CheckpointManager(tampering.root).restore(None, tree)
    assert restored["text"] == "hello"


def test_values_at_the_limits_are_no_attack(tampering: Any) -> None:
    fields = tampering.manifest()
    fields["items"]["state"]["leaves"][0] |= {"path": "x" * 5000}
    fields["versions"] = {"a": "\x1b[2J"}
    fields["metrics"] = {"a": "NaN", "b": 10**300, "c": -0.0}
    _leaf(fields)["shape"] = [2**59 - 1]
    tampering.write_manifest(fields)
    assert load_manifest(tampering.root, step=5).metrics is not None


def test_a_serializer_that_is_not_installed_is_not_looked_for_by_importing(
    tampering: Any, tree: Any, watch: Any, is_sentence: Any
) -> None:
    fields = tampering.manifest()
    fields["items"]["state"]["serializer"] = "antigravity"
    tampering.write_manifest(fields)
    with watch() as seen, pytest.raises(UnknownProviderError, match="antigravity") as caught:
        load_checkpoint(tampering.root, tree, step=5)
    is_sentence(caught.value)
    assert not [code for code in seen.code if "antigravity" in code]


def test_a_manifest_without_end_is_not_read_to_its_end(tampering: Any, tree: Any, is_sentence: Any) -> None:
    with (tampering.root / "step_5/manifest.json").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no space
    tracemalloc.start()
    try:
        for door in _doors(tampering.root, tree).values():
            with pytest.raises(CorruptCheckpointError, match="never written") as caught:
                door()
            is_sentence(caught.value)
        assert [entry.status for entry in list_checkpoints(tampering.root)] == ["committed", "damaged"]
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_JSON_BYTES
    finally:
        tracemalloc.stop()


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("checkpoint.manifest", "serializers.eqx_file"):
        monkeypatch.setattr(f"vibe_store.{module}.MAX_JSON_BYTES", 10_000)
        with pytest.raises(InvalidValueError, match=r"would have \d+ bytes.*numpy\.uint8"):
            save_checkpoint(tmp_path / "checkpoints", "x" * 10_000)
        monkeypatch.undo()
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_replacing_a_hostile_checkpoint_deletes_nothing_of_another(tampering: Any, tree: Any) -> None:
    root = tampering.root
    save_checkpoint(root, tree)  # one without a step, beside the steps
    shutil.copy(root / "manifest.json", root / "step_5/manifest.json.kept")
    fields = json.loads((root / "manifest.json").read_bytes())
    del fields["checksum"]
    for key in ("step_4/state.eqx", "step_4/manifest.json", "best", ".vibe_store/writer.lock"):
        fields["items"]["state"]["files"]["state.eqx"]["key"] = key
        tampering.write_manifest(fields)
        (root / "step_5/manifest.json").replace(root / "manifest.json")
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(root, tree)
        save_checkpoint(root, tree)
        assert load_checkpoint(root, tree, step=4)["text"] == "hello"
        assert (root / ".vibe_store/writer.lock").exists()


def test_a_state_that_fits_no_memory_is_refused_before_any_is_taken(tampering: Any, tree: Any) -> None:
    fields = tampering.manifest()
    _leaf(fields)["shape"] = [2**40]
    tampering.write_manifest(fields)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(), pytest.raises((CorruptCheckpointError, ValueError)):
            load_checkpoint(tampering.root, tree, step=5)
        with pytest.raises(CorruptCheckpointError, match="ends at byte"):
            load_checkpoint(tampering.root, None, step=5)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
