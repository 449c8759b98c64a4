"""Deleting the checkpoints that a retention policy gives up, outside a training run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from vibe_store.checkpoint.arguments import check_positive
from vibe_store.checkpoint.commit import delete_steps
from vibe_store.checkpoint.committed import CommittedSteps
from vibe_store.checkpoint.layout import OWN, is_local, read_best
from vibe_store.checkpoint.opening import Directory, open_directory
from vibe_store.checkpoint.settings import check_seconds
from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.checkpoint.writer import become_writer
from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo, RetentionPolicy, StorageBackend
from vibe_store.retention import BestFn, best, keep_period_steps, steps_to_delete

__all__ = ["PrunedCheckpoints", "doomed_steps", "prune_checkpoints"]

_CLOCK = f"{OWN}/clock"


@dataclass(frozen=True, slots=True)
class PrunedCheckpoints:
    """What :func:`prune_checkpoints` did, or with ``dry_run`` would have done.

    Attributes:
        deleted: the checkpoints that went, by step.
        kept: those that stay, by step.
    """

    deleted: tuple[CheckpointInfo, ...]
    kept: tuple[CheckpointInfo, ...]


def prune_checkpoints(
    directory: Directory,
    retention: RetentionPolicy,
    *,
    keep_period: int | None = None,
    best_metric: str | None = None,
    best_mode: Literal["min", "max"] | None = None,
    dry_run: bool = False,
    dead_after_secs: float = 86_400.0,
    storage_options: Mapping[str, Any] | None = None,
) -> PrunedCheckpoints:
    """Delete what a retention policy gives up, and what writers that died left behind.

    As with a manager, the highest step, the target of ``best``, pinned steps, those of ``keep_period`` and
    the best one by ``best_metric`` stay whatever the policy says; so does a step whose manifest cannot be
    read. A local directory is locked meanwhile; anywhere else a run that writes there is not disturbed: of
    each step the manifest goes first, so that nobody sees half of one.

    Args:
        directory: a directory of checkpoints.
        retention: the policy, such as ``latest(5)`` of :mod:`vibe_store.retention`.
        keep_period: keep every step that is a multiple of this; 0 is one.
        best_metric: keep the checkpoint that is best by this metric, the earliest of equals.
        best_mode: whether the lowest ("min") or the highest ("max") metric is best.
        dry_run: change nothing, and return what would be deleted.
        dead_after_secs: where the directory cannot be locked (in a bucket, say), how old an object has to be
            that no checkpoint names for it to be swept as a dead writer's. It has to be longer than any save
            takes.
        storage_options: options of the storage, such as credentials.

    Raises:
        InvalidValueError: an argument has a value that cannot be used, or no checkpoint has this metric.
            Nothing is deleted then.
        WriterLockedError: another process is writing to a local directory.
    """
    period = None if keep_period is None else check_positive("keep_period", keep_period)
    dead_after_secs = check_seconds("dead_after_secs", dead_after_secs)
    ranking = _ranking(best_metric, best_mode)
    storage = open_directory(directory, storage_options)

    def decide() -> tuple[PrunedCheckpoints, dict[int, frozenset[str]]]:
        committed = CommittedSteps(storage).look()
        infos = [each.info for each in committed.values()]
        if ranking is not None and infos and best(infos, *ranking) is None:
            raise InvalidValueError(
                f"No checkpoint in {storage.url} has a number for the metric {best_metric!r}, so the best "
                f"one could not be kept. {_metrics_of(infos)} Nothing was deleted."
            )
        doomed = doomed_steps(
            infos, retention, keep_period=period, ranking=ranking, protected=[read_best(storage)]
        )
        gone = tuple(committed[step].info for step in doomed)
        kept = tuple(info for info in infos if info.step not in doomed)
        return PrunedCheckpoints(gone, kept), {step: committed[step].keys for step in doomed}

    decided, doomed = decide()
    # What an attempt on a local disk may leave is listed in our own folder, elsewhere its names tell.
    places = f"{OWN}/" if is_local(storage) else ""
    if dry_run or not (decided.deleted or decided.kept or any(True for _ in storage.list(places))):
        return decided
    lease = become_writer(storage, "one-shot")
    try:
        if is_local(storage):
            decided, doomed = decide()  # now that nobody else writes
        delete_steps(storage, doomed)
        if not is_local(storage):
            _sweep(storage, dead_after_secs)
    finally:
        lease.release()
    return decided


def doomed_steps(
    checkpoints: Sequence[CheckpointInfo],
    policy: RetentionPolicy,
    *,
    keep_period: int | None,
    ranking: tuple[BestFn, Literal["min", "max"]] | None,
    protected: Iterable[int | None],
) -> list[int]:
    """Return the steps to delete, sorted: what a policy gives up, less all that is protected.

    Protected are ``protected``, the highest step, pinned ones, the multiples of ``keep_period``, and the best
    one by ``ranking``.
    """
    ranked = None if ranking is None else best(checkpoints, *ranking)
    periodic = keep_period_steps([info.step for info in checkpoints if info.step is not None], keep_period)
    return sorted(steps_to_delete(checkpoints, policy, protected={ranked, *protected, *periodic}))


def _ranking(metric: str | None, mode: str | None) -> tuple[BestFn, Literal["min", "max"]] | None:
    if metric is None and mode is None:
        return None
    if metric is None:
        raise InvalidValueError(f"best_mode={mode!r} says how to rank by best_metric, so give that too.")
    if mode == "min":
        return itemgetter(metric), "min"
    if mode == "max":
        return itemgetter(metric), "max"
    raise InvalidValueError(
        f'With best_metric={metric!r}, best_mode says which is best, "min" or "max"; got {mode!r}.'
    )


def _metrics_of(infos: Iterable[CheckpointInfo]) -> str:
    names = sorted({name for info in infos for name in info.metrics or {}})
    return f"There are: {', '.join(names)}." if names else "None has metrics at all."


def _sweep(storage: StorageBackend, dead_after_secs: float) -> None:
    storage.write(_CLOCK, b"")
    try:
        sweep_unnamed(storage, older_than=dead_after_secs, clock=_CLOCK)
    finally:
        storage.delete([_CLOCK])
