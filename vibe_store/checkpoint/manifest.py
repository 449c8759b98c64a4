"""The manifest: the one file whose existence makes a checkpoint, and what it says.

A manifest is JSON whose first line holds the xxh3-128 of everything after that line, so that a changed byte
anywhere in it is noticed; every later format keeps that line.

The checksum finds damage, not malice: whoever can write a manifest can compute it. So nothing in a manifest
is believed that could lead a reader out of its folder, or to what is no file of this checkpoint, and no
number that storages, NumPy or calendars don't have.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import xxhash

from vibe_store.checkpoint.layout import BEST, MANIFEST, MAX_STEP, OWN, PINNED, is_step_folder
from vibe_store.errors import CorruptCheckpointError, InvalidValueError, NewerFormatError
from vibe_store.interfaces import FileEntry, Leaf
from vibe_store.serializers.rows import MAX_JSON_BYTES, brief, strict_json, table_from_json, table_to_json
from vibe_store.storage.keys import is_key

__all__ = [
    "FORMAT",
    "ITEM_NAME",
    "MAX_JSON_BYTES",
    "Distribution",
    "ItemRecord",
    "Manifest",
    "StoredFile",
    "decode",
    "encode",
    "is_distribution",
    "is_file_key",
    "same_content",
    "strict_json",
]

FORMAT = 1
"""The newest format that this version reads, and the one that it writes."""

ITEM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
"""What an item may be called: the name becomes part of file names."""

_FIRST_LINE = re.compile(rb'\{"checksum": "[0-9a-f]{32}",\n')
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9.+!_-]{1,100}")
_PROVIDER = re.compile(r"[\w.+-]{1,100}")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MAX_SIZE = 2**63 - 1
_MAX_KEY_BYTES = 1024
_MAX_NAME_BYTES = 255
_RESERVED = frozenset({MANIFEST, BEST, PINNED, OWN})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One object that holds the bytes of one file.

    Attributes:
        key: the object's key, relative to the folder of the manifest.
        size: its length in bytes.
        checksum: xxh3-128 of its bytes, as 32 lower-case hexadecimal digits.
    """

    key: str
    size: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """The installed distribution that a serializer came from, as ``pip`` names it.

    Whoever installs what a checkpoint asks for should know that whoever wrote the checkpoint chose the name.
    """

    name: str
    version: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One pytree of a checkpoint: who wrote it, its files by name, and its leaf table.

    ``distribution`` is None where it is not known: an older vibe_store wrote the item, or a serializer that
    was passed as an object and that no plugin provides.
    """

    serializer: str
    files: Mapping[str, StoredFile]
    leaves: tuple[Leaf, ...]
    distribution: Distribution | None = None

    @property
    def entries(self) -> dict[str, FileEntry]:
        """The files as the serializer knows them."""
        return {name: FileEntry(name, file.size, file.checksum) for name, file in self.files.items()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one checkpoint consists of.

    Attributes:
        step: its step; None for a checkpoint that was saved without a step.
        attempt: the id of the attempt that wrote it.
        created: when it was written, with time zone.
        versions: the versions of the packages that took part.
        items: its pytrees by name.
        metadata: the file that holds its metadata, where there is one.
        metrics: the metrics that it was saved with.
    """

    step: int | None
    attempt: str
    created: datetime
    versions: Mapping[str, str]
    items: Mapping[str, ItemRecord]
    metadata: StoredFile | None = None
    metrics: Mapping[str, float] | None = None
    format: int = field(default=FORMAT)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Every file that this manifest names."""
        files = [file for item in self.items.values() for file in item.files.values()]
        return (*files, self.metadata) if self.metadata else tuple(files)

    @property
    def size(self) -> int:
        """The bytes of all its files."""
        return sum(file.size for file in self.files)


def same_content(one: Manifest, other: Manifest) -> bool:
    """Whether two checkpoints hold the same, whoever wrote them, and under whatever keys."""

    def content(manifest: Manifest) -> object:
        items = {name: (item.serializer, item.entries, item.leaves) for name, item in manifest.items.items()}
        metadata = manifest.metadata and (manifest.metadata.size, manifest.metadata.checksum)
        # As text, since NaN is not equal to itself.
        return manifest.step, items, metadata, repr(sorted((manifest.metrics or {}).items()))

    return content(one) == content(other)


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``.

    Raises:
        InvalidValueError: they would be more than are ever read, or :func:`decode` would refuse an item.
    """
    for name, item in manifest.items.items():
        _refuse_unreadable(name, item)
    fields: dict[str, Any] = {
        "format": manifest.format,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created.isoformat(),
        "versions": dict(manifest.versions),
        "metrics": None if manifest.metrics is None else {k: _number(v) for k, v in manifest.metrics.items()},
        "metadata": None if manifest.metadata is None else _file_to_json(manifest.metadata),
        "items": {
            name: {
                "serializer": item.serializer,
                **_distribution_to_json(item.distribution),
                "files": {file_name: _file_to_json(file) for file_name, file in item.files.items()},
                "leaves": table_to_json(item.leaves),
            }
            for name, item in manifest.items.items()
        },
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
    body = f"{lines}}}\n".encode()
    data = _first_line(body) + body
    if manifest.metadata is not None and manifest.metadata.size > MAX_JSON_BYTES:
        raise InvalidValueError(
            f"The metadata would have {manifest.metadata.size} bytes as JSON, and at most {MAX_JSON_BYTES} "
            "are read. Store large data as arrays of an item."
        )
    if len(data) > MAX_JSON_BYTES:
        raise InvalidValueError(
            f"The manifest of this checkpoint would have {len(data)} bytes, and at most {MAX_JSON_BYTES} are "
            "read. Strings and bytes are kept in it, so store large ones as arrays of numpy.uint8."
        )
    return data


def decode(data: bytes, *, where: str) -> Manifest:
    """Read the bytes of a manifest; ``where`` names the place in errors.

    Raises:
        CorruptCheckpointError: a byte is not what was written, or a value is none that we would write.
        NewerFormatError: a newer version of this package wrote it.
    """
    if len(data) > MAX_JSON_BYTES:
        raise CorruptCheckpointError(
            f"The manifest {where} has more than {MAX_JSON_BYTES} bytes, and such are never written."
        )
    first = _FIRST_LINE.match(data)
    if first is None:
        raise CorruptCheckpointError(f"The manifest {where} does not begin with its checksum; it is damaged.")
    body = data[first.end() :]
    if data[: first.end()] != _first_line(body):
        raise CorruptCheckpointError(f"The manifest {where} does not match its own checksum; it is damaged.")
    try:
        fields = strict_json(b"{" + body)
        _check_format(_field(fields, "format"), where)
        return _from_json(fields)
    except NewerFormatError:
        raise
    except ValueError as error:
        text = str(error).removesuffix(".")
        raise CorruptCheckpointError(f"The manifest {where} cannot be understood: {text}.") from error


def is_file_key(key: object) -> bool:
    """Whether a key, relative to the folder of a manifest, can be that of a file of its checkpoint.

    It stays in that folder, is none that a checkpoint itself is known by, and lies in no step's folder (which
    would be another step's, seen from a checkpoint without a step).
    """
    if not isinstance(key, str) or len(key) > _MAX_KEY_BYTES or not is_key(key):
        return False
    names = key.split("/")
    encoded = [len(name.encode()) for name in names]
    if sum(encoded) + len(names) > _MAX_KEY_BYTES or max(encoded) > _MAX_NAME_BYTES:
        return False
    return names[0] not in _RESERVED and not is_step_folder(names[0])


def is_distribution(name: object) -> bool:
    """Whether a distribution can have this name."""
    return isinstance(name, str) and _DISTRIBUTION.fullmatch(name) is not None


def _check_format(number: Any, where: str) -> None:
    _expect(_is_int(number) and number >= 1, "format", number)
    if number > FORMAT:
        raise NewerFormatError(
            f"The checkpoint {where} has format {number}, and this vibe_store reads up to {FORMAT}. "
            "Upgrade with `pip install -U vibe-store`."
        )


def _first_line(body: bytes) -> bytes:
    return b'{"checksum": "' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n'


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _file_to_json(file: StoredFile) -> dict[str, Any]:
    return {"key": file.key, "size": file.size, "xxh3_128": file.checksum}


def _refuse_unreadable(name: str, item: ItemRecord) -> None:
    try:
        _check_item(name)
        _check_serializer(item.serializer)
        for file_name, file in item.files.items():
            _check_key(file_name)
            _file_from_json(_file_to_json(file))
    except ValueError as error:
        raise InvalidValueError(
            f"The item {brief(name)} cannot be saved, since nobody could read it again: in its manifest, "
            f"{error}. Give it another name, or tell the authors of its serializer {brief(item.serializer)}."
        ) from error


def _from_json(fields: dict[str, Any]) -> Manifest:
    step, attempt, metadata, metrics = (
        _field(fields, name) for name in ("step", "attempt", "metadata", "metrics")
    )
    _expect(step is None or (_is_int(step) and 0 <= step <= MAX_STEP), "step", step)
    _expect(isinstance(attempt, str), "attempt", attempt)
    items = {_check_item(name): _item_from_json(item) for name, item in _object(fields, "items").items()}
    _expect(bool(items), "items", items)
    versions = _object(fields, "versions")
    for version in versions.values():
        _expect(isinstance(version, str), "version", version)
    return Manifest(
        format=fields["format"],
        step=step,
        attempt=attempt,
        created=_time_from_json(_field(fields, "created")),
        versions=versions,
        items=items,
        metadata=None if metadata is None else _metadata_from_json(metadata),
        metrics=None
        if metrics is None
        else {name: _number_from_json(value) for name, value in _object(fields, "metrics").items()},
    )


def _field(fields: object, name: str) -> Any:
    if not isinstance(fields, dict) or name not in fields:
        raise ValueError(f"{name} is missing")
    return fields[name]


def _object(fields: object, name: str) -> dict[str, Any]:
    value = _field(fields, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {brief(value)}, which is no object")
    return value


def _time_from_json(value: Any) -> datetime:
    _expect(isinstance(value, str) and len(value) < 64, "created", value)
    created = datetime.fromisoformat(value)
    # At the ends of the calendar, other time zones would have no date for it.
    _expect(created.tzinfo is not None and 1 < created.year < 9999, "created", value)
    return created


def _check_item(name: str) -> str:
    _expect(len(name) <= _MAX_NAME_BYTES and ITEM_NAME.fullmatch(name) is not None, "item", name)
    return name


def _check_serializer(name: Any) -> str:
    _expect(isinstance(name, str) and _PROVIDER.fullmatch(name) is not None, "serializer", name)
    return str(name)


def _item_from_json(item: Any) -> ItemRecord:
    serializer = _check_serializer(_field(item, "serializer"))
    files = {_check_key(name): _file_from_json(file) for name, file in _object(item, "files").items()}
    leaves = table_from_json(_field(item, "leaves"))
    return ItemRecord(serializer, files, leaves, _distribution_from_json(item.get("distribution")))


def _distribution_to_json(distribution: Distribution | None) -> dict[str, Any]:
    if distribution is None:
        return {}
    version = {"version": distribution.version} if distribution.version else {}
    return {"distribution": {"name": distribution.name, **version}}


def _distribution_from_json(distribution: Any) -> Distribution | None:
    if distribution is None:
        return None
    name, version = _field(distribution, "name"), distribution.get("version")
    # Both are shown to people, within a command to install it.
    _expect(is_distribution(name), "distribution", name)
    _expect(version is None or _is_version(version), "version", version)
    return Distribution(name, version)


def _is_version(version: object) -> bool:
    return isinstance(version, str) and _VERSION.fullmatch(version) is not None


def _file_from_json(file: Any) -> StoredFile:
    size, checksum = _field(file, "size"), _field(file, "xxh3_128")
    _expect(_is_int(size) and 0 <= size <= _MAX_SIZE, "size", size)
    _expect(isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) is not None, "xxh3_128", checksum)
    return StoredFile(_check_key(_field(file, "key")), size, checksum)


def _metadata_from_json(file: Any) -> StoredFile:
    metadata = _file_from_json(file)
    _expect(metadata.size <= MAX_JSON_BYTES, "the size of the metadata", metadata.size)
    return metadata


def _check_key(key: Any) -> str:
    _expect(is_file_key(key), "key", key)
    return str(key)


def _number_from_json(value: Any) -> float:
    if isinstance(value, str):
        _expect(value in _NON_FINITE, "metric", value)
        return _NON_FINITE[value]
    # A float has at most 309 digits before its point.
    _expect(isinstance(value, float) or (_is_int(value) and value.bit_length() < 1024), "metric", value)
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(holds: bool, name: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} is {brief(value)}")
