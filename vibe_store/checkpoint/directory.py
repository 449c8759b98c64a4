"""The start of a training run: resume what a directory holds, wipe it, or refuse."""

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal

from vibe_store.checkpoint import pending
from vibe_store.checkpoint.layout import (
    BEST,
    MANIFEST,
    aside_key,
    best_link,
    folder_of,
    is_local,
    new_attempt,
    step_blobs,
    step_folders,
)
from vibe_store.checkpoint.local_cache import LocalCache
from vibe_store.checkpoint.lookup import read_manifest
from vibe_store.checkpoint.manager import CheckpointManager
from vibe_store.checkpoint.manifest import Manifest
from vibe_store.checkpoint.opening import Directory, open_directory
from vibe_store.checkpoint.reading import of_one_manifest, serializer_missing
from vibe_store.checkpoint.source import check_file
from vibe_store.checkpoint.step_index import latest_step, mark_key
from vibe_store.checkpoint.writer import become_writer
from vibe_store.errors import (
    CheckpointNotFoundError,
    CheckpointsExistError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    NewerFormatError,
    UnknownProviderError,
)
from vibe_store.interfaces import RetentionPolicy, Serializer, StorageBackend, Verify
from vibe_store.options import split_options
from vibe_store.registry import get_serializer
from vibe_store.retention import BestFn

__all__ = ["delete_step_folders", "initialize_checkpoint_dir"]


