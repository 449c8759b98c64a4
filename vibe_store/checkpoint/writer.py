"""Becoming the writer of a directory: the lock where there is one, then the sweep."""

from typing import Final

from vibe_store.checkpoint import pending
from vibe_store.checkpoint.layout import OWN, sweep_unfinished_best
from vibe_store.checkpoint.writer_lock import Purpose, WriterLease, acquire_writer_lock
from vibe_store.durable_files import remove_abandoned
from vibe_store.interfaces import StorageBackend

__all__ = ["lock_and_sweep"]

_SURELY_DEAD_SECS: Final = 24 * 60 * 60.0


def lock_and_sweep(storage: StorageBackend, purpose: Purpose) -> WriterLease:
    """Lock the directory for this process where it is a local one, and sweep what dead writers left.

    Elsewhere nothing can be locked, so only what nobody has touched for a day is swept.

    Raises:
        WriterLockedError: another process is writing there.
    """
    path = storage.local_path(f"{OWN}/writer.lock")
    if path is None:
        pending.sweep(storage, older_than=_SURELY_DEAD_SECS)
        return WriterLease.without_lock()
    lease = acquire_writer_lock(path, purpose)
    try:
        found = pending.sweep(storage, older_than=0.0)
        remove_abandoned(path.parent)
        sweep_unfinished_best(path.parent.parent)
        # Looking everywhere takes a while where there are many steps, and whoever died in the midst of a save
        # has left a list of it.
        if found or purpose == "manager":
            storage.sweep()
    except BaseException:
        lease.release()
        raise
    return lease
