"""Each of the three keeps every promise of its kind."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from vibe_store_template.retention import Records
from vibe_store_template.serializer import RawSerializer
from vibe_store_template.storage import SqliteStorage

from vibe_store.testing import RetentionContract, SerializerContract, StorageContract, StorageRoot

TABLE = "CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, data BLOB, modified REAL)"


class TestSqlite(StorageContract):
    @pytest.fixture
    def root(self) -> Iterator[StorageRoot]:
        # In memory where the system has that: making rows durable takes most of the time.
        memory = Path("/dev", "shm")
        with TemporaryDirectory(dir=memory if memory.exists() else None) as folder:
            file = Path(folder, "runs", "run.db")
            url = f"sqlite://{file}"
            yield StorageRoot(
                open=lambda: SqliteStorage(url),
                raw_set=lambda key, data: raw_set(file, key, data),
                raw_get=lambda key: raw_get(file, key),
            )


def raw_set(file: Path, key: str, data: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(TABLE)
        database.execute("REPLACE INTO objects VALUES (?, ?, ?)", (key, data, time.time()))


def raw_get(file: Path, key: str) -> bytes | None:
    if not file.exists():
        return None
    with closing(sqlite3.connect(file)) as database:
        row = database.execute("SELECT data FROM objects WHERE key = ?", (key,)).fetchone()
    return None if row is None else bytes(row[0])


class TestRaw(SerializerContract):
    @pytest.fixture
    def serializer(self) -> RawSerializer:
        return RawSerializer()


class TestRecords(RetentionContract):
    @pytest.fixture
    def policy(self) -> Records:
        return Records("loss", mode="min")
