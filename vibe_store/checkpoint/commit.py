"""The one commit protocol: files first, under names that nothing uses, then the manifest, at once and whole.

A checkpoint exists if and only if its manifest does. Replacing one is a new manifest that names new files;
the old files go afterwards. Deleting one is its manifest first, its files after.

On a local disk, where one process at a time writes, files have their plain names when these are free, and
what an
attempt may leave behind is listed first. Elsewhere each file has the id of its attempt in its name: no two
writers ever store the same one, nothing has to be looked up before, and files go up while others are still
made.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import xxhash

from vibe_store.checkpoint import pending
from vibe_store.checkpoint.layout import (
    MANIFEST,
    METADATA,
    PINNED,
    attempt_key,
    folder_of,
    has_manifest,
    is_local,
)
from vibe_store.checkpoint.lookup import read_manifest
from vibe_store.checkpoint.manifest import Distribution, ItemRecord, Manifest, StoredFile, encode
from vibe_store.checkpoint.requests import Requests
from vibe_store.checkpoint.staging import staged
from vibe_store.checkpoint.step_index import mark_key
from vibe_store.deadline import within
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NewerFormatError,
    StepAlreadyExistsError,
)
from vibe_store.interfaces import FileEntry, Leaf, StorageBackend

__all__ = ["Draft", "StagedItem", "commit", "delete_steps"]

_log = logging.getLogger("vibe_store")
_STAYS = "What the attempt %s left in %s stays for now: %s"
_TO_TIDY_SECS = 2.0


@dataclass(frozen=True, slots=True)
class StagedItem:
    """One item whose files are complete in the staging folder."""

    name: str
    serializer: str
    files: tuple[FileEntry, ...]
    leaves: tuple[Leaf, ...]
    distribution: Distribution | None


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint that is to be committed.

    Attributes:
        step: its step; None for one without a step.
        stage: writes the files of one item after another into a folder.
        size: about how many bytes they are.
        created: the time that its manifest will say.
        versions: those of the packages that made it.
        metadata: as JSON.
        metrics: numbers to rank it by.
    """

    step: int | None
    stage: Callable[[Path], Iterator[StagedItem]]
    size: int
    created: datetime
    versions: Mapping[str, str]
    metadata: bytes | None
    metrics: Mapping[str, float] | None


def commit(
    storage: StorageBackend,
    draft: Draft,
    *,
    replace: bool,
    check: Callable[[], None] = lambda: None,
    keep: Callable[[Manifest, Path], None] | None = None,
) -> Manifest:
    """Store one checkpoint, whole or not at all, and return its manifest.

    Args:
        storage: the directory.
        draft: what to store.
        replace: whether it may take the place of one that is there.
        check: called just before the manifest is stored; what it raises prevents that.
        keep: called with the manifest and the staging folder when all is committed, unless on a local disk.

    Raises:
        InvalidValueError: no reader would take its manifest; nothing of it is committed.
        StepAlreadyExistsError: there is one, and ``replace`` is False.
        OSError: the storage failed; what was there before is there still, and nothing of the new one is seen.
    """
    if is_local(storage):
        return _commit_on_disk(storage, draft, replace=replace)
    return _commit_elsewhere(storage, draft, replace=replace, check=check, keep=keep)


def delete_steps(storage: StorageBackend, doomed: Mapping[int, Set[str]]) -> None:
    """Delete committed steps, each with the keys of its files: the manifests first, the files after."""
    if not doomed:
        return
    first = {f"{folder_of(step)}{MANIFEST}" for step in doomed}
    files = {key for keys in doomed.values() for key in keys}
    pins = {f"{folder_of(step)}{PINNED}" for step in doomed}
    local = is_local(storage)
    if local:
        files |= pins
    else:
        # A pin alone is swept; listing them first would take more requests than the rest.
        first |= pins | {mark_key(step) for step in doomed}
    with pending.live_attempt() as attempt:
        pending.declare_deletion(storage, attempt, files)
        storage.delete(sorted(first), durable=False)
        storage.delete(sorted(files), durable=False)
        pending.settle(storage, attempt, files)
        if local:
            pending.remove_unnamed(storage, [folder_of(step) for step in doomed])


def _commit_on_disk(storage: StorageBackend, draft: Draft, *, replace: bool) -> Manifest:
    folder = folder_of(draft.step)
    old_keys = _committed_keys(storage, draft.step, replace=replace)
    with pending.live_attempt() as attempt, staged(storage, attempt, draft.size) as staging:
        items = list(draft.stage(staging))
        metadata = _stage_metadata(staging, draft.metadata)
        names = [file.name for item in items for file in item.files] + ([METADATA] if metadata else [])
        keys = _claim_keys(storage, attempt, folder, names, old_keys)
        manifest = _manifest(draft, attempt, items, metadata, keys)
        new_keys = {f"{folder}{key}" for key in keys.values()}
        try:
            data = encode(manifest)
            for name, key in keys.items():
                storage.put(staging / name, f"{folder}{key}", move=True, durable=False)
            if replace:
                old_keys = _replace_manifest(storage, manifest, data, new_keys, old_keys)
            else:
                _create_manifest(storage, manifest, data)
        except BaseException:
            _undo(storage, draft.step, attempt, new_keys)
            raise
        _clear(storage, manifest, None if old_keys is None else old_keys - new_keys)
    return manifest


