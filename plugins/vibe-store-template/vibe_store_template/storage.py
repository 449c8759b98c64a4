"""A storage: each object is a row of an SQLite database, ``sqlite:///path/to/run.db``, a gigabyte at most."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.storage.keys import check_key, check_keys, check_prefix, check_range, check_url

_TABLE = "CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, data BLOB, modified REAL)"
_LIST = "SELECT key, length(data), modified FROM objects WHERE substr(key, 1, ?) = ? ORDER BY key"
_READ = "SELECT data FROM objects WHERE key = ?"
_WRITE = {True: "REPLACE INTO objects VALUES (?, ?, ?)", False: "INSERT INTO objects VALUES (?, ?, ?)"}
_DELETE = "DELETE FROM objects WHERE key IN (SELECT value FROM json_each(?))"


class SqliteStorage(StorageBackend):
    """Objects in one file; ``timeout`` is how many seconds to wait for whoever else writes to it."""

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        self._file, self._timeout = Path(check_url(url).partition("://")[2]).absolute(), timeout
        self.url = f"sqlite://{self._file}"

    def list(self, prefix: str = "") -> Iterator[Blob]:
        return (Blob(*row) for row in self._run(_LIST, len(check_prefix(prefix)), prefix))

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        check_range(start, end)
        for (data,) in self._run(_READ, check_key(key)):
            return bytes(data[start:end])
        raise FileNotFoundError(f"There is no object {key!r} in {self.url}.")

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        try:
            self._run(_WRITE[overwrite], check_key(key), data, time.time(), create=True)
        except sqlite3.IntegrityError as error:
            raise FileExistsError(f"There is an object {key!r} in {self.url} already.") from error

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        self.write(key, source.read_bytes())

    def get(self, key: str, target: Path) -> None:
        data = self.read(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        self._run(_DELETE, json.dumps(check_keys(keys)))

    def _run(self, sql: str, *values: object, create: bool = False) -> Sequence[Any]:
        if create:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        elif not self._file.exists():
            return ()
        try:
            opened = sqlite3.connect(self._file, timeout=self._timeout, isolation_level=None)
            with closing(opened) as database:
                database.execute("PRAGMA synchronous = EXTRA")  # what was written outlives a power failure
                database.execute(_TABLE)
                return database.execute(sql, values).fetchall()
        except sqlite3.IntegrityError:
            raise  # which write tells what it means
        except sqlite3.DatabaseError as error:
            raise OSError(f"{self.url}: {error}") from error