def initialize_checkpoint_dir(
    directory: Directory,
    *,
    keep_period: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_to_keep: int = 5,
    save_interval_steps: int = 1,
    async_timeout_secs: float | None = 7200,
    best_fn: BestFn | None = None,
    best_mode: Literal["min", "max"] = "min",
    serializer: str | Serializer = "eqx",
    retention: str | RetentionPolicy | None = None,
    verify: Verify = "full",
    dead_after_secs: float = 86_400.0,
    local_cache: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[CheckpointManager, bool]:
    """Open a directory for a run that starts now.

    Where there are no checkpoints, the run starts fresh. Where there are, ``resume`` goes on with them,
    ``overwrite`` deletes them, and without either it is an error.

    With ``resume`` the newest checkpoint is verified, as far as ``verify`` says. One that does not verify is
    set aside (its manifest is renamed, nothing is deleted) with a warning, and the one before it is tried, so
    that ``latest_step()`` of the manager then names one that restores. Where ``local_cache`` has a whole copy
    of it, that is verified, and of the files elsewhere only the sizes. With ``overwrite`` every ``step_N``
    folder and ``best`` go; files that are no checkpoints stay.

    In a bucket, or whatever else cannot be locked, this process becomes the writer at once, and the one
    before it stops at its next save.

    The other arguments are those of :class:`~vibe_store.checkpoint.CheckpointManager`.

    Returns:
        The manager, and whether there is a checkpoint to resume from.

    Raises:
        CheckpointsExistError: there are checkpoints, and neither ``resume`` nor ``overwrite`` was given.
        InvalidValueError: both were given, or another argument cannot be used.
        UnknownProviderError: no serializer or retention policy has that name. Where the newest checkpoint was
            written by that serializer, the message says what to install.
        WriterLockedError: another process is writing there, and something has to be changed.
    """
    if resume and overwrite:
        raise InvalidValueError(
            "resume=True goes on with the checkpoints of a directory, overwrite=True deletes them; give one."
        )
    storage = open_directory(directory, storage_options)
    if resume and isinstance(serializer, str):
        serializer = _serializer_to_go_on_with(serializer, storage)
    manager = CheckpointManager(
        storage,
        max_to_keep=max_to_keep,
        keep_period=keep_period,
        save_interval_steps=save_interval_steps,
        async_timeout_secs=async_timeout_secs,
        best_fn=best_fn,
        best_mode=best_mode,
        serializer=serializer,
        retention=retention,
        verify=verify,
        dead_after_secs=dead_after_secs,
        local_cache=local_cache,
    )
    if not (resume or overwrite) and (present := _present(storage)):
        raise CheckpointsExistError(
            f"{storage.url} already holds the steps {present}. Give resume=True to go on from the newest, "
            "overwrite=True to delete them, or another directory."
        )
    if not is_local(storage):
        manager.become_writer()  # before it looks: the writer before it may be alive, and stops now
    if overwrite:
        _wipe(storage)
    if resume:
        cache = None if local_cache is None else LocalCache(local_cache, storage)
        _set_damaged_aside(storage, verify, cache)
        return manager, manager.latest_step() is not None
    return manager, False


def _serializer_to_go_on_with(name: str, storage: StorageBackend) -> Serializer:
    """Return the serializer of this name, or say which distribution had it when the run was saved."""
    try:
        return get_serializer(name)
    except UnknownProviderError as error:
        step = latest_step(storage)
        if step is None:
            raise
        what = f"checkpoint of step {step} in {storage.url}"
        try:
            items = read_manifest(storage, step).items.values()
        except (CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError):
            raise error from None  # what is wrong with that one comes up once there is a serializer
        for item in items:
            if item.serializer == split_options(name)[0]:
                raise serializer_missing(item, what, error) from error
        raise


def delete_step_folders(storage: StorageBackend, choose: Callable[[], Collection[int]]) -> list[int]:
    """Delete everything in ``step_N`` folders, manifests first: no half a checkpoint is ever seen.

    Args:
        storage: the directory.
        choose: looks at it and returns the steps; asked again once no other process writes there.

    Returns:
        The steps that were deleted, sorted.

    Raises:
        WriterLockedError: another process is writing there.
    """
    if not choose():
        return []
    lease = become_writer(storage, "one-shot")
    try:
        doomed = frozenset(choose())
        keys = [blob.key for step, blob in step_blobs(storage) if step in doomed]
        marks = [] if is_local(storage) else [mark_key(step) for step in doomed]
        with pending.live_attempt() as attempt:
            manifests = [key for key in keys if key.partition("/")[2] == MANIFEST]
            pending.declare_deletion(storage, attempt, set(keys) - set(manifests))
            storage.delete(manifests)
            storage.delete([*keys, *marks])
            pending.settle(storage, attempt, keys)
    finally:
        lease.release()
    return sorted(doomed)


def _present(storage: StorageBackend) -> list[int]:
    folders = step_folders(storage, pending.pending_keys(storage))
    return [folder.step for folder in folders if folder.status != "set-aside"]


def _wipe(storage: StorageBackend) -> None:
    delete_step_folders(storage, lambda: {step for step, _ in step_blobs(storage)})
    best = best_link(storage)
    if best is None:
        storage.delete([BEST])
    elif best.is_symlink():
        best.unlink()


def _set_damaged_aside(storage: StorageBackend, verify: Verify, cache: LocalCache | None) -> None:
    """Make the highest listed step one that verifies, by renaming the manifests of those that do not."""
    steps = [folder.step for folder in step_folders(storage, frozenset()) if folder.status == "committed"]
    for step in reversed(steps):
        try:
            of_one_manifest(storage, step, partial(_check_files, storage, step, verify, cache))
        except CheckpointNotFoundError:
            continue  # deleted meanwhile
        except CorruptCheckpointError as error:
            kept = _set_aside(storage, step)
            warnings.warn(
                f"Step {step} in {storage.url} does not verify, so the run resumes from an older one. Its "
                f"files stay where they are, its manifest is now called {kept}. The fault: {error}",
                DamagedCheckpointWarning,
                stacklevel=3,
            )
        else:
            if not is_local(storage):
                storage.write(mark_key(step), b"")  # whoever copied it here by hand may not have
            return


def _check_files(
    storage: StorageBackend, step: int, verify: Verify, cache: LocalCache | None, manifest: Manifest
) -> None:
    if verify == "full" and cache is not None and cache.verifies(step, manifest):
        verify = "sizes"  # restore takes the copy, and what is in the bucket need not be fetched
    for file in manifest.files:
        check_file(storage, folder_of(step), file, verify=verify)


def _set_aside(storage: StorageBackend, step: int) -> str:
    lease = become_writer(storage, "one-shot")
    try:
        manifest, aside = f"{folder_of(step)}{MANIFEST}", aside_key(step, new_attempt())
        storage.write(aside, storage.read(manifest))
        storage.delete([manifest])
    finally:
        lease.release()
    return aside