def _commit_elsewhere(
    storage: StorageBackend,
    draft: Draft,
    *,
    replace: bool,
    check: Callable[[], None],
    keep: Callable[[Manifest, Path], None] | None,
) -> Manifest:
    folder, keys = folder_of(draft.step), dict[str, str]()
    with pending.live_attempt() as attempt, staged(storage, attempt, draft.size) as staging:
        try:
            items, metadata = _store(storage, draft, attempt, staging, keys)
            manifest = _manifest(draft, attempt, items, metadata, keys)
            data = encode(manifest)
            check()
        except BaseException as error:
            # Whoever pressed Ctrl-C does not wait for a storage that does not answer: what stays is swept.
            with nullcontext() if isinstance(error, Exception) else within(_TO_TIDY_SECS):
                _discard(storage, attempt, [f"{folder}{key}" for key in keys.values()])
            raise
        new_keys, old_keys = {f"{folder}{key}" for key in keys.values()}, None
        try:
            if replace:
                old_keys = _replace_manifest(storage, manifest, data, new_keys, None)
            else:
                _create_manifest(storage, manifest, data)
        except StepAlreadyExistsError:
            _discard(storage, attempt, new_keys)
            raise
        except BaseException as error:
            # A request that failed here may be carried out yet, and name these files: they are swept later.
            _log.warning(_STAYS, attempt, storage.url, error)
            raise
        if keep is not None:
            keep(manifest, staging)
        _clear(storage, manifest, old_keys)
    return manifest


def _store(
    storage: StorageBackend, draft: Draft, attempt: str, staging: Path, keys: dict[str, str]
) -> tuple[list[StagedItem], tuple[int, str] | None]:
    """Put each file as soon as its item is staged; fill in under which key.

    It stays in the folder: a serializer may look there for what it wrote with another item.
    """
    folder, items = folder_of(draft.step), []
    with Requests[None](storage) as requests:

        def put(name: str) -> None:
            keys[name] = attempt_key(name, attempt)
            requests.begin(storage.put, staging / name, f"{folder}{keys[name]}")

        metadata = _stage_metadata(staging, draft.metadata)
        if metadata is not None:
            put(METADATA)
        for item in draft.stage(staging):
            items.append(item)
            if draft.step is not None and len(items) == 1:
                requests.begin(storage.write, mark_key(draft.step), b"")
            for file in item.files:
                put(file.name)
    return items, metadata


def _manifest(
    draft: Draft,
    attempt: str,
    items: Iterable[StagedItem],
    metadata: tuple[int, str] | None,
    keys: Mapping[str, str],
) -> Manifest:
    return Manifest(
        step=draft.step,
        attempt=attempt,
        created=draft.created,
        versions=draft.versions,
        items={item.name: _record(item, keys) for item in items},
        metadata=None if metadata is None else StoredFile(keys[METADATA], *metadata),
        metrics=draft.metrics,
    )


def _committed_keys(storage: StorageBackend, step: int | None, *, replace: bool) -> frozenset[str] | None:
    """Return what the manifest of this step names, None where there is none; or raise where it must stay.

    A damaged manifest is no reason to refuse a replacement: what it named cannot be known, and stays.
    """
    folder = folder_of(step)
    if is_local(storage) and not has_manifest(storage, step):
        return None  # an error that is raised and caught would keep what is being saved in memory for a while
    try:
        manifest = read_manifest(storage, step)
    except CheckpointNotFoundError:
        return None
    except CorruptCheckpointError:
        if not replace:
            raise _already_exists(storage, step) from None
        return frozenset()
    if not replace:
        raise _already_exists(storage, step)
    return frozenset(f"{folder}{file.key}" for file in manifest.files)


def _already_exists(storage: StorageBackend, step: int | None) -> StepAlreadyExistsError:
    what = "A checkpoint" if step is None else f"A checkpoint of step {step}"
    return StepAlreadyExistsError(
        f"{what} is already in {storage.url}. Save another step, or replace it with save_checkpoint()."
    )


def _create_manifest(storage: StorageBackend, manifest: Manifest, data: bytes) -> None:
    key = f"{folder_of(manifest.step)}{MANIFEST}"
    try:
        storage.write(key, data, overwrite=False)
    except FileExistsError:
        # A storage that repeats a request whose answer was lost may find what the first one created.
        try:
            ours = read_manifest(storage, manifest.step).attempt == manifest.attempt
        except (CorruptCheckpointError, NewerFormatError):
            ours = False
        if not ours:
            raise _already_exists(storage, manifest.step) from None


