"""Copying checkpoints from one directory to another, whichever storages these are in.

Imports no JAX: what is copied is files, as their manifest names them.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from vibe_store.checkpoint.commit import Draft, StagedItem, commit
from vibe_store.checkpoint.layout import (
    METADATA,
    PINNED,
    check_step,
    folder_of,
    has_manifest,
    read_best,
    step_folders,
    write_best,
)
from vibe_store.checkpoint.lookup import read_manifest, read_manifests
from vibe_store.checkpoint.manifest import Manifest, StoredFile, same_content
from vibe_store.checkpoint.opening import Directory, locate
from vibe_store.checkpoint.pending import pending_keys
from vibe_store.checkpoint.reading import of_one_manifest
from vibe_store.checkpoint.requests import at_once
from vibe_store.checkpoint.source import open_file
from vibe_store.checkpoint.writer import become_writer
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidValueError,
    NewerFormatError,
    StepAlreadyExistsError,
    VibeStoreError,
)
from vibe_store.interfaces import StorageBackend
from vibe_store.serializers.verifying_reader import CHUNK

__all__ = ["CopiedCheckpoints", "CopyProgress", "copy_checkpoints"]

_log = logging.getLogger("vibe_store")

_Step: TypeAlias = int | None
"""A step, or None for the checkpoint without one."""


@dataclass(frozen=True, slots=True)
class CopiedCheckpoints:
    """What :func:`copy_checkpoints` did; a checkpoint without a step is None among the steps.

    Attributes:
        copied: the steps that were copied.
        skipped: those that were there already, with the same content.
        size: the bytes of all files that were copied.
    """

    copied: tuple[int | None, ...]
    skipped: tuple[int | None, ...]
    size: int


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far :func:`copy_checkpoints` is.

    Attributes:
        step: the step that is under way, or that was just committed.
        copied: how many steps are copied, whole.
        steps: how many are to be copied.
        bytes_read: the bytes that were read so far.
        size: the bytes of all that is to be copied.
    """

    step: int | None
    copied: int
    steps: int
    bytes_read: int
    size: int


