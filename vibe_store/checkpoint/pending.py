"""Attempts under way: which keys have not been decided yet, and how what a dead writer left is swept.

On a local disk, before an attempt (a save, a replacement, a deletion) touches anything, it stores the list of
the keys that it may leave behind. When it is done it removes the list. Whatever a list names and no manifest
does is garbage, however far the attempt got; a reader never sees it, and the next writer removes it.

Elsewhere, where each request takes its time, keys hold the id of their attempt and need no list: such an
object that no manifest names is garbage. Only the deletion of files with plain names (somebody copied a local
directory there, say) is listed first.
"""

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vibe_store.checkpoint.layout import (
    BEST,
    MANIFEST,
    OWN,
    PINNED,
    attempt_of,
    folder_of,
    is_local,
    is_set_aside,
    new_attempt,
    split_step_folder,
)
from vibe_store.checkpoint.manifest import MAX_JSON_BYTES, decode, strict_json
from vibe_store.interfaces import Blob, StorageBackend
from vibe_store.serializers.rows import brief
from vibe_store.storage.keys import is_key

__all__ = [
    "declare",
    "declare_deletion",
    "is_alive",
    "is_list",
    "live_attempt",
    "pending_keys",
    "remove_unnamed",
    "settle",
    "staging_key",
    "sweep",
    "to_be_listed",
]

_log = logging.getLogger("vibe_store")
_PENDING = f"{OWN}/pending-"
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


def to_be_listed(storage: StorageBackend, keys: Iterable[str]) -> list[str]:
    """Return those of the keys that an attempt has to list before it touches them."""
    local = is_local(storage)
    return sorted(key for key in keys if local or attempt_of(_name(key)) is None)


def declare(storage: StorageBackend, attempt: str, keys: Iterable[str]) -> None:
    """Store which keys this attempt may leave behind, before it touches any; none where their names tell."""
    if listed := to_be_listed(storage, keys):
        record = {"attempt": attempt, "keys": listed}
        storage.write(f"{_PENDING}{attempt}.json", json.dumps(record).encode(), durable=False)


def declare_deletion(storage: StorageBackend, attempt: str, keys: Iterable[str]) -> None:
    """Do the same before a deletion, which a full disk must not prevent: it may be what makes room there."""
    try:
        declare(storage, attempt, keys)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _log.warning(
            "%s is full, so what is deleted there could not be listed first: if this process dies on the "
            "way, files of no checkpoint stay in the folders of those steps.",
            storage.url,
        )


def settle(storage: StorageBackend, attempt: str, keys: Iterable[str]) -> None:
    """Remove the list of an attempt that left nothing behind, if these keys had to be listed."""
    if to_be_listed(storage, keys):
        storage.delete([f"{_PENDING}{attempt}.json"], durable=False)


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
            keys.update(_keys(storage.read(blob.key, 0, MAX_JSON_BYTES + 1)))
        except FileNotFoundError:
            continue  # settled meanwhile
        except ValueError as error:
            _log.warning("%s/%s is damaged and passed over: %s", storage.url, blob.key, error)
    return frozenset(keys)


def remove_unnamed(storage: StorageBackend, prefixes: Iterable[str]) -> None:
    """Remove the files of attempts that were committed and are no longer: no manifest names them.

    Such stay where two writers replace or delete a step at one moment: the manifest of one goes before it was
    seen by the other. Only names with the id of an attempt are looked at, and none that one may still commit.
    Each writer does this once its own attempt is settled, so that the last one sees what any has left.
    """
    found = {
        blob.key
        for prefix in prefixes
        for blob in storage.list(prefix)
        if attempt_of(_name(blob.key)) is not None
    }
    # In this order: what is not pending any more is named by now, if it was committed.
    if found and (left := found - pending_keys(storage)) and (garbage := left - _in_use(storage, left)):
        storage.delete(sorted(garbage), durable=False)