def _replace_manifest(
    storage: StorageBackend,
    manifest: Manifest,
    data: bytes,
    new_keys: Set[str],
    declared: Set[str] | None,
) -> frozenset[str] | None:
    """Put a manifest in the place of the one that is there, if one is; return what that one named.

    Another writer may be faster, so that its files are the old ones now: they are declared too.
    """
    while True:
        old_keys = _committed_keys(storage, manifest.step, replace=True)
        if old_keys and not old_keys <= (declared or frozenset()):
            pending.declare(storage, manifest.attempt, new_keys | old_keys)
            declared = old_keys
        if old_keys is not None:
            storage.write(f"{folder_of(manifest.step)}{MANIFEST}", data)
            return old_keys
        with suppress(StepAlreadyExistsError):
            _create_manifest(storage, manifest, data)
            return None


def _clear(storage: StorageBackend, manifest: Manifest, old_keys: Set[str] | None) -> None:
    """Remove what a commit has replaced; a failure is no failure of the save, which is committed."""
    try:
        if old_keys is not None:
            storage.delete(sorted(old_keys), durable=False)
        keys = {f"{folder_of(manifest.step)}{file.key}" for file in manifest.files}
        pending.settle(storage, manifest.attempt, keys | (old_keys or frozenset()))
        if old_keys is not None and is_local(storage):
            folder = folder_of(manifest.step)
            beside = {f"{key.partition('/')[0].partition('.')[0]}." for key in keys | old_keys}
            pending.remove_unnamed(storage, [folder] if folder else sorted(beside))
    except Exception as error:  # noqa: BLE001 - whatever it is, the next writer sweeps what stays
        _log.warning(
            "What the attempt %s replaced in %s stays for now: %s", manifest.attempt, storage.url, error
        )


def _undo(storage: StorageBackend, step: int | None, attempt: str, keys: Set[str]) -> None:
    """After a failure, remove what the attempt stored, unless its manifest may be there.

    A failed request may have been carried out all the same, so the storage is asked. Where it does not
    answer, everything stays as it is: the list of pending keys lets a later writer decide.
    """
    try:
        try:
            committed = read_manifest(storage, step).attempt == attempt
        except CheckpointNotFoundError:
            committed = False
        if not committed:
            storage.delete(sorted(keys))
            pending.settle(storage, attempt, keys)
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to raise
        _log.warning(_STAYS, attempt, storage.url, error)


def _discard(storage: StorageBackend, attempt: str, keys: Iterable[str]) -> None:
    """After a failure, remove what the attempt stored, none of which any manifest names."""
    try:
        storage.delete(sorted(keys))
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to raise
        _log.warning(_STAYS, attempt, storage.url, error)


def _stage_metadata(staging: Path, metadata: bytes | None) -> tuple[int, str] | None:
    if metadata is None:
        return None
    (staging / METADATA).write_bytes(metadata)
    return len(metadata), xxhash.xxh3_128_hexdigest(metadata)


def _claim_keys(
    storage: StorageBackend, attempt: str, folder: str, names: Iterable[str], old_keys: Set[str] | None
) -> dict[str, str]:
    """Declare an attempt, and return a key that nothing uses for each file, relative to the folder.

    Plain names are declared first and looked up after, so that of two attempts that want the same ones at
    least one sees the other and takes names with its id.
    """
    names = tuple(names)
    old_keys = old_keys or frozenset()
    if not old_keys and not _any_taken(storage, folder, names):
        wanted = {f"{folder}{name}" for name in names}
        pending.declare(storage, attempt, wanted)
        others = pending.pending_keys(storage, apart_from=attempt)
        if not wanted & others and not _any_taken(storage, folder, names):
            return {name: name for name in names}
    keys = {name: attempt_key(name, attempt) for name in names}
    pending.declare(storage, attempt, {*(f"{folder}{key}" for key in keys.values()), *old_keys})
    return keys


def _any_taken(storage: StorageBackend, folder: str, names: Iterable[str]) -> bool:
    """Whether any of these files' plain names, or a folder of that name, is in use."""
    heads = {name.partition("/")[0] for name in names}
    listing = (
        storage.list(folder) if folder else (blob for head in sorted(heads) for blob in storage.list(head))
    )
    return any(blob.key.removeprefix(folder).partition("/")[0] in heads for blob in listing)


def _record(item: StagedItem, keys: Mapping[str, str]) -> ItemRecord:
    files = {file.name: StoredFile(keys[file.name], file.size, file.checksum) for file in item.files}
    return ItemRecord(item.serializer, files, item.leaves, item.distribution)
