"""Attempts under way: which keys have not been decided yet, and how what a dead writer left is swept.

Before an attempt (a save, a replacement, a deletion) touches anything, it stores the list of the keys that it
may leave behind. When it is done it removes the list. Whatever a list names and no manifest does is garbage,
however far the attempt got; a reader never sees it, and the next writer removes it.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vibe_store.checkpoint.layout import (
    MANIFEST,
    OWN,
    folder_of,
    is_set_aside,
    new_attempt,
    split_step_folder,
)
from vibe_store.checkpoint.manifest import decode, strict_json
from vibe_store.interfaces import Blob, StorageBackend

__all__ = ["declare", "live_attempt", "pending_keys", "settle", "staging_key", "sweep"]

_log = logging.getLogger("vibe_store")
_PENDING = f"{OWN}/pending/"
_STAGING = f"{OWN}/staging"

_alive: set[str] = set()
_alive_lock = threading.Lock()


@contextmanager
def live_attempt() -> Iterator[str]:
    """Give a new attempt id, known as alive in this process until the block ends."""
    attempt = new_attempt()
    with _alive_lock:
        _alive.add(attempt)
    try:
        yield attempt
    finally:
        with _alive_lock:
            _alive.discard(attempt)


def declare(storage: StorageBackend, attempt: str, keys: Iterable[str]) -> None:
    """Store which keys this attempt may leave behind, before it touches any."""
    record = {"attempt": attempt, "keys": sorted(keys)}
    storage.write(f"{_PENDING}{attempt}.json", json.dumps(record).encode())


def settle(storage: StorageBackend, attempt: str) -> None:
    """Remove the list of an attempt that left nothing behind."""
    storage.delete([f"{_PENDING}{attempt}.json"])


def staging_key(attempt: str) -> str:
    """Return the key of the folder in which an attempt stages its files on a local disk."""
    return f"{_STAGING}/{attempt}"


def pending_keys(storage: StorageBackend, *, apart_from: str | None = None) -> frozenset[str]:
    """Return every key that some attempt, dead or alive, has not decided yet; one attempt may be left out."""
    keys: set[str] = set()
    for blob in list(storage.list(_PENDING)):
        if _attempt(blob) == apart_from:
            continue
        try:
            keys.update(_keys(storage.read(blob.key)))
        except FileNotFoundError:
            continue  # settled meanwhile
        except ValueError as error:
            _log.warning("%s/%s is damaged and passed over: %s", storage.url, blob.key, error)
    return frozenset(keys)


def sweep(storage: StorageBackend, *, older_than: float) -> None:
    """Remove what dead writers left.

    ``older_than`` is how many seconds ago an attempt of another process must have begun to be called dead; 0
    where the caller has made sure that no other process is writing.

    An attempt whose keys cannot be told from a committed checkpoint's, because a manifest cannot be read, is
    left for later, with a log line. What was set aside stays.
    """
    for blob in list(storage.list(_PENDING)):
        attempt = _attempt(blob)
        if _is_alive(attempt) or (older_than > 0 and time.time() - blob.modified < older_than):
            continue
        try:
            keys = _keys(storage.read(blob.key))
            garbage = keys - _in_use(storage, keys) - pending_keys(storage, apart_from=attempt)
            storage.delete(sorted(garbage))
            storage.delete([blob.key])
        except (OSError, ValueError) as error:
            _log.warning("What the attempt %s left in %s stays for now: %s", attempt, storage.url, error)
            continue
        _log.info("Swept %d objects that the attempt %s left in %s.", len(garbage), attempt, storage.url)
    local = storage.local_path(_STAGING)
    if local is not None and local.is_dir():
        for folder in local.iterdir():
            if not _is_alive(folder.name):
                shutil.rmtree(folder)


def _keys(data: bytes) -> frozenset[str]:
    record = strict_json(data)
    keys = record.get("keys") if isinstance(record, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"the list of a pending attempt reads {record!r}")
    return frozenset(keys)


def _in_use(storage: StorageBackend, keys: Iterable[str]) -> frozenset[str]:
    """Return what the manifests beside these keys name; and all of the keys beside one that was set aside."""
    keys = frozenset(keys)
    named: set[str] = set()
    for folder in {_folder(key) for key in keys}:
        if is_set_aside(storage, folder):
            named.update(key for key in keys if _folder(key) == folder)
        try:
            data = storage.read(f"{folder}{MANIFEST}")
        except FileNotFoundError:
            continue
        manifest = decode(data, where=f"{storage.url}/{folder}{MANIFEST}")
        named.update(f"{folder}{key}" for key in (MANIFEST, *(file.key for file in manifest.files)))
    return frozenset(named)


def _attempt(blob: Blob) -> str:
    return blob.key.removeprefix(_PENDING).removesuffix(".json")


def _folder(key: str) -> str:
    head = key.partition("/")[0]
    split = split_step_folder(head)
    return folder_of(split[1] if split else None)


def _is_alive(attempt: str) -> bool:
    with _alive_lock:
        return attempt in _alive


def _forget_in_child() -> None:
    # A child can only come to write where its parent no longer does: the parent's attempts are dead to it.
    global _alive_lock
    _alive_lock = threading.Lock()
    _alive.clear()


os.register_at_fork(after_in_child=_forget_in_child)
