"""Sweeping a directory that cannot be locked: what no manifest names, once nobody can be writing it."""

import logging
import time
from dataclasses import dataclass, field
from functools import partial

from vibe_store.checkpoint.layout import (
    MANIFEST,
    PINNED,
    attempt_of,
    folder_of,
    is_aside,
    split_step_folder,
)
from vibe_store.checkpoint.manifest import MAX_JSON_BYTES, decode
from vibe_store.checkpoint.pending import is_alive, is_list, sweep
from vibe_store.checkpoint.requests import at_once
from vibe_store.checkpoint.step_index import INDEX, mark_key, marked_step
from vibe_store.checkpoint.writer_id import WRITER
from vibe_store.interfaces import Blob, StorageBackend

__all__ = ["sweep_unnamed"]

_log = logging.getLogger("vibe_store")


@dataclass
class _Folder:
    """What one checkpoint's folder holds: objects by name."""

    step: int | None
    blobs: dict[str, Blob] = field(default_factory=dict)


def sweep_unnamed(storage: StorageBackend, *, older_than: float, clock: str = WRITER) -> None:
    """Remove what attempts that died left, and mark the steps that have no mark.

    An object that no manifest names is removed when it was written ``older_than`` seconds ago, by the
    storage's own clock, and not by an attempt of this process. One beside a manifest that cannot be read
    stays. ``clock`` is the key of an object that was stored a moment ago, so that its time is what that clock
    shows now.
    """
    blobs = list(storage.list())
    if any(is_list(blob.key) for blob in blobs):
        sweep(storage, older_than=older_than)
    now = next((blob.modified for blob in blobs if blob.key == clock), time.time())
    old = {blob.key for blob in blobs if older_than <= 0 or now - blob.modified >= older_than}
    folders: dict[int | None, _Folder] = {}
    marks: set[int] = set()
    for blob in blobs:
        if blob.key.startswith(INDEX):
            marks.add(-1 if (step := marked_step(blob.key)) is None else step)
            continue
        head, _, rest = blob.key.partition("/")
        split = split_step_folder(head) if rest else None
        step = split[1] if split else None
        folders.setdefault(step, _Folder(step)).blobs[blob.key.removeprefix(folder_of(step))] = blob
    garbage = {key for keys in at_once(storage, partial(_garbage, storage), folders.values()) for key in keys}
    committed = {step for step, folder in folders.items() if MANIFEST in folder.blobs and step is not None}
    garbage |= {mark_key(step) for step in marks - committed - {-1}}
    storage.delete(sorted(garbage & old))
    at_once(storage, lambda step: storage.write(mark_key(step), b""), sorted(committed - marks))
    if garbage & old:
        _log.info("Swept %d objects that dead writers left in %s.", len(garbage & old), storage.url)


def _garbage(storage: StorageBackend, folder: _Folder) -> set[str]:
    """Return the keys of one folder that nobody needs, as far as can be told."""
    prefix, names = folder_of(folder.step), folder.blobs
    attempts = {name: attempt for name in names if (attempt := attempt_of(name)) is not None}
    if any(is_aside(name) for name in names):
        return set()
    if MANIFEST not in names:
        doomed = {name for name, attempt in attempts.items() if not is_alive(attempt)}
        if folder.step is not None and names.keys() - attempts.keys() == {PINNED}:
            doomed.add(PINNED)
        return {f"{prefix}{name}" for name in doomed}
    # Mostly all files are of one attempt, which then is the manifest's.
    if not attempts or (
        len(set(attempts.values())) == 1 and names.keys() - attempts.keys() <= {MANIFEST, PINNED}
    ):
        return set()
    try:
        data = storage.read(f"{prefix}{MANIFEST}", 0, MAX_JSON_BYTES + 1)
        manifest = decode(data, where=f"{storage.url}/{prefix}{MANIFEST}")
    except (OSError, ValueError) as error:
        _log.warning("What may be left over in %s/%s stays for now: %s", storage.url, prefix, error)
        return set()
    named = {file.key for file in manifest.files}
    return {
        f"{prefix}{name}"
        for name, attempt in attempts.items()
        if name not in named and not is_alive(attempt) and attempt != manifest.attempt
    }
