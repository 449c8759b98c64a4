"""The manifest: the one file whose existence makes a checkpoint, and what it says.

A manifest is JSON whose first line holds the xxh3-128 of everything after that line, so that a changed byte
anywhere in it is noticed; every later format keeps that line.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import xxhash

from vibe_store.errors import CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import FileEntry, Leaf
from vibe_store.serializers.rows import table_from_json, table_to_json
from vibe_store.storage.keys import is_key

__all__ = ["FORMAT", "ITEM_NAME", "ItemRecord", "Manifest", "StoredFile", "decode", "encode", "strict_json"]

FORMAT = 1
"""The newest format that this version reads, and the one that it writes."""

ITEM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
"""What an item may be called: the name becomes part of file names."""

_MAX_BYTES = 256 * 1024 * 1024
_FIRST_LINE = re.compile(rb'\{"checksum": "[0-9a-f]{32}",\n')
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


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
class ItemRecord:
    """One pytree of a checkpoint: who wrote it, its files by name, and its leaf table."""

    serializer: str
    files: Mapping[str, StoredFile]
    leaves: tuple[Leaf, ...]

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


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``."""
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
                "files": {file_name: _file_to_json(file) for file_name, file in item.files.items()},
                "leaves": table_to_json(item.leaves),
            }
            for name, item in manifest.items.items()
        },
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
    body = f"{lines}}}\n".encode()
    return _first_line(body) + body


def decode(data: bytes, *, where: str) -> Manifest:
    """Read the bytes of a manifest; ``where`` names the place in errors.

    Raises:
        CorruptCheckpointError: a byte is not what was written, or a value is none that we would write.
        NewerFormatError: a newer version of this package wrote it.
    """
    if len(data) > _MAX_BYTES:
        raise CorruptCheckpointError(
            f"The manifest {where} has {len(data)} bytes; more than {_MAX_BYTES} are never written."
        )
    first = _FIRST_LINE.match(data)
    if first is None:
        raise CorruptCheckpointError(f"The manifest {where} does not begin with its checksum; it is damaged.")
    body = data[first.end() :]
    if data[: first.end()] != _first_line(body):
        raise CorruptCheckpointError(f"The manifest {where} does not match its own checksum; it is damaged.")
    try:
        fields = strict_json(b"{" + body)
        _check_format(fields["format"], where)
        return _from_json(fields)
    except NewerFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptCheckpointError(f"The manifest {where} cannot be understood: {error}.") from error


def strict_json(data: bytes) -> Any:
    """Parse JSON as this package writes it: UTF-8, no key twice, no NaN or Infinity; raise ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return found

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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


def _from_json(fields: dict[str, Any]) -> Manifest:
    step = fields["step"]
    _expect(step is None or (_is_int(step) and step >= 0), "step", step)
    created = datetime.fromisoformat(fields["created"])
    _expect(created.tzinfo is not None, "created", fields["created"])
    _expect(isinstance(fields["attempt"], str), "attempt", fields["attempt"])
    items = {_check_item(name): _item_from_json(item) for name, item in fields["items"].items()}
    _expect(bool(items), "items", items)
    metadata = fields["metadata"]
    return Manifest(
        format=fields["format"],
        step=step,
        attempt=fields["attempt"],
        created=created,
        versions={str(name): str(version) for name, version in fields["versions"].items()},
        items=items,
        metadata=None if metadata is None else _file_from_json(metadata),
        metrics=None
        if fields["metrics"] is None
        else {name: _number_from_json(value) for name, value in fields["metrics"].items()},
    )


def _check_item(name: str) -> str:
    _expect(ITEM_NAME.fullmatch(name) is not None, "item", name)
    return name


def _item_from_json(item: dict[str, Any]) -> ItemRecord:
    _expect(isinstance(item["serializer"], str), "serializer", item["serializer"])
    files = {_check_key(name): _file_from_json(file) for name, file in item["files"].items()}
    return ItemRecord(item["serializer"], files, table_from_json(item["leaves"]))


def _file_from_json(file: dict[str, Any]) -> StoredFile:
    size, checksum = file["size"], file["xxh3_128"]
    _expect(_is_int(size) and size >= 0, "size", size)
    _expect(isinstance(checksum, str) and _CHECKSUM.fullmatch(checksum) is not None, "xxh3_128", checksum)
    return StoredFile(_check_key(file["key"]), size, checksum)


def _check_key(key: Any) -> str:
    _expect(is_key(key), "key", key)
    return str(key)


def _number_from_json(value: Any) -> float:
    if isinstance(value, str):
        return _NON_FINITE[value]
    _expect(isinstance(value, int | float) and not isinstance(value, bool), "metric", value)
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _expect(holds: bool, name: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}")
