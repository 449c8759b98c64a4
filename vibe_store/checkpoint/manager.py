"""CheckpointManager: periodic checkpoints of a training run, in the background, with retention."""

import logging
import os
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from vibe_store.checkpoint.arguments import (
    STATE,
    check_items,
    check_json_object,
    check_metrics,
    check_positive,
)
from vibe_store.checkpoint.background import BackgroundSave, failure_of
from vibe_store.checkpoint.commit import commit, delete_steps
from vibe_store.checkpoint.committed import CommittedSteps
from vibe_store.checkpoint.content import Content, draft_of
from vibe_store.checkpoint.layout import PINNED, check_step, folder_of, has_manifest, is_local, read_best
from vibe_store.checkpoint.local_cache import LocalCache
from vibe_store.checkpoint.lookup import info_of, read_manifest
from vibe_store.checkpoint.manifest import Manifest
from vibe_store.checkpoint.opening import Directory, open_directory
from vibe_store.checkpoint.pruning import doomed_steps
from vibe_store.checkpoint.reading import check_verify, load_items, load_metadata_of
from vibe_store.checkpoint.requests import Requests
from vibe_store.checkpoint.settings import (
    check_best_fn,
    check_mode,
    check_rank,
    check_seconds,
    check_timeout,
    policy_of,
    serializer_of,
)
from vibe_store.checkpoint.step_index import committed_steps, latest_step
from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.checkpoint.writer import become_writer
from vibe_store.checkpoint.writer_id import WriterClaim
from vibe_store.checkpoint.writer_lock import WriterLease
from vibe_store.deadline import within
from vibe_store.errors import (
    CheckpointerClosedError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    SaveFailedError,
    StepAlreadyExistsError,
    VibeStoreError,
    WriterSupersededError,
)
from vibe_store.interfaces import (
    Checkpointer,
    CheckpointInfo,
    PyTree,
    RetentionPolicy,
    Serializer,
    StorageBackend,
    Verify,
)
from vibe_store.retention import BestFn, best

__all__ = ["CheckpointManager"]

_log = logging.getLogger("vibe_store")
_LONG_WAIT_SECS = 1.0