def copy_checkpoints(
    source: Directory,
    target: Directory,
    *,
    steps: Iterable[int] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[CopyProgress], None] | None = None,
) -> CopiedCheckpoints:
    """Copy checkpoints into another directory, each verified while it is read, and whole or not at all.

    A copy is what a save there would have written: on a local disk files have their plain names, in a bucket
    names of their own. Time, versions, metrics and metadata stay those of the source; pins go along, and so
    does ``best``, if its step is among those that are copied and ``target`` has no ``best`` yet.

    A step that is there already with the same content is skipped, so a copy that was interrupted goes on
    where it stopped. A step that does not verify is left out, and raised when the others are copied. On a
    local disk ``target`` is locked while it is written; elsewhere a run that writes there is not disturbed,
    and prunes what is copied as if it were its own.

    Args:
        source: a directory of checkpoints, or one step's own folder.
        target: the directory of checkpoints to copy into; it is created.
        steps: which ones; all by default, a checkpoint without a step included.
        storage_options: options of the storage of ``source``, such as credentials.
        target_options: those of the storage of ``target``.
        on_progress: called while files are read and when a step is committed, by one thread at a time, which
            may be another than the caller's. What it raises ends the copy.

    Raises:
        CheckpointNotFoundError: there is nothing to copy, or not one of ``steps``. Nothing is copied then.
        StepAlreadyExistsError: steps are there with another content. Nothing is copied then.
        CorruptCheckpointError: steps do not verify; all others are copied.
        NewerFormatError: only a newer version of this package can read one. Nothing is copied then.
        WriterLockedError: another process is writing to ``target``.
        InvalidValueError: an argument has a value that cannot be used.
        OSError: a storage failed; the steps before are copied, and of this one nothing is seen.
    """
    origin, goal, chosen = _places(source, target, steps, storage_options, target_options)
    pinned = _wanted(origin, chosen)
    plan = _plan(origin, goal, pinned)
    marked = read_best(origin)
    has_best = marked in plan.copy or marked in plan.skip
    marks_best = marked is not None and has_best and read_best(goal) is None
    done = _Done(skipped=list(plan.skip), failures=dict(plan.damaged))
    if plan.copy or plan.pin or marks_best:
        lease = become_writer(goal, "one-shot")
        try:
            meter = _Meter(on_progress, plan.copy)
            for step in plan.copy:
                _copy_one(origin, goal, step, done, meter, required=chosen is not None)
                if pinned[step] and step in done.copied:
                    goal.write(f"{folder_of(step)}{PINNED}", b"")
            for step in plan.pin:
                goal.write(f"{folder_of(step)}{PINNED}", b"")
            there = {*done.copied, *done.skipped}
            if marked is not None and marks_best and marked in there and read_best(goal) is None:
                write_best(goal, marked)
        finally:
            lease.release()
    if done.failures:
        raise _damaged(origin, goal, done.failures)
    return CopiedCheckpoints(tuple(done.copied), tuple(done.skipped), done.size)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done: manifests by step to copy, and steps to skip, to pin, and to complain about."""

    copy: Mapping[_Step, Manifest]
    skip: tuple[_Step, ...]
    pin: tuple[_Step, ...]
    damaged: Mapping[_Step, CorruptCheckpointError]


@dataclass(slots=True)
class _Done:
    """What was done so far."""

    skipped: list[_Step]
    failures: dict[_Step, CorruptCheckpointError]
    copied: list[_Step] = field(default_factory=list)
    size: int = 0


class _Meter:
    """Counts what was read, for whoever wants to know."""

    def __init__(
        self, tell: Callable[[CopyProgress], None] | None, manifests: Mapping[_Step, Manifest]
    ) -> None:
        self._tell, self._steps = tell, len(manifests)
        self._size = sum(manifest.size for manifest in manifests.values())
        self._step: _Step = None
        self._copied = self._before = self._read = 0
        self._lock = threading.Lock()

    def begin(self, step: _Step) -> None:
        """Begin a step, perhaps once more."""
        with self._lock:
            self._step, self._read = step, 0
            self._say()

    def read(self, count: int) -> None:
        with self._lock:
            self._read += count
            self._say()

    def committed(self) -> None:
        with self._lock:
            self._copied, self._before, self._read = self._copied + 1, self._before + self._read, 0
            self._say()

    def _say(self) -> None:
        if self._tell is not None:
            read = self._before + self._read
            self._tell(CopyProgress(self._step, self._copied, self._steps, read, self._size))


def _places(
    source: Directory,
    target: Directory,
    steps: Iterable[int] | None,
    source_options: Mapping[str, Any] | None,
    target_options: Mapping[str, Any] | None,
) -> tuple[StorageBackend, StorageBackend, list[int] | None]:
    """Return both storages, and the steps to copy; None for all."""
    if steps is not None and not isinstance(steps, Iterable):
        raise InvalidValueError(f"steps is a list of steps, or None for all; got {steps!r}.")
    chosen = None if steps is None else sorted({check_step(step) for step in steps})
    origin, only = locate(source, None, source_options)
    goal, inside = locate(target, None, target_options)
    if inside is not None:
        raise InvalidValueError(
            f"The target is the folder of step {inside} in {goal.url}, and each step makes its own folder. "
            "Give the directory around it."
        )
    if only is not None and chosen not in (None, [only]):
        raise InvalidValueError(
            f"The source is the folder of step {only} in {origin.url}, so steps={chosen} cannot be copied "
            "from it. Give the directory around it, or leave out steps."
        )
    return origin, goal, chosen if only is None else [only]


def _wanted(storage: StorageBackend, chosen: Iterable[int] | None) -> dict[_Step, bool]:
    """Return the steps that are to be copied, and whether each is pinned."""
    folders = step_folders(storage, pending_keys(storage))
    committed = [folder.step for folder in folders if folder.status == "committed"]
    pinned: dict[_Step, bool] = {folder.step: folder.pinned for folder in folders}
    if chosen is not None:
        if missing := set(chosen) - set(committed):
            raise CheckpointNotFoundError(
                f"There is no committed checkpoint of step {_listed(missing)} in {storage.url}; committed "
                f"are: {_listed(committed) or 'none'}."
            )
        return {step: pinned[step] for step in chosen}
    unverified = [folder.step for folder in folders if folder.status == "unverified"]
    if unverified:
        _log.warning(
            "Step %s in %s has no manifest, and is not copied. Load it and save it to have one.",
            _listed(unverified),
            storage.url,
        )
    wanted: list[_Step] = [None] if has_manifest(storage, None) else []
    wanted += committed
    if not wanted:
        raise CheckpointNotFoundError(f"There is no committed checkpoint in {storage.url}.")
    return {step: pinned.get(step, False) for step in wanted}


def _plan(origin: StorageBackend, goal: StorageBackend, pinned: Mapping[_Step, bool]) -> _Plan:
    """Compare manifests, or raise what stands against copying."""
    there = {
        folder.step: folder for folder in step_folders(goal, frozenset()) if folder.status == "committed"
    }
    common: list[_Step] = [step for step in pinned if step in there]
    if None in pinned and has_manifest(goal, None):
        common.append(None)
    old, copy = read_manifests(goal, common), dict[_Step, Manifest]()
    skip, differing, damaged = list[_Step](), list[_Step](), dict[_Step, CorruptCheckpointError]()
    for step, manifest in read_manifests(origin, list(pinned)).items():
        if isinstance(manifest, NewerFormatError):
            raise manifest
        if isinstance(manifest, CorruptCheckpointError):
            damaged[step] = manifest
        elif (other := old.get(step)) is None:
            copy[step] = manifest
        elif isinstance(other, Manifest) and same_content(manifest, other):
            skip.append(step)
        else:
            differing.append(step)
    if differing:
        raise StepAlreadyExistsError(
            f"{goal.url} already holds {_named(differing)}, with another content than {origin.url}. Nothing "
            "was copied. Copy into another directory, or choose other steps."
        )
    pin = tuple(step for step in skip if step is not None and pinned[step] and not there[step].pinned)
    return _Plan(copy, tuple(skip), pin, damaged)


def _copy_one(
    origin: StorageBackend, goal: StorageBackend, step: _Step, done: _Done, meter: _Meter, *, required: bool
) -> None:
    def copy(manifest: Manifest) -> Manifest | None:
        meter.begin(step)
        try:
            return commit(goal, _draft(origin, manifest, meter), replace=False)
        except StepAlreadyExistsError:
            # Another process was faster, with the same checkpoint perhaps.
            if same_content(manifest, read_manifest(goal, step)):
                return None
            raise

    try:
        manifest = of_one_manifest(origin, step, copy)
    except CorruptCheckpointError as error:
        done.failures[step] = error
    except CheckpointNotFoundError as error:
        if required:
            raise
        _log.warning("What was deleted meanwhile is not copied: %s", error)
    except OSError as error:
        if isinstance(error, VibeStoreError) or error.errno is None:
            raise
        message = f"Could not copy {_named([step])} from {origin.url} to {goal.url}: "
        raise OSError(error.errno, message + (error.strerror or str(error)), error.filename) from error
    else:
        (done.skipped if manifest is None else done.copied).append(step)
        done.size += 0 if manifest is None else manifest.size
        meter.committed()


def _draft(origin: StorageBackend, manifest: Manifest, meter: _Meter) -> Draft:
    """Return the draft of a checkpoint whose files are fetched, verified, when they are committed."""
    folder = folder_of(manifest.step)
    names = [name for item in manifest.items.values() for name in item.files]
    names += [METADATA] if manifest.metadata else []
    if len(set(names)) < len(names):
        raise CorruptCheckpointError(f"The manifest of {origin.url}/{folder} gives one name to two files.")

    def fetch(staging: Path, files: Mapping[str, StoredFile], name: str) -> None:
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as stream:
            for chunk in _chunks(origin, folder, files[name], meter):
                stream.write(chunk)

    def stage(staging: Path) -> Iterator[StagedItem]:
        for name, item in manifest.items.items():
            at_once(origin, partial(fetch, staging, item.files), item.files)
            yield StagedItem(
                name, item.serializer, tuple(item.entries.values()), item.leaves, item.distribution
            )

    metadata = manifest.metadata
    return Draft(
        step=manifest.step,
        stage=stage,
        size=manifest.size,
        created=manifest.created,
        versions=manifest.versions,
        metadata=None if metadata is None else b"".join(_chunks(origin, folder, metadata, meter)),
        metrics=manifest.metrics,
    )


def _chunks(origin: StorageBackend, folder: str, file: StoredFile, meter: _Meter) -> Iterator[bytes]:
    """Yield the bytes of a file; the last ones only if all of them are those that were written."""
    with open_file(origin, folder, file, verify="full") as stream:
        while chunk := stream.read(CHUNK):
            meter.read(len(chunk))
            yield chunk


def _damaged(
    origin: StorageBackend, goal: StorageBackend, failures: Mapping[_Step, CorruptCheckpointError]
) -> CorruptCheckpointError:
    reasons = " ".join(map(str, failures.values()))
    error = CorruptCheckpointError(
        f"{_named(failures)} in {origin.url} does not verify and was not copied to {goal.url}; everything "
        f"else was. {reasons}"
    )
    error.__cause__ = next(iter(failures.values()))
    return error


def _named(steps: Iterable[_Step]) -> str:
    """Return ``"step 3, 4"``, or what else the steps are, for a sentence."""
    numbers = [step for step in steps if step is not None]
    alone = "a checkpoint without a step" if None in list(steps) else ""
    return " and ".join(part for part in (alone, f"step {_listed(numbers)}" if numbers else "") if part)


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps)))
