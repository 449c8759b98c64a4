"""docs/manifest.schema.json takes what is read, and refuses what is refused for its shape."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xxhash
from jsonschema import Draft202012Validator

from vibe_store import save_checkpoint
from vibe_store.checkpoint.manifest import FORMAT, decode
from vibe_store.errors import CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import LeafKind

HERE = Path(__file__).parent
SCHEMA = json.loads((HERE.parent / "docs" / "manifest.schema.json").read_text("utf-8"))
GOLDEN = sorted((HERE / "golden").rglob("manifest.json"))

VALUES = [
    *(None, True, -1, 0, 1.5, 2**63, 10**18, "", "x", "NaN", "nan", "0" * 32, "G" * 32, "x" * 2000),
    *("float32", "float33", "int64", "key", "array", "str", "2026-01-01", "2026-01-01T00:00:00+00:00"),
    *([], [1], [-1], ["a"], [2**62, 4], [0] * 65, {}, {"x": 1}),
]
"""What is put in the place of each part of a manifest in turn; some of it is right in some places."""

KEYS = [
    *(
        "x",
        "",
        "a/b",
        "/a",
        "a/",
        "a//b",
        ".",
        "../x",
        "a/..",
        "a\\b",
        "C:/a",
        "a\nb",
        "x" * 300,
        "a/" * 600 + "b",
    ),
    *("step_1/a", "step_01", "best", "a/best", "manifest.json", ".vibe_store/x", ".vibe-store-tmp-1", "é"),
]
"""What each key, and each name in an object, is replaced by in turn."""


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    Draft202012Validator.check_schema(SCHEMA)
    return Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A manifest in which everything occurs once."""
    folder = tmp_path_factory.mktemp("saved")
    tree = {
        "array": np.zeros((2, 3), np.float32),
        "key": jax.random.key(0),
        "python": [True, 3, 0.5, 1j, np.float16(2), "text", b"bytes", len],
    }
    save_checkpoint(folder, tree, step=3, metadata={"a": 1}, metrics={"a": 1.5, "b": float("nan")})
    return json.loads((folder / "step_3" / "manifest.json").read_bytes())


def is_read(document: Any) -> bool:
    """Whether our reader takes a document for a manifest, given a first line that fits."""
    fields = {name: value for name, value in document.items() if name != "checksum"}
    body = json.dumps(fields)[1:].encode() if fields else b"}"
    first = b'{"checksum": "%s",\n' % xxhash.xxh3_128_hexdigest(body).encode()
    try:
        decode(first + body, where="here")
    except (CorruptCheckpointError, NewerFormatError):
        return False
    return True


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all parts of a document, but for its checksum."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        if path or name != "checksum":
            yield (*path, name)
            yield from places(part, (*path, name))


def variants(document: Any) -> Iterator[tuple[str, Any]]:
    """A document with each of its parts removed, replaced and renamed in turn, and what was done."""
    for place in places(document):
        name = place[-1]

        def changed(change: Callable[[Any], object], place: tuple[str | int, ...] = place) -> Any:
            around = new = copy.deepcopy(document)
            for outer in place[:-1]:
                around = around[outer]
            change(around)
            return new

        if isinstance(name, str):
            yield f"{place} beside another", changed(lambda around: around.update(unknown=1))
        yield f"{place} removed", changed(lambda around, name=name: around.pop(name))
        for value in KEYS if name == "key" else VALUES:
            yield (
                f"{place} is {value!r:.60}",
                changed(lambda around, name=name, value=value: around.__setitem__(name, value)),
            )
        for value in KEYS if place[-2:-1] in [("items",), ("files",)] else ["x"] * isinstance(name, str):
            yield (
                f"{place} renamed {value!r:.60}",
                changed(lambda around, name=name, value=value: around.__setitem__(value, around.pop(name))),
            )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: "/".join(path.parts[-4:-1]))
def test_what_earlier_versions_wrote_is_valid(path: Path, validator: Draft202012Validator) -> None:
    assert list(map(str, validator.iter_errors(json.loads(path.read_bytes())))) == []


def test_what_is_written_now_is_valid(saved: dict[str, Any], validator: Draft202012Validator) -> None:
    assert list(map(str, validator.iter_errors(saved))) == []
    assert saved["format"] == FORMAT == SCHEMA["properties"]["format"]["const"]
    kinds = {row["kind"] for row in saved["items"]["state"]["leaves"]}
    assert kinds | {"numpy", "array"} == set(LeafKind.__args__)
    assert set(SCHEMA["$defs"]["leaf"]["properties"]["kind"]["enum"]) == set(LeafKind.__args__)


def test_the_schema_takes_all_that_is_read_and_refuses_what_is_refused_for_its_shape(
    saved: dict[str, Any], validator: Draft202012Validator
) -> None:
    document = copy.deepcopy(saved)
    leaves = document["items"]["state"]["leaves"]
    # Of each sort one is enough; the test below knows the others.
    leaves[:] = [next(row for row in leaves if row["kind"] == kind) for kind in ("key", "bytes")]
    assert is_read(document)
    too_strict, too_lax, agreed = [], [], [0, 0]
    for what, variant in variants(document):
        read, valid = is_read(variant), validator.is_valid(variant)
        agreed[read] += read == valid
        if read and not valid:
            too_strict.append(what)
        if valid and not read:
            too_lax.append(what)
    assert too_strict == []
    assert too_lax == []
    assert min(agreed) > 50, "the variants are all read, or all refused, so that they show nothing"


@pytest.mark.parametrize(
    "kind", ["array", "key", "int", "float", "complex", "bool", "str", "bytes", "callable"]
)
def test_the_schema_knows_what_a_row_of_each_kind_has(
    kind: str, saved: dict[str, Any], validator: Draft202012Validator
) -> None:
    rows = saved["items"]["state"]["leaves"]
    for other in [{**row, "kind": kind} for row in rows]:
        document = copy.deepcopy(saved)
        document["items"]["state"]["leaves"] = [other]
        assert validator.is_valid(document) == is_read(document), other
