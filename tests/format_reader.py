"""A reader of the format, written from docs/format.md alone."""

import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import xxhash

ONE_BYTE = re.compile(r"u?int[24]|float[468]_\w+")
MAGIC = b"\x89vstore\n"


def steps(directory: Path) -> list[int]:
    """Return the committed steps of a directory."""
    folders = (
        re.fullmatch(r"step_(0|[1-9][0-9]{0,17})", path.parent.name)
        for path in directory.glob("*/manifest.json")
    )
    return sorted(int(folder[1]) for folder in folders if folder)


def read_manifest(folder: Path) -> dict:
    """Return the verified manifest of a step's folder."""
    first, _, rest = (folder / "manifest.json").read_bytes().partition(b"\n")
    if first != b'{"checksum": "%s",' % xxhash.xxh3_128_hexdigest(rest).encode():
        raise ValueError(f"The manifest in {folder} is damaged.")
    manifest = json.loads(b"{" + rest)
    if manifest["format"] > 1:
        raise ValueError(f"The manifest in {folder} is of a newer format.")
    return manifest


def read_item(folder: Path, item: str) -> dict:
    """Return the leaves of an item by path, data as arrays."""
    found = read_manifest(folder)["items"][item]
    file = found["files"][f"{item}.eqx"]
    if not is_inside(file["key"]):
        raise ValueError(f"The key {file['key']!r} leads elsewhere.")
    data = (folder / file["key"]).read_bytes()
    if (len(data), xxhash.xxh3_128_hexdigest(data)) != (file["size"], file["xxh3_128"]):
        raise ValueError(f"{file['key']} in {folder} is damaged.")
    return {row["path"]: leaf(row, data) for row in found["leaves"]}


def read_file(path: Path) -> dict:
    """Return the leaves of an .eqx file by path, without a manifest."""
    data = path.read_bytes()
    magic, version, length, of_records, of_table = struct.unpack("<8sIQ16s16s", data[-52:])
    if magic != MAGIC or version > 1 or length > len(data) - 52:
        raise ValueError(f"{path} has no leaf table of version 1.")
    records, table = data[: -52 - length], data[-52 - length : -52]
    if xxhash.xxh3_128_digest(table + data[-52:-16]) != of_table:
        raise ValueError(f"The leaf table of {path} is damaged.")
    if xxhash.xxh3_128_digest(records) != of_records:
        raise ValueError(f"The records of {path} are damaged.")
    return {row["path"]: leaf(row, records) for row in json.loads(table)}


def leaf(row: dict, data: bytes) -> object:
    """Return what a row of the leaf table describes."""
    if "value" in row:
        return row["value"]
    name, shape = row["dtype"], row["shape"]
    # NumPy has no name for the others: bfloat16 as its bits, what has less than 16 bits as bytes.
    dtype = np.dtype("uint16" if name == "bfloat16" else "uint8" if ONE_BYTE.fullmatch(name) else name)
    part = data[row["offset"] : row["offset"] + math.prod(shape) * dtype.itemsize]
    if xxhash.xxh3_128_hexdigest(part) != row["checksum"]:
        raise ValueError(f"The leaf {row['path']} is damaged.")
    return np.frombuffer(part, dtype).reshape(shape)


def is_inside(key: str) -> bool:
    """Return whether a key stays in its folder."""
    return not key.startswith("/") and "\\" not in key and not {"", ".", ".."} & {*key.split("/")}
