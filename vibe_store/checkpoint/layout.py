"""Where things are in a directory of checkpoints: the names, and what a listing of them means."""

import operator
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vibe_store.durable_files import beginning_with, in_folder, sync_path
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Blob, StorageBackend

__all__ = [
    "BEST",
    "MANIFEST",
    "MAX_STEP",
    "METADATA",
    "OWN",
    "PINNED",
    "StepFolder",
    "aside_key",
    "attempt_key",
    "attempt_of",
    "best_link",
    "check_step",
    "folder_of",
    "has_manifest",
    "is_aside",
    "is_local",
    "is_set_aside",
    "is_step_folder",
    "new_attempt",
    "read_best",
    "split_step_folder",
    "step_blobs",
    "step_folders",
    "sweep_unfinished_best",
    "write_best",
]

MANIFEST = "manifest.json"
METADATA = "metadata.json"
PINNED = "pinned"
BEST = "best"
OWN = ".vibe_store"
"""The folder for what is ours but no checkpoint: the writer's lock, staged files, pending attempts."""

MAX_STEP = 10**18 - 1
"""The highest step. A folder with a longer number in its name is none of a step."""

_UNFINISHED_BEST = ".best-"
_SURELY_DEAD_SECS = 60.0
_OF_ATTEMPT = re.compile(r".+\.([0-9]{8}T[0-9]{6}-[0-9a-f]{10})(\.[^.]*)?")
_ASIDE = re.compile(r"manifest\.damaged-[^/]+\.json")
_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_LONGEST_POINTER = 100


@dataclass(frozen=True, slots=True)
class StepFolder:
    """What one ``step_N`` folder holds, as a listing shows it.

    Attributes:
        step: the N.
        status: "committed" where there is a manifest; "set-aside" where a damaged one was renamed;
            "unverified" where there are files that no manifest of ours names.
        pinned: whether retention must leave it alone.
        manifest: the manifest's own listing entry, for a committed one.
    """

    step: int
    status: Literal["committed", "unverified", "set-aside"]
    pinned: bool = False
    manifest: Blob | None = None


def check_step(step: Any) -> int:
    """Return ``step`` as an int, or raise: a step is an int (NumPy's and JAX's count) of 0 or more."""
    try:
        number = None if isinstance(step, bool) else operator.index(step)
    except TypeError:  # which arrays raise that are no whole number
        number = None
    if number is None:
        raise InvalidValueError(
            f"A step is a whole number, 0 or more; got {step!r} of type {type(step).__name__}."
        )
    if number < 0:
        raise InvalidValueError(f"A step is 0 or more; got {number}.")
    if number > MAX_STEP:
        raise InvalidValueError(f"A step is at most {MAX_STEP}; got a number of {number.bit_length()} bits.")
    return number


def folder_of(step: int | None) -> str:
    """Return the prefix of the keys of one step, ending in "/"; "" for a checkpoint without a step."""
    return "" if step is None else f"step_{step}/"


def has_manifest(storage: StorageBackend, step: int | None) -> bool:
    """Whether a checkpoint is there, readable or not."""
    key = f"{folder_of(step)}{MANIFEST}"
    return any(blob.key == key for blob in storage.list(key))


def is_step_folder(name: str) -> bool:
    """Whether a name is ``step_N``."""
    return _STEP.fullmatch(name) is not None


def split_step_folder(directory: str) -> tuple[str, int] | None:
    """Split ``".../step_N"`` into the directory around it and N; None for any other name."""
    head, _, name = directory.rstrip("/").rpartition("/")
    match = _STEP.fullmatch(name)
    if match is None:
        return None
    return (head or ("/" if directory.startswith("/") else ".")), int(match[1])


def new_attempt() -> str:
    """Return an id that no other attempt has, and that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(5)}"


def attempt_key(name: str, attempt: str) -> str:
    """Return the name that an attempt gives to a file whose plain name is taken."""
    head, separator, rest = name.partition("/")
    plain = PurePosixPath(head)
    return f"{plain.stem}.{attempt}{plain.suffix}{separator}{rest}"


def attempt_of(name: str) -> str | None:
    """Return the attempt whose id :func:`attempt_key` put into a name, relative to its step's folder."""
    match = _OF_ATTEMPT.fullmatch(name.partition("/")[0])
    return match[1] if match else None


def is_local(storage: StorageBackend) -> bool:
    """Whether a storage is a local disk, where one process at a time can be made sure to write."""
    return storage.local_path("") is not None


