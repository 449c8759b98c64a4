"""Marks by which the highest step is found with a few requests, however many steps there are.

A storage lists keys from the first on, and ``step_9`` comes after ``step_10``. So each save first stores an
empty object whose name counts down from the highest step. Of what is marked, some may never have been
committed, but whatever was committed is marked. What was copied into a directory by hand is marked by its
next writer.
"""

from itertools import islice

from vibe_store.checkpoint.layout import (
    MANIFEST,
    MAX_STEP,
    OWN,
    folder_of,
    has_manifest,
    is_local,
    step_blobs,
    step_folders,
)
from vibe_store.interfaces import StorageBackend

__all__ = ["INDEX", "committed_steps", "latest_step", "mark_key", "marked_step"]

INDEX = f"{OWN}/steps/"
_PAGE = 1000


def mark_key(step: int) -> str:
    """Return the key of the mark of a step."""
    return f"{INDEX}{MAX_STEP - step:018d}"


def marked_step(key: str) -> int | None:
    """Return the step that a key marks, None where it is no mark."""
    digits = key.removeprefix(INDEX)
    return MAX_STEP - int(digits) if len(digits) == 18 and digits.isascii() and digits.isdigit() else None


def committed_steps(storage: StorageBackend) -> list[int]:
    """Return every committed step, by listing all of them."""
    return [folder.step for folder in step_folders(storage, frozenset()) if folder.status == "committed"]


def latest_step(storage: StorageBackend) -> int | None:
    """Return the highest committed step, None where there is none.

    One page of a listing mostly holds all there is. Where it does not, the marks are listed from the highest
    step on, and the first of them that has a manifest is the one.
    """
    if is_local(storage):
        return max(committed_steps(storage), default=None)
    page = list(islice(step_blobs(storage), _PAGE))
    highest = max((step for step, blob in page if blob.key == f"{folder_of(step)}{MANIFEST}"), default=-1)
    if len(page) < _PAGE:
        return None if highest < 0 else highest
    for blob in storage.list(INDEX):
        step = marked_step(blob.key)
        if step is None:
            continue
        if step <= highest:
            return highest
        if has_manifest(storage, step):
            return step
    return max(committed_steps(storage), default=None)
