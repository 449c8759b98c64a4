"""One writing process for each local directory: a lock that goes with its process, however that ends.

The lock is ``flock`` on ``.vibe_store/writer.lock``, held once per process and counted, so that any number of
managers of one process share it. A forked child has none of its parent's locks; where the parent writes, the
child is refused like any other process.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from vibe_store.durable_files import explained, in_folder, sync_path
from vibe_store.errors import WriterLockedError

__all__ = ["WriterLease", "acquire_writer_lock"]

_log = logging.getLogger("vibe_store")

Purpose = Literal["manager", "one-shot"]
_ONE_SHOT_PATIENCE_SECS = 30.0
_POLL_SECS = 0.02
_UNLOCKABLE = (-1, -1)


@dataclass
class _Held:
    descriptor: int
    leases: int = 0


_held: dict[tuple[int, int], _Held] = {}
_guard = threading.RLock()


@dataclass
class WriterLease:
    """One writer's share of its process's lock on a directory."""

    _identity: tuple[int, int]
    _path: Path | None = None
    _released: bool = False
    _pid: int = field(default_factory=os.getpid)

    @classmethod
    def without_lock(cls) -> Self:
        """Return a lease on a directory that cannot be locked."""
        return cls(_UNLOCKABLE)

    def check(self) -> None:
        """Do nothing: as long as this process has the lock, no other writes to the directory."""

    def check_known(self) -> None:
        """Do nothing, as :meth:`check`."""

    @property
    def valid(self) -> bool:
        """Whether this process holds it: not released, not inherited by a fork, its file not removed."""
        return self._is_ours and (self._path is None or _identity_of(self._path) == self._identity)

    @property
    def _is_ours(self) -> bool:
        return not self._released and self._pid == os.getpid()

    def release(self) -> None:
        """Give it back; the last lease of a process unlocks the directory. Twice is no error."""
        with _guard:
            if not self._is_ours:
                return
            self._released = True
            held = _held.get(self._identity)
            if held is None:
                return
            held.leases -= 1
            if held.leases == 0:
                del _held[self._identity]
                os.close(held.descriptor)


def acquire_writer_lock(path: Path, purpose: Purpose) -> WriterLease:
    """Lock the directory whose lock file is ``path`` for this process.

    Where another process holds it for one save only ("one-shot"), this waits for that save; where a manager
    holds it, or the wait gets long, it raises.

    Raises:
        WriterLockedError: another process is writing there.
    """
    deadline = time.monotonic() + _ONE_SHOT_PATIENCE_SECS
    holder: dict[str, object] = {}
    while True:
        with explained(f"write to '{path.parent.parent}'"), _guard:
            # A folder of checkpoints that a crash of the machine could take away would take them along.
            in_folder(path.parent.parent, lambda: path.parent.mkdir(exist_ok=True), sync_path)
            lease = _try_acquire(path, purpose)
        if lease is not None:
            return lease
        # Seen once only, the manager may be the holder before this one, which has not signed yet.
        before, holder = holder, _holder(path)
        if (holder.get("purpose") != "one-shot" and holder == before) or time.monotonic() > deadline:
            raise WriterLockedError(
                f"{path.parent.parent} is being written to by process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'unknown host')} since {holder.get('since', 'an unknown time')}. "
                "Stop that process, or give this one a directory of its own. Reading is not affected."
            )
        time.sleep(_POLL_SECS)


def _try_acquire(path: Path, purpose: Purpose) -> WriterLease | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    if (held := _held.get(identity)) is not None:
        os.close(descriptor)
        held.leases += 1
        if purpose == "manager":
            _sign(held.descriptor, purpose)
        return WriterLease(identity, path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        _log.warning(
            "%s cannot be locked (%s), so nothing keeps a second process from writing there.", path, error
        )
        return WriterLease.without_lock()
    _held[identity] = _Held(descriptor, 1)
    _sign(descriptor, purpose)
    return WriterLease(identity, path)


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _sign(descriptor: int, purpose: Purpose) -> None:
    """Say in the lock file who holds it: for people, and for whoever has to decide whether to wait."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "purpose": purpose}
    data = json.dumps(holder).encode()
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    except OSError as error:  # the disk may be full; the lock holds all the same
        _log.warning("The lock file cannot say that process %d holds it: %s", os.getpid(), error)


def _holder(path: Path) -> dict[str, object]:
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {"purpose": "one-shot"}  # it is just being written: look again
    return holder if isinstance(holder, dict) else {}


def _hold_still() -> None:
    # A lock file that is being opened while another thread forks would stay open, and locked, in the child.
    _guard.acquire()


def _go_on() -> None:
    _guard.release()


def _forget_in_child() -> None:
    # Closing does not unlock what the parent holds; unlocking would.
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


os.register_at_fork(before=_hold_still, after_in_parent=_go_on, after_in_child=_forget_in_child)