def sweep(storage: StorageBackend, *, older_than: float) -> bool:
    """Remove what dead writers left; return whether there was any.

    ``older_than`` is how many seconds ago an attempt of another process must have begun to be called dead; 0
    where the caller has made sure that no other process is writing.

    An attempt whose keys cannot be told from a committed checkpoint's, because a manifest cannot be read, is
    left for later, with a log line. What was set aside stays.
    """
    found = False
    for blob in list(storage.list(_PENDING)):
        attempt = _attempt(blob)
        if is_alive(attempt) or (older_than > 0 and time.time() - blob.modified < older_than):
            continue
        found = True
        try:
            keys = _keys(storage.read(blob.key, 0, MAX_JSON_BYTES + 1))
            garbage = keys - _in_use(storage, keys) - pending_keys(storage, apart_from=attempt)
            storage.delete(sorted(garbage))
            storage.delete([blob.key])
        except (OSError, ValueError) as error:
            _log.warning("What the attempt %s left in %s stays for now: %s", attempt, storage.url, error)
            continue
        _log.info("Swept %d objects that the attempt %s left in %s.", len(garbage), attempt, storage.url)
    root = storage.local_path("")
    if root is not None:
        found |= _sweep_staging(Path(os.path.realpath(root), _STAGING))
    return found


def _sweep_staging(staging: Path) -> bool:
    if not staging.is_dir() or Path(os.path.realpath(staging)) != staging:
        return False  # what a symbolic link leads to was staged by nobody
    found = False
    for path in staging.iterdir():
        if is_alive(path.name):
            continue
        found = True
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


def _keys(data: bytes) -> frozenset[str]:
    record = strict_json(data)
    keys = record.get("keys") if isinstance(record, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it holds no list of keys")
    for key in keys:
        if not _may_be_left(key):
            raise ValueError(f"it names {brief(key)}, which no attempt can have left")
    return frozenset(keys)


def _may_be_left(key: str) -> bool:
    """Whether an attempt can have left an object of this key: none of ours, and no manifest."""
    first, _, rest = key.partition("/")
    is_manifest = MANIFEST in (key, rest if split_step_folder(first) else None)
    return is_key(key) and first not in (OWN, BEST) and not is_manifest


def _in_use(storage: StorageBackend, keys: Iterable[str]) -> frozenset[str]:
    """Return what the manifests beside these keys name; and all of the keys beside one that was set aside."""
    keys = frozenset(keys)
    named: set[str] = set()
    for folder in {_folder(key) for key in keys}:
        if is_set_aside(storage, folder):
            named.update(key for key in keys if _folder(key) == folder)
        try:
            data = storage.read(f"{folder}{MANIFEST}", 0, MAX_JSON_BYTES + 1)
        except FileNotFoundError:
            continue
        manifest = decode(data, where=f"{storage.url}/{folder}{MANIFEST}")
        named.update(f"{folder}{key}" for key in (MANIFEST, PINNED, *(file.key for file in manifest.files)))
    return frozenset(named)


def _attempt(blob: Blob) -> str:
    return blob.key.removeprefix(_PENDING).removesuffix(".json")


def _folder(key: str) -> str:
    head = key.partition("/")[0]
    split = split_step_folder(head)
    return folder_of(split[1] if split else None)


def _name(key: str) -> str:
    """The name of a file relative to its step's folder."""
    return key.removeprefix(_folder(key))


def is_list(key: str) -> bool:
    """Whether a key is that of a list of an attempt."""
    return key.startswith(_PENDING)


def is_alive(attempt: str) -> bool:
    """Whether an attempt is under way in this process."""
    with _alive_lock:
        return attempt in _alive


def _forget_in_child() -> None:
    # A child can only come to write where its parent no longer does: the parent's attempts are dead to it.
    global _alive_lock
    _alive_lock = threading.Lock()
    _alive.clear()


os.register_at_fork(after_in_child=_forget_in_child)
