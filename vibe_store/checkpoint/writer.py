"""Becoming the writer of a directory: by a lock on a local disk, by the process's id anywhere else."""

from vibe_store.checkpoint import pending
from vibe_store.checkpoint.layout import OWN, sweep_unfinished_best
from vibe_store.checkpoint.writer_id import WriterClaim
from vibe_store.checkpoint.writer_lock import Purpose, WriterLease, acquire_writer_lock
from vibe_store.durable_files import remove_abandoned
from vibe_store.interfaces import StorageBackend

__all__ = ["become_writer"]


def become_writer(storage: StorageBackend, purpose: Purpose) -> WriterLease | WriterClaim:
    """Become the writer of a directory, and on a local disk sweep what dead writers left.

    A local one is locked. Elsewhere a manager puts the id of its process there, and whoever was the writer
    before stops. What is saved there once ("one-shot") needs neither: it disturbs no manager.

    Raises:
        WriterLockedError: another process is writing to a local directory.
    """
    path = storage.local_path(f"{OWN}/writer.lock")
    if path is None:
        claim = WriterClaim(storage)
        if purpose == "manager":
            claim.make()
        return claim
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
