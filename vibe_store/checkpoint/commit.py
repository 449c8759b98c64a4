"""The one commit protocol: files first, under names that nothing uses, then the manifest, at once and whole.

A checkpoint exists if and only if its manifest does. Replacing one is a new manifest that names new files;
the old files go afterwards. Deleting one is its manifest first, its files after.
"""

import functools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

from vibe_store.checkpoint import pending
from vibe_store.checkpoint.layout import MANIFEST, METADATA, PINNED, attempt_key, folder_of
from vibe_store.checkpoint.manifest import MAX_JSON_BYTES, ItemRecord, Manifest, StoredFile, decode, encode
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, StepAlreadyExistsError
from vibe_store.interfaces import CheckpointInfo, PyTree, SavedItem, Serializer, StorageBackend

__all__ = ["Content", "delete_steps", "info_of", "read_manifest", "write_checkpoint"]

_log = logging.getLogger("vibe_store")


@dataclass(frozen=True, slots=True)
class Content:
    """What one save is to store: pytrees (or snapshots of them) by item name, and what goes with them."""

    items: Mapping[str, PyTree]
    metadata: bytes | None = None
    metrics: Mapping[str, float] | None = None


def write_checkpoint(
    storage: StorageBackend, step: int | None, content: Content, serializer: Serializer, *, replace: bool
) -> Manifest:
    """Store one checkpoint, whole or not at all, and return its manifest.

    Raises:
        StepAlreadyExistsError: there is one, and ``replace`` is False.
        OSError: the storage failed; what was there before is there still, and nothing of the new one is seen.
    """
    folder = folder_of(step)
    old_keys = _committed_keys(storage, step, replace=replace)
    with pending.live_attempt() as attempt, _staging(storage, attempt) as staging:
        saved = {name: serializer.save(tree, staging, name) for name, tree in content.items.items()}
        metadata = _stage_metadata(staging, content.metadata)
        names = [file.name for item in saved.values() for file in item.files] + (
            [METADATA] if metadata else []
        )
        keys = _claim_keys(storage, attempt, folder, names, old_keys)
        manifest = Manifest(
            step=step,
            attempt=attempt,
            created=datetime.now(UTC),
            versions=_versions(type(serializer).__module__.partition(".")[0]),
            items={name: _record(item, serializer.name, keys) for name, item in saved.items()},
            metadata=None if metadata is None else StoredFile(keys[METADATA], *metadata),
            metrics=content.metrics,
        )
        new_keys = {f"{folder}{key}" for key in keys.values()}
        try:
            for name, key in keys.items():
                storage.put(staging / name, f"{folder}{key}", move=True, durable=False)
            if replace:
                old_keys = _replace_manifest(storage, manifest, new_keys, old_keys)
            else:
                _create_manifest(storage, manifest)
        except BaseException:
            _undo(storage, attempt, manifest, new_keys)
            raise
        _clear(storage, manifest, None if old_keys is None else old_keys - new_keys)
    return manifest


def delete_steps(storage: StorageBackend, doomed: Mapping[int, Set[str]]) -> None:
    """Delete committed steps, each with the keys of its files: the manifests first, the files after."""
    if not doomed:
        return
    files = {key for step, keys in doomed.items() for key in (*keys, f"{folder_of(step)}{PINNED}")}
    with pending.live_attempt() as attempt:
        pending.declare_deletion(storage, attempt, files)
        storage.delete([f"{folder_of(step)}{MANIFEST}" for step in doomed], durable=False)
        storage.delete(sorted(files), durable=False)
        pending.settle(storage, attempt)
        pending.remove_unnamed(storage, [folder_of(step) for step in doomed])


