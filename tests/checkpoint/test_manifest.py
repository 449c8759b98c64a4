"""The manifest: what it says comes back, and nothing but what we wrote is believed."""

import dataclasses
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from vibe_store.checkpoint import Manifest, load_checkpoint, load_manifest, save_checkpoint
from vibe_store.checkpoint.manifest import (
    FORMAT,
    Distribution,
    ItemRecord,
    StoredFile,
    decode,
    encode,
)
from vibe_store.errors import CorruptCheckpointError, NewerFormatError, UnknownProviderError
from vibe_store.interfaces import Leaf

_CHECKSUM = "0123456789abcdef" * 2
_FILE = StoredFile("state.eqx", 12, _CHECKSUM)
_MANIFEST = Manifest(
    step=5,
    attempt="20260101T000000-0123456789",
    created=datetime(2026, 1, 1, tzinfo=UTC),
    versions={"jax": "0.10"},
    items={"state": ItemRecord("eqx", {"state.eqx": _FILE}, (Leaf("", "numpy", "float32", (3,)),))},
    metadata=StoredFile("metadata.json", 3, _CHECKSUM),
    metrics={"loss": 0.5},
)


def _fields() -> dict[str, Any]:
    fields = json.loads(encode(_MANIFEST))
    del fields["checksum"]
    return dict(fields)


def _sealed(body: str | bytes) -> bytes:
    """A manifest whose checksum holds, whatever it says; ``body`` is what follows the opening brace."""
    data = body.encode() if isinstance(body, str) else body
    return b'{"checksum": "' + xxhash.xxh3_128_hexdigest(data).encode() + b'",\n' + data


def _with(**changes: Any) -> bytes:
    return _sealed(json.dumps(_fields() | changes)[1:])


_names = st.text("abcdefgh_-", min_size=1, max_size=8).filter(lambda name: not name.startswith("-"))
_files = st.builds(StoredFile, _names, st.integers(0, 2**60), st.just(_CHECKSUM))
_distributions = st.builds(
    Distribution, st.sampled_from(["x", "vibe-store_npz.2"]), st.sampled_from([None, "1.0+local", "1!2rc1"])
)
_items = st.builds(
    ItemRecord,
    _names,
    st.dictionaries(_names, _files),
    st.just((Leaf("['a']", "int", "int64", ()),)),
    st.none() | _distributions,
)
_manifests = st.builds(
    Manifest,
    step=st.none() | st.integers(0, 10**18 - 1),
    attempt=st.text(),
    created=st.datetimes(timezones=st.just(UTC)).filter(lambda created: 1 < created.year < 9999),
    versions=st.dictionaries(_names, st.text()),
    items=st.dictionaries(_names, _items, min_size=1),
    metadata=st.none() | st.builds(StoredFile, _names, st.integers(0, 2**20), st.just(_CHECKSUM)),
    metrics=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False)),
)


@settings(max_examples=40, deadline=None)
@given(_manifests)
def test_a_manifest_reads_as_it_was_written(manifest: Manifest) -> None:
    assert decode(encode(manifest), where="here") == manifest


def test_a_metric_that_is_nan_reads_as_nan() -> None:
    metrics = decode(encode(dataclasses.replace(_MANIFEST, metrics={"loss": float("nan")})), where="").metrics
    assert metrics is not None
    assert metrics["loss"] != metrics["loss"]


def test_every_flipped_bit_is_noticed() -> None:
    good = encode(_MANIFEST)
    for position in range(len(good) * 8):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptCheckpointError, match="somewhere"):
            decode(bytes(bad), where="somewhere")


def test_every_cut_and_every_addition_is_noticed() -> None:
    good = encode(_MANIFEST)
    for bad in [*(good[:length] for length in range(len(good))), good + b"\n", good + good, b"\n" + good]:
        with pytest.raises(CorruptCheckpointError):
            decode(bad, where="")


