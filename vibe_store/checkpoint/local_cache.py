"""The newest checkpoints of a bucket on a local disk too, so that a restart need not fetch them."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from vibe_store.checkpoint.commit import Draft, StagedItem, commit, delete_steps
from vibe_store.checkpoint.committed import CommittedSteps
from vibe_store.checkpoint.layout import METADATA, folder_of
from vibe_store.checkpoint.lookup import read_manifest
from vibe_store.checkpoint.manifest import Manifest, same_content
from vibe_store.checkpoint.reading import load_items
from vibe_store.checkpoint.source import check_file
from vibe_store.checkpoint.writer import become_writer
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import PyTree, Serializer, StorageBackend
from vibe_store.storage.local import LocalStorage

__all__ = ["LocalCache"]

_log = logging.getLogger("vibe_store")
_NEWEST = 2


class LocalCache:
    """Copies of the two newest steps of a directory that is elsewhere.

    What cannot be kept or read here is in the bucket all the same, and a line of the log says so.

    Args:
        folder: a local folder, which any number of directories may share.
        of: the directory whose steps are kept.
    """

    def __init__(self, folder: str | os.PathLike[str], of: StorageBackend) -> None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", of.url.rpartition("://")[2]).strip("-")[-80:]
        self._of = of
        self._storage = LocalStorage(
            str(Path(folder) / f"{name}-{xxhash.xxh3_64_hexdigest(of.url.encode())}")
        )

    def keep(self, manifest: Manifest, staging: Path) -> None:
        """Take the staged files of a checkpoint that was just committed, and let go of others.

        What stays are this one and the one before it.
        """
        try:
            lease = become_writer(self._storage, "one-shot")
            try:
                commit(self._storage, _draft(manifest, staging), replace=True)
                committed = CommittedSteps(self._storage).look()
                # Higher ones are of a run before this one, which began again further back.
                reached = [
                    step for step in sorted(committed) if manifest.step is None or step <= manifest.step
                ]
                doomed = committed.keys() - set(reached[-_NEWEST:])
                delete_steps(self._storage, {step: committed[step].keys for step in doomed})
            finally:
                lease.release()
        except (OSError, ValueError) as error:
            _log.warning("Step %s is in %s only: %s", manifest.step, self._of.url, error)

    def load(
        self, step: int, likes: Mapping[str, PyTree], *, partial: bool, serializer: Serializer
    ) -> dict[str, PyTree] | None:
        """Load a step, verified, if it is here and is the one that the directory holds; None where it is not.

        Raises:
            CheckpointNotFoundError: the directory has no such step, or it has no such item.
            TemplateMismatchError: a template and an item differ.
        """
        here = self._manifest(step)
        if here is None or not same_content(here, read_manifest(self._of, step)):
            return None
        try:
            return load_items(self._storage, step, likes, partial=partial, serializer=serializer)
        except CheckpointNotFoundError:
            raise
        except (OSError, CorruptCheckpointError) as error:
            _log.warning("The copy of step %d on this disk is passed over: %s", step, error)
            return None

    def verifies(self, step: int, there: Manifest) -> bool:
        """Whether the checkpoint of this manifest is here too, the same and undamaged."""
        here = self._manifest(step)
        if here is None or not same_content(here, there):
            return False
        try:
            for file in here.files:
                check_file(self._storage, folder_of(step), file)
        except (OSError, CorruptCheckpointError) as error:
            _log.warning("The copy of step %d on this disk is passed over: %s", step, error)
            return False
        return True

    def _manifest(self, step: int) -> Manifest | None:
        try:
            return read_manifest(self._storage, step)
        except (CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError):
            return None


def _draft(manifest: Manifest, staging: Path) -> Draft:
    def stage(folder: Path) -> Iterator[StagedItem]:
        for name, item in manifest.items.items():
            for file in item.files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(staging / file, folder / file)
            yield StagedItem(
                name, item.serializer, tuple(item.entries.values()), item.leaves, item.distribution
            )

    return Draft(
        step=manifest.step,
        stage=stage,
        size=manifest.size,
        created=manifest.created,
        versions=manifest.versions,
        metadata=None if manifest.metadata is None else (staging / METADATA).read_bytes(),
        metrics=manifest.metrics,
    )