def read_manifest(storage: StorageBackend, step: int | None) -> Manifest:
    """Read and verify the manifest of one checkpoint.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: it is damaged, or belongs to another step.
        NewerFormatError: a newer version of this package wrote it.
    """
    key = f"{folder_of(step)}{MANIFEST}"
    where = f"{storage.url}/{key}"
    try:
        data = storage.read(key, 0, MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise CheckpointNotFoundError(f"There is no {what} in {storage.url}.") from None
    manifest = decode(data, where=where)
    if step is not None and manifest.step != step:
        raise CorruptCheckpointError(
            f"The manifest {where} says that it is of step {manifest.step}; it was moved or copied there."
        )
    return manifest


def info_of(manifest: Manifest, *, pinned: bool) -> CheckpointInfo:
    """Return what a manifest says, as the record that policies and users see."""
    first = next(iter(manifest.items.values()))
    return CheckpointInfo(
        step=manifest.step,
        created=manifest.created,
        size=manifest.size,
        serializer=first.serializer,
        items=tuple(manifest.items),
        metrics=manifest.metrics,
        pinned=pinned,
    )


def _committed_keys(storage: StorageBackend, step: int | None, *, replace: bool) -> frozenset[str] | None:
    """Return what the manifest of this step names, None where there is none; or raise where it must stay.

    A damaged manifest is no reason to refuse a replacement: what it named cannot be known, and stays.
    """
    folder = folder_of(step)
    if not any(blob.key == f"{folder}{MANIFEST}" for blob in storage.list(f"{folder}{MANIFEST}")):
        return None
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


def _create_manifest(storage: StorageBackend, manifest: Manifest) -> None:
    key = f"{folder_of(manifest.step)}{MANIFEST}"
    try:
        storage.write(key, encode(manifest), overwrite=False)
    except FileExistsError:
        # A storage that repeats a request whose answer was lost may find what the first one created.
        if read_manifest(storage, manifest.step).attempt != manifest.attempt:
            raise _already_exists(storage, manifest.step) from None


def _replace_manifest(
    storage: StorageBackend, manifest: Manifest, new_keys: Set[str], declared: Set[str] | None
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
            storage.write(f"{folder_of(manifest.step)}{MANIFEST}", encode(manifest))
            return old_keys
        with suppress(StepAlreadyExistsError):
            _create_manifest(storage, manifest)
            return None


def _clear(storage: StorageBackend, manifest: Manifest, old_keys: Iterable[str] | None) -> None:
    """Remove what a commit has replaced; a failure is no failure of the save, which is committed."""
    try:
        if old_keys is not None:
            storage.delete(sorted(old_keys), durable=False)
        pending.settle(storage, manifest.attempt)
        if old_keys is not None:
            folder = folder_of(manifest.step)
            pending.remove_unnamed(storage, [folder] if folder else [f"{name}." for name in manifest.items])
    except Exception as error:  # noqa: BLE001 - whatever it is, the next writer sweeps what stays
        _log.warning(
            "What the attempt %s replaced in %s stays for now: %s", manifest.attempt, storage.url, error
        )


def _undo(storage: StorageBackend, attempt: str, manifest: Manifest, keys: Iterable[str]) -> None:
    """After a failure, remove what the attempt stored, unless its manifest may be there.

    A failed request may have been carried out all the same, so the storage is asked. Where it does not
    answer, everything stays as it is: the list of pending keys lets a later writer decide.
    """
    try:
        try:
            committed = read_manifest(storage, manifest.step).attempt == attempt
        except CheckpointNotFoundError:
            committed = False
        if not committed:
            storage.delete(sorted(keys))
            pending.settle(storage, attempt)
    except Exception as error:  # noqa: BLE001 - the failure that led here is the one to raise
        _log.warning("What the attempt %s left in %s stays for now: %s", attempt, storage.url, error)


@contextmanager
def _staging(storage: StorageBackend, attempt: str) -> Iterator[Path]:
    """Give a folder to write files into: beside the storage's own files where it is a local disk."""
    local = storage.local_path(pending.staging_key(attempt))
    if local is None:
        with tempfile.TemporaryDirectory(prefix="vibe_store-") as folder:
            yield Path(folder)
        return
    local.mkdir(parents=True)
    try:
        yield local
    finally:
        shutil.rmtree(local, ignore_errors=True)  # what stays is swept by the next writer


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


def _record(item: SavedItem, serializer: str, keys: Mapping[str, str]) -> ItemRecord:
    files = {file.name: StoredFile(keys[file.name], file.size, file.checksum) for file in item.files}
    return ItemRecord(serializer, files, item.leaves)


@functools.cache
def _versions(package: str) -> dict[str, str]:
    """Return the versions of ours, of JAX and Equinox, and of the package that the serializer is from."""
    versions = {}
    for name in sorted({"vibe-store", "jax", "equinox", package.replace("_", "-")}):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
