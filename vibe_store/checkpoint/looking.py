"""Looking at checkpoints without loading them: what there is, what one consists of, whether it verifies.

Imports no JAX, so that the command line answers at once.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vibe_store.checkpoint.layout import MANIFEST, folder_of, has_manifest, read_best, step_folders
from vibe_store.checkpoint.lookup import info_of, read_manifest, read_manifests
from vibe_store.checkpoint.manifest import Manifest, StoredFile
from vibe_store.checkpoint.opening import Directory, locate, open_directory
from vibe_store.checkpoint.pending import pending_keys
from vibe_store.checkpoint.reading import check_verify, of_one_manifest
from vibe_store.checkpoint.requests import at_once
from vibe_store.checkpoint.source import check_file
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import CheckpointInfo, StorageBackend, Verify

__all__ = ["CheckpointStatus", "Fault", "list_checkpoints", "load_manifest", "verify_checkpoint"]


Status: TypeAlias = Literal["committed", "damaged", "newer", "unverified", "set-aside"]


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """One step of a directory.

    Attributes:
        step: its number.
        status: "committed"; "damaged" where its manifest cannot be read; "newer" where its manifest has a
            format that only a newer vibe_store reads; "unverified" where there are files that no manifest
            names; "set-aside" where it did not verify when a run resumed.
        info: its record, for a committed one.
        best: whether ``best`` points to it.
    """

    step: int
    status: Status
    info: CheckpointInfo | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that does not hold.

    Attributes:
        step: the step, None for a checkpoint without one.
        file: the key of the object at fault, relative to the directory.
        problem: what is wrong with it, as a sentence.
    """

    step: int | None
    file: str
    problem: str


def list_checkpoints(
    directory: Directory, *, storage_options: Mapping[str, Any] | None = None
) -> list[CheckpointStatus]:
    """Return what each ``step_N`` folder of a directory holds, by step; reads manifests only."""
    storage = open_directory(directory, storage_options)
    best = read_best(storage)
    folders = step_folders(storage, pending_keys(storage))
    manifests = read_manifests(storage, [f.step for f in folders if f.status == "committed"])
    found = []
    for folder in folders:
        status: Status = folder.status
        info, manifest = None, manifests.get(folder.step)
        if isinstance(manifest, Manifest):
            info = info_of(manifest, pinned=folder.pinned)
        elif isinstance(manifest, NewerFormatError):
            status = "newer"
        elif isinstance(manifest, CorruptCheckpointError):
            status = "damaged"
        elif status == "committed":
            continue  # deleted meanwhile
        found.append(CheckpointStatus(folder.step, status, info, best=folder.step == best))
    return found


def load_manifest(
    directory: Directory,
    *,
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of one checkpoint; without ``step``, of the directory itself.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: it is damaged.
    """
    storage, step = locate(directory, step, storage_options)
    return read_manifest(storage, step)


def verify_checkpoint(
    directory: Directory,
    *,
    step: int | None = None,
    level: Verify = "full",
    storage_options: Mapping[str, Any] | None = None,
) -> list[Fault]:
    """Read every byte of one checkpoint, or of all of a directory, and return what does not hold; [] is good.

    Args:
        directory: a directory of checkpoints, or one step's own folder.
        step: one step; without it, every committed step of the directory, and its checkpoint without a step.
        level: ``"sizes"`` looks only whether each file is there with its size, ``"off"`` whether it is there.
        storage_options: options of the storage, such as credentials.

    Raises:
        CheckpointNotFoundError: there is nothing to verify.
    """
    level = check_verify(level)
    storage, step = locate(directory, step, storage_options)
    if step is not None:
        return _faults(storage, step, level)
    steps: list[int | None] = [
        folder.step for folder in step_folders(storage, frozenset()) if folder.status == "committed"
    ]
    if has_manifest(storage, None):
        steps.insert(0, None)
    if not steps:
        raise CheckpointNotFoundError(f"There is no committed checkpoint in {storage.url}.")
    faults = []
    for each in steps:
        with suppress(CheckpointNotFoundError):  # deleted meanwhile
            faults += _faults(storage, each, level)
    return faults


def _faults(storage: StorageBackend, step: int | None, level: Verify) -> list[Fault]:
    folder = folder_of(step)
    faults: list[Fault] = []

    def fault_of(file: StoredFile) -> Fault | None:
        try:
            check_file(storage, folder, file, verify=level)
        except CorruptCheckpointError as error:
            return Fault(step, f"{folder}{file.key}", str(error))
        return None

    def check(manifest: Manifest) -> None:
        faults[:] = [fault for fault in at_once(storage, fault_of, manifest.files) if fault is not None]
        if faults:
            raise CorruptCheckpointError(faults[0].problem)

    try:
        of_one_manifest(storage, step, check)
    except (CorruptCheckpointError, NewerFormatError) as error:
        return faults or [Fault(step, f"{folder}{MANIFEST}", str(error))]
    return []
