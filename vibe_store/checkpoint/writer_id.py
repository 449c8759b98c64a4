"""Who writes to a directory that cannot be locked: the process whose id stands in its ``writer.json``.

A manager puts the id of its process there when it starts to write, and reads it again before it commits or
deletes anything. Whoever finds another's id has been superseded (it may run on a machine that was preempted
and replaced, but is not gone yet) and stops.
"""

import json
import logging
import os
import secrets
import socket
from datetime import UTC, datetime

from vibe_store.checkpoint.layout import OWN
from vibe_store.checkpoint.manifest import MAX_JSON_BYTES, strict_json
from vibe_store.errors import WriterSupersededError
from vibe_store.interfaces import StorageBackend

__all__ = ["WRITER", "WriterClaim"]

WRITER = f"{OWN}/writer.json"
_log = logging.getLogger("vibe_store")
_id = secrets.token_hex(16)


class WriterClaim:
    """What one manager holds of a directory that cannot be locked."""

    def __init__(self, storage: StorageBackend) -> None:
        self._storage, self._pid = storage, os.getpid()
        self._superseded: str | None = None

    @property
    def valid(self) -> bool:
        """Whether it is this process's own, and not inherited by a fork."""
        return self._pid == os.getpid()

    def make(self) -> None:
        """Make this process the writer; the one before stops at its next save."""
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        record = {"id": _id, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
        self._storage.write(WRITER, json.dumps(record).encode())

    def check(self) -> None:
        """Make sure that this process is still the writer; if ever it was not, it is not.

        Raises:
            WriterSupersededError: another is.
        """
        if self._superseded is None:
            self._superseded = self._another()
        if self._superseded is not None:
            raise WriterSupersededError(self._superseded)

    def check_known(self) -> None:
        """Raise what :meth:`check` found out before, without asking the storage."""
        if self._superseded is not None:
            raise WriterSupersededError(self._superseded)

    def release(self) -> None:
        """Do nothing: whoever comes next says so."""

    def _another(self) -> str | None:
        """Return a sentence about another process that is the writer now."""
        try:
            record = strict_json(self._storage.read(WRITER, 0, MAX_JSON_BYTES))
        except FileNotFoundError:
            _log.warning("%s/%s is gone, so it is written anew.", self._storage.url, WRITER)
            self.make()
            return None
        except ValueError:
            record = None
        who = record if isinstance(record, dict) else {}
        if who.get("id") == _id:
            return None
        return (
            f"{self._storage.url} is written to by process {who.get('pid', 'unknown')} on "
            f"{who.get('host', 'unknown host')} since {who.get('since', 'an unknown time')}, so this process "
            "writes nothing there any more. If that one is the mistake, end it and start this one again."
        )


def _forget_in_child() -> None:
    global _id
    _id = secrets.token_hex(16)


os.register_at_fork(after_in_child=_forget_in_child)