def test_a_newer_format_is_named_whatever_else_it_holds() -> None:
    with pytest.raises(NewerFormatError, match=rf"here has format {FORMAT + 1}, .* reads up to {FORMAT}"):
        decode(_sealed(f'"format": {FORMAT + 1}, "shards": {{}}}}'), where="here")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": True},
        {"format": "1"},
        {"step": -1},
        {"step": 5.0},
        {"step": True},
        {"created": "2026-01-01T00:00:00"},
        {"created": "yesterday"},
        {"created": 5},
        {"attempt": None},
        {"versions": []},
        {"items": {}},
        {"items": []},
        {"items": {"../state": {}}},
        {"metrics": {"loss": "much"}},
        {"metrics": {"loss": None}},
        {"metrics": {"loss": True}},
        {"metrics": {"loss": 10**400}},
        {"metrics": [1]},
        {"metadata": {}},
        {"metadata": 5},
    ],
    ids=str,
)
def test_a_value_that_is_never_written_is_damage(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode(_with(**changes), where="")


@pytest.mark.parametrize(
    "name", ["format", "step", "created", "attempt", "versions", "items", "metrics", "metadata"]
)
def test_a_missing_field_is_damage(name: str) -> None:
    fields = _fields()
    del fields[name]
    with pytest.raises(CorruptCheckpointError, match=name):
        decode(_sealed(json.dumps(fields)[1:]), where="")


@pytest.mark.parametrize(
    "key",
    [
        "../x",
        "/x",
        "a/../../x",
        "a//b",
        "",
        ".",
        "a/",
        "C:x",
        "a\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        5,
        None,
        ["x"],
    ],
    ids=repr,
)
def test_a_key_that_could_lead_elsewhere_is_damage(key: object) -> None:
    file = {"key": key, "size": 1, "xxh3_128": _CHECKSUM}
    with pytest.raises(CorruptCheckpointError):
        decode(_with(metadata=file), where="")


@pytest.mark.parametrize(
    "file",
    [
        {"key": "x", "size": -1, "xxh3_128": _CHECKSUM},
        {"key": "x", "size": 1.5, "xxh3_128": _CHECKSUM},
        {"key": "x", "size": 1, "xxh3_128": _CHECKSUM.upper()},
        {"key": "x", "size": 1, "xxh3_128": "0"},
        {"key": "x", "size": 1},
    ],
    ids=str,
)
def test_a_file_without_a_size_and_a_checksum_is_damage(file: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode(_with(metadata=file), where="")


@pytest.mark.parametrize(
    "distribution",
    [
        "vibe-store",
        {},
        {"name": "a; rm -rf ~"},
        {"name": "--index-url=http://a"},
        {"name": "a" * 200},
        {"name": "a\n"},
        {"name": "a", "version": "1 && b"},
        {"name": "a", "version": ""},
        {"name": "a", "version": 1},
    ],
    ids=str,
)
def test_a_distribution_that_no_command_should_hold_is_damage(distribution: Any) -> None:
    item = _fields()["items"]["state"] | {"distribution": distribution}
    with pytest.raises(CorruptCheckpointError):
        decode(_with(items={"state": item}), where="")


def test_a_save_records_which_distribution_its_serializer_is_from(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(0))
    found = load_manifest(tmp_path).items["state"].distribution
    assert found is not None
    assert found.name == "vibe-store"


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (
            Distribution("vibe-store-npz", "1.2"),
            "serializer 'npz' of vibe-store-npz 1.2, which is not installed or does not provide it. "
            "Run `pip install vibe-store-npz`",
        ),
        (None, "cannot be loaded. There is no serializer 'npz'"),
    ],
)
def test_an_item_whose_serializer_is_not_installed_says_where_that_came_from(
    tmp_path: Path, scenarios: ModuleType, origin: Distribution | None, said: str
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(0))
    manifest = load_manifest(tmp_path)
    item = dataclasses.replace(manifest.items["state"], serializer="npz", distribution=origin)
    (tmp_path / "manifest.json").write_bytes(encode(dataclasses.replace(manifest, items={"state": item})))
    with pytest.raises(UnknownProviderError, match=re.escape(said)) as caught:
        load_checkpoint(tmp_path, scenarios.tree(0))
    assert f"The item 'state' of {tmp_path} cannot be loaded" in str(caught.value)
    assert "exist are eqx and orbax" in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(_fields())[1:-1] + ', "step": 6}',
        json.dumps(_fields() | {"metrics": {"loss": float("nan")}})[1:],
        json.dumps(_fields() | {"metrics": {"loss": float("inf")}})[1:],
        '"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        json.dumps(_fields())[1:].encode("utf-16"),
        json.dumps(_fields(), ensure_ascii=False)[1:].replace("jax", "jäx").encode("latin-1"),
        json.dumps(_fields())[1:] + "{}",
        "",
        "}",
        "]",
    ],
    ids=["twice", "nan", "inf", "deep", "utf-16", "latin-1", "more", "empty", "nothing", "list"],
)
def test_json_that_is_not_ours_is_damage_even_where_its_checksum_holds(body: str | bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode(_sealed(body), where="")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(_CHECKSUM),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def _mangled(draw: st.DrawFn) -> Any:
    """The fields of a good manifest, with one value somewhere in them replaced, removed or renamed."""
    fields: Any = _fields()
    place, steps = fields, draw(st.integers(1, 6))
    for _ in range(steps):
        if not isinstance(place, dict | list) or not place:
            break
        at = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[at], dict | list) and draw(st.booleans()):
            place = place[at]
            continue
        how = draw(st.sampled_from(["replace", "remove", "rename"]))
        value = place.pop(at)
        if how == "replace":
            value = draw(_json)
        if isinstance(place, dict):
            if how != "remove":
                place[at if how == "replace" else draw(st.text(max_size=9))] = value
        elif how == "replace":
            place.insert(at, value)
        break
    return fields


@settings(max_examples=300, deadline=None)
@given(_mangled() | _json.filter(lambda value: isinstance(value, dict)))
def test_whatever_a_manifest_says_it_reads_or_is_damage(fields: dict[str, Any]) -> None:
    try:
        manifest = decode(_sealed(json.dumps(fields)[1:]), where="")
    except (CorruptCheckpointError, NewerFormatError):
        return
    assert decode(encode(manifest), where="") == manifest or manifest.metrics


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_bytes_a_manifest_holds_they_are_damage(body: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        decode(_sealed(body), where="")


def test_a_step_folder_that_was_renamed_to_another_step_is_damage(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    with scenarios.manager_of(tmp_path) as manager:
        scenarios.save(manager, 5, 5)
    (tmp_path / "step_5").rename(tmp_path / "step_6")
    with pytest.raises(CorruptCheckpointError, match=r"step_6/manifest\.json says that it is of step 5"):
        load_manifest(tmp_path, step=6)
    with pytest.raises(CorruptCheckpointError, match="step 5"):
        load_checkpoint(tmp_path / "step_6", scenarios.tree(0))