def step_blobs(storage: StorageBackend) -> Iterator[tuple[int, Blob]]:
    """Yield every object in a ``step_N`` folder, with its N."""
    for blob in storage.list("step_"):
        folder, _, name = blob.key.partition("/")
        match = _STEP.fullmatch(folder)
        if match and name:
            yield int(match[1]), blob


def step_folders(storage: StorageBackend, pending: frozenset[str]) -> list[StepFolder]:
    """Return every step folder that holds something a reader may see, by step.

    ``pending`` holds the keys whose fate an attempt has not decided yet: files only of such keys are nothing,
    nor are those whose names have an attempt's id, which nobody but a manifest makes a checkpoint of.
    """
    found: dict[int, dict[str, Blob]] = {}
    for step, blob in step_blobs(storage):
        found.setdefault(step, {})[blob.key.partition("/")[2]] = blob
    folders = []
    for step, blobs in sorted(found.items()):
        pinned = PINNED in blobs
        if MANIFEST in blobs:
            folders.append(StepFolder(step, "committed", pinned, blobs[MANIFEST]))
        elif any(is_aside(name) for name in blobs):
            folders.append(StepFolder(step, "set-aside", pinned))
        elif any(_is_by_hand(name, f"{folder_of(step)}{name}", pending) for name in blobs):
            folders.append(StepFolder(step, "unverified", pinned))
    return folders


def _is_by_hand(name: str, key: str, pending: frozenset[str]) -> bool:
    return name != PINNED and key not in pending and attempt_of(name) is None


def aside_key(step: int, attempt: str) -> str:
    """Return the name under which a damaged manifest is kept."""
    return f"{folder_of(step)}manifest.damaged-{attempt}.json"


def is_aside(name: str) -> bool:
    """Whether a name, relative to its step's folder, is one that :func:`aside_key` made."""
    return _ASIDE.fullmatch(name) is not None


def is_set_aside(storage: StorageBackend, folder: str) -> bool:
    """Whether a folder, whose prefix ends in "/", keeps a damaged manifest under another name."""
    return any(is_aside(blob.key.removeprefix(folder)) for blob in storage.list(f"{folder}manifest."))


def best_link(storage: StorageBackend) -> Path | None:
    """Return where the link ``best`` is, wherever it leads; None where the storage is no local disk."""
    root = storage.local_path("")
    return None if root is None else root / BEST


def read_best(storage: StorageBackend) -> int | None:
    """Return the step that ``best`` points to, committed or not; None where there is no ``best``.

    On a local disk ``best`` is a symbolic link to ``step_N``, elsewhere an object that holds that name.
    """
    local = best_link(storage)
    try:
        name = str(local.readlink()) if local else _pointer(storage)
    except FileNotFoundError:
        return None
    except OSError:
        if local and local.exists():
            raise InvalidValueError(
                f"{local} is no symbolic link, so it cannot say which step is best. Move it away."
            ) from None
        raise
    match = _STEP.fullmatch(name.rstrip("/"))
    if match is None:
        raise InvalidValueError(
            f"`best` in {storage.url} points to {name!r}, which is no step_N beside it. "
            "Remove it, or mark another step."
        )
    return int(match[1])


def _pointer(storage: StorageBackend) -> str:
    return storage.read(BEST, 0, _LONGEST_POINTER).decode("utf-8", "replace").strip()


def write_best(storage: StorageBackend, step: int) -> None:
    """Point ``best`` to a step, at once, whole and durably: a reader sees the old target or the new one."""
    local, target = best_link(storage), f"step_{step}"
    if local is None:
        storage.write(BEST, f"{target}\n".encode())
        return
    if local.exists() and not local.is_symlink():
        raise InvalidValueError(
            f"{local} is no symbolic link and stays as it is. Move it away to mark a best step."
        )
    beside = local.with_name(f"{_UNFINISHED_BEST}{secrets.token_hex(8)}")
    try:
        in_folder(local.parent, lambda: beside.symlink_to(target), sync_path)
        beside.replace(local)
        sync_path(local.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sweep_unfinished_best(root: Path) -> None:
    """Remove the links of processes that died while they marked the best step."""
    for link in beginning_with(_UNFINISHED_BEST, root):
        with suppress(FileNotFoundError):
            if link.is_symlink() and time.time() - link.lstat().st_mtime > _SURELY_DEAD_SECS:
                link.unlink()