class CheckpointManager(Checkpointer):
    """Saves every so many steps, keeps the best and the most recent, and restores.

    A save is decided and copied to the host in the caller's thread and written in the background: the caller
    may donate and change everything at once. What goes wrong in the background is raised, once, by the next
    :meth:`save`, :meth:`wait` or :meth:`close`. (A ``save`` off the interval waits for nothing, so it raises
    only what has gone wrong by then.) The first save asks first whether its step is there already, and raises
    what goes wrong in that itself.

    The directory is created, and locked for this process, by the first save. Reading needs no lock. A manager
    is used from one thread at a time.

    Args:
        directory: a local folder or the URL of one, for all checkpoints of one run; or an open storage.
        max_to_keep: how many of the highest steps to keep.
        keep_period: keep every step that is a multiple of this for ever; 0 is one.
        save_interval_steps: :meth:`save` does something only for multiples of this.
        async_timeout_secs: how long a save in the background, and the question before the first, may take;
            None to save in the caller's thread.
        best_fn: from the metrics that ``save`` was given to the number that ranks a checkpoint. The best one
            is kept whatever its age. Without metrics, without the metric that is looked up (a ``KeyError``)
            or with NaN, a checkpoint is never best. Of equals the earliest is best.
        best_mode: whether the lowest ("min") or the highest ("max") rank is best.
        serializer: the name of a serializer, with options as ``"orbax:compress=true"``; or a serializer.
        retention: the name of a retention policy, with options as ``"every_steps:interval=1000"``, or a
            policy, in place of "the highest ``max_to_keep``"; see :mod:`vibe_store.retention`.
        verify: what :meth:`restore` checks: ``"full"`` (every size and checksum), ``"sizes"``, or ``"off"``.
        dead_after_secs: where the directory cannot be locked (in a bucket, say), how old an object that no
            checkpoint names has to be to be swept as a dead writer's; longer than any save takes.
        local_cache: a local folder in which the two newest steps of a directory that is elsewhere are kept as
            well. :meth:`restore` then fetches a step only where the copy is not the same or does not verify.
        storage_options: options of the storage, such as credentials.

    Whatever the policy, these are never deleted: the highest step, the best one, the target of ``best``,
    pinned ones, those of ``keep_period``, the one saved last, and the one that was restored, until a higher
    one is committed.

    Raises:
        InvalidValueError: an argument has a value that cannot be used.
        UnknownProviderError: no storage, serializer or retention policy has that name.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        max_to_keep: int = 5,
        keep_period: int | None = None,
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
    ) -> None:
        self._policy = policy_of(retention, max_to_keep)
        self._keep_period = None if keep_period is None else check_positive("keep_period", keep_period)
        self._interval = check_positive("save_interval_steps", save_interval_steps)
        self._timeout = None if async_timeout_secs is None else check_timeout(async_timeout_secs)
        self._background = None if self._timeout is None else BackgroundSave(self._timeout)
        self._best_fn, self._best_mode = check_best_fn(best_fn), check_mode(best_mode)
        self._verify = check_verify(verify)
        self._serializer = serializer_of(serializer)
        self._storage = open_directory(directory, storage_options)
        self._is_local = is_local(self._storage)
        self._dead_after_secs = check_seconds("dead_after_secs", dead_after_secs)
        self._lease: WriterLease | WriterClaim | None = None
        self._swept = self._is_local  # which the lock does
        self._cache = None if local_cache is None else _cache(local_cache, self._storage)
        self._committed = CommittedSteps(self._storage)
        self._restored: int | None = None
        self._last: CheckpointInfo | None = None
        self._snapshots: dict[str, PyTree] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"CheckpointManager({self._storage.url!r})"

    def save(
        self,
        step: int,
        pytree: PyTree,
        *,
        items: Mapping[str, PyTree] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        step = check_step(step)
        self._check_open(f"step {step} cannot be saved")
        if step % self._interval and not force:
            if self._background is not None and self._background.step is None:
                self._background.raise_failure()
            return False
        trees, ranked = check_items(pytree, items), check_metrics(metrics)
        described = None if metadata is None else check_json_object("metadata", metadata)
        if self._best_fn is not None and ranked is not None:
            check_rank(self._best_fn, ranked)
        self._settle_before(step)
        if self._is_local:
            self.become_writer()
        elif self._lease is not None:
            self._lease.check_known()
        if self._has(step):
            raise StepAlreadyExistsError(
                f"A checkpoint of step {step} is already in {self._storage.url}. "
                "Save another step, or replace it with save_checkpoint()."
            )
        if self._background is None:
            self._save_here(step, Content(trees, described, ranked))
            return True
        content = Content(self._snapshot(trees), described, ranked)
        self._background.start(step, lambda: self._write(step, content))
        return True

    def restore(
        self,
        step: int | None,
        like: PyTree = None,
        *,
        items: Mapping[str, PyTree] | None = None,
        partial: bool = False,
    ) -> PyTree:
        likes = check_items(like, items)
        self._settle()
        if step is None:
            step, loaded = self._load_newest(likes, partial=partial)
        else:
            step = check_step(step)
            loaded = self._load(step, likes, partial=partial)
        self._restored = step
        state = loaded.pop(STATE)
        return state if items is None else (state, loaded)

    def info(self, step: int) -> CheckpointInfo:
        step = check_step(step)
        self._settle()
        pinned = any(blob.key == f"{folder_of(step)}{PINNED}" for blob in self._storage.list(folder_of(step)))
        return info_of(read_manifest(self._storage, step), pinned=pinned)

    def metadata(self, step: int) -> dict[str, Any] | None:
        step = check_step(step)
        self._settle()
        return load_metadata_of(self._storage, step)

    def latest_step(self) -> int | None:
        self._settle()
        return latest_step(self._storage)

    def best_step(self) -> int | None:
        self._settle()
        if self._best_fn is None:
            return None
        infos = [each.info for each in self._committed.look().values()]
        return best(infos, self._best_fn, self._best_mode)

    def all_steps(self) -> list[int]:
        self._settle()
        return committed_steps(self._storage)

    @property
    def last_committed(self) -> CheckpointInfo | None:
        return self._last

    def pin(self, step: int) -> None:
        """Keep a committed step, whatever retention says, until :meth:`unpin`.

        Where the directory cannot be locked (in a bucket, say), this disturbs nobody who writes there. A step
        that the writer is just deleting goes all the same.

        Raises:
            CheckpointNotFoundError: there is no such step.
            WriterLockedError: another process is writing to a local directory.
            WriterSupersededError: this manager was the writer, and another process has become it.
            CheckpointerClosedError: :meth:`close` was called.
        """
        self._require(step, "pinned")
        self._storage.write(f"{folder_of(step)}{PINNED}", b"")

    def unpin(self, step: int) -> None:
        """Let retention decide about a step again; it goes at the next save at the earliest.

        As :meth:`pin`, this disturbs nobody who writes to a directory that cannot be locked.

        Raises:
            CheckpointNotFoundError: there is no such step.
            WriterLockedError: another process is writing to a local directory.
            WriterSupersededError: this manager was the writer, and another process has become it.
            CheckpointerClosedError: :meth:`close` was called.
        """
        self._require(step, "unpinned")
        self._storage.delete([f"{folder_of(step)}{PINNED}"])

    def wait(self) -> None:
        self._settle()
        if self._background is not None:
            self._background.raise_failure()

    def close(self) -> None:
        if self._closed:
            return
        self._settle()
        self._closed = True
        self._snapshots.clear()
        if self._lease is not None:
            self._lease.release()
        if self._background is not None:
            self._background.end()
            self._background.raise_failure()

    def _check_open(self, so_what: str) -> None:
        if self._closed:
            raise CheckpointerClosedError(f"{self!r} was closed, so {so_what}. Open another manager.")

    def _settle(self) -> None:
        if self._background is not None:
            self._background.settle()

    def _settle_before(self, step: int) -> None:
        """Wait for the save before this one, say how long that took, and raise what went wrong in it."""
        if self._background is None:
            return
        before, began = self._background.step, time.monotonic()
        self._background.settle()
        if before is not None:
            waited = time.monotonic() - began
            level = logging.WARNING if waited >= _LONG_WAIT_SECS else logging.INFO
            _log.log(level, "The save of step %d waited %.2f s for that of step %d.", step, waited, before)
        self._background.raise_failure()

    def become_writer(self) -> None:
        """Become the writer of the directory now instead of at the first save.

        A local directory is locked and swept. Elsewhere (in a bucket, say) this process puts its id there,
        and the writer before it stops.

        Raises:
            WriterLockedError: another process is writing to a local directory.
            CheckpointerClosedError: :meth:`close` was called.
        """
        self._check_open("it cannot become the writer")
        self._held_lease()

    def _held_lease(self) -> WriterLease | WriterClaim:
        if self._lease is None or not self._lease.valid:
            if self._lease is not None:
                self._lease.release()
            self._lease = become_writer(self._storage, "manager")
            untold = [] if self._background is None else self._background.untold
            weakref.finalize(self, _let_go, self._lease, untold)
        return self._lease

    def _require(self, step: int, what: str) -> None:
        step = check_step(step)
        self._check_open(f"step {step} cannot be {what}")
        self._settle()
        read_manifest(self._storage, step)
        if self._is_local or (self._lease is not None and self._lease.valid):
            self._held_lease().check()
        # Elsewhere it has claimed nothing, and need not: a trainer in another process would stop.

    def _has(self, step: int) -> bool:
        """Whether a step is committed, as far as is known; whoever writes it finds out for certain.

        What the save before this one listed is good enough to say no, and spares the training thread a
        listing. (To say yes it is not: that save may have deleted the step.)

        Raises:
            SaveFailedError: the storage does not say, within ``async_timeout_secs``.
        """
        if self._committed.surely_lacks(step):
            return False
        try:
            with nullcontext() if self._timeout is None else within(self._timeout):
                return has_manifest(self._storage, step)
        except OSError as error:
            raise SaveFailedError(
                f"The save of step {step} was not begun, since the storage does not say whether that step is "
                f"there already: {error} ({type(error).__name__}). Training can go on.",
                step=step,
            ) from error

    def _snapshot(self, trees: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Copy what is to be saved into the memory of the snapshot before, whose save is over."""
        self._snapshots = {
            name: self._serializer.snapshot(tree, reuse=self._snapshots.pop(name, None))
            for name, tree in trees.items()
        }
        return self._snapshots

    def _save_here(self, step: int, content: Content) -> None:
        try:
            self._write(step, content)
        except VibeStoreError:
            raise
        except Exception as error:
            raise failure_of(step, error) from error

    def _write(self, step: int, content: Content) -> None:
        draft = draft_of(step, content, self._serializer)
        keep = None if self._cache is None else self._cache.keep
        try:
            with Requests[object](self._storage) as requests:
                requests.begin(self._held_lease)  # while files are on their way

                def check() -> None:
                    requests.results()
                    self._held_lease().check()

                manifest = commit(self._storage, draft, replace=False, check=check, keep=keep)
        except WriterSupersededError as error:
            raise WriterSupersededError(f"Step {step} was not saved: {error}") from error
        lease = self._held_lease()
        self._last = info_of(manifest, pinned=False)
        try:
            self._prune(manifest, lease)
        except WriterSupersededError as error:
            raise WriterSupersededError(f"Step {step} was saved, and is the last: {error}") from error
        except Exception as error:
            raise SaveFailedError(
                f"Step {step} was saved, but deleting older checkpoints after it failed: {error} "
                f"({type(error).__name__}). Training can go on; it is tried again after the next save.",
                step=step,
            ) from error

    def _prune(self, written: Manifest, lease: WriterLease | WriterClaim) -> None:
        """Delete what retention gives up; nothing at all where the storage cannot be read."""
        try:
            with Requests[Any](self._storage) as requests:
                requests.begin(lambda: self._committed.look(just_written=written))
                requests.begin(read_best, self._storage)
                requests.begin(lease.check)
                if not self._swept:
                    requests.begin(partial(sweep_unnamed, self._storage, older_than=self._dead_after_secs))
                committed, marked, *_ = requests.results()
            self._swept = True
        except (OSError, ValueError) as error:
            _log.warning("No checkpoint in %s is deleted for now: %s", self._storage.url, error)
            return
        infos = [each.info for each in committed.values()]
        last, restored = written.step, self._restored
        if last is not None and restored is not None and last > restored:
            restored = None
        doomed = doomed_steps(
            infos,
            self._policy,
            keep_period=self._keep_period,
            ranking=None if self._best_fn is None else (self._best_fn, self._best_mode),
            protected=[marked, last, restored],
        )
        with Requests[None](self._storage) as requests:
            requests.begin(delete_steps, self._storage, {step: committed[step].keys for step in doomed})
            if not self._is_local:
                requests.begin(self._committed.confirm)

    def _load(self, step: int, likes: Mapping[str, PyTree], *, partial: bool) -> dict[str, PyTree]:
        if self._cache is not None:
            loaded = self._cache.load(step, likes, partial=partial, serializer=self._serializer)
            if loaded is not None:
                return loaded
        return load_items(
            self._storage, step, likes, partial=partial, verify=self._verify, serializer=self._serializer
        )

    def _load_newest(self, likes: Mapping[str, PyTree], *, partial: bool) -> tuple[int, dict[str, PyTree]]:
        damaged: set[int] = set()
        while left := [step for step in self.all_steps() if step not in damaged]:
            step = left[-1]
            try:
                if self._verify == "full":
                    load_metadata_of(self._storage, step)  # damaged, it would only be found when asked for
                return step, self._load(step, likes, partial=partial)
            except CheckpointNotFoundError:
                if step in self.all_steps():
                    raise  # it lacks an item; otherwise another process deleted it meanwhile
            except CorruptCheckpointError as error:
                damaged.add(step)
                warnings.warn(
                    f"Step {step} in {self._storage.url} does not verify and is passed over: {error}",
                    DamagedCheckpointWarning,
                    stacklevel=3,
                )
        if damaged:
            raise CorruptCheckpointError(
                f"None of the steps {sorted(damaged)} in {self._storage.url} verifies."
            )
        raise CheckpointNotFoundError(f"There is no checkpoint in {self._storage.url}.")


def _let_go(lease: WriterLease | WriterClaim, untold: list[str]) -> None:
    """End a manager that nobody can call any more."""
    lease.release()
    for failure in untold:
        _log.error("%s", failure)
    untold.clear()


def _cache(folder: str | os.PathLike[str], of: StorageBackend) -> LocalCache:
    if is_local(of):
        raise InvalidValueError(
            f"local_cache={os.fspath(folder)!r} is of no use where the checkpoints are on a local disk "
            f"already, in {of.url}. Leave it out."
        )
    return LocalCache(folder, of)
