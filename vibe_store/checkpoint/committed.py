"""What is committed in a directory, as a manager knows it from one look to the next."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vibe_store.checkpoint.commit import info_of, read_manifest
from vibe_store.checkpoint.layout import folder_of, step_folders
from vibe_store.checkpoint.manifest import Manifest
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import Blob, CheckpointInfo, StorageBackend

__all__ = ["CommittedStep", "CommittedSteps"]

_log = logging.getLogger("vibe_store")


@dataclass(frozen=True, slots=True)
class CommittedStep:
    """One committed step.

    Attributes:
        info: its record.
        keys: of the files that its manifest names.
        manifest: the manifest's entry in the listing after which it was read; None where it was not read.
    """

    info: CheckpointInfo
    keys: frozenset[str]
    manifest: Blob | None


class CommittedSteps:
    """The committed steps of a directory; a manifest that did not change is not read again."""

    def __init__(self, storage: StorageBackend) -> None:
        self._storage = storage
        self._known: dict[int, CommittedStep] = {}

    def surely_lacks(self, step: int) -> bool:
        """Whether the last look, if there was one, did not show this step."""
        return bool(self._known) and step not in self._known

    def look(self, *, just_written: Manifest | None = None) -> Mapping[int, CommittedStep]:
        """List the directory, and return every committed step that can be read.

        A step whose manifest is damaged, or of a newer format, is left out with a log line: it is neither
        ranked nor deleted.

        Args:
            just_written: a manifest that need not be read this time. (Next time it is, since what the listing
                shows may be another's, who has replaced it.)
        """
        found = {}
        for folder in step_folders(self._storage, frozenset()):
            if folder.manifest is None:
                continue
            known = self._known.get(folder.step)
            if just_written is not None and folder.step == just_written.step:
                known = _record(None, just_written, pinned=folder.pinned)
            elif known is None or known.manifest != folder.manifest:
                try:
                    manifest = read_manifest(self._storage, folder.step)
                except CheckpointNotFoundError:
                    continue  # deleted meanwhile
                except (CorruptCheckpointError, NewerFormatError) as error:
                    _log.warning("Step %d is left alone: %s", folder.step, error)
                    continue
                known = _record(folder.manifest, manifest, pinned=folder.pinned)
            elif known.info.pinned != folder.pinned:
                known = replace(known, info=replace(known.info, pinned=folder.pinned))
            found[folder.step] = known
        self._known = found
        return found


def _record(blob: Blob | None, manifest: Manifest, *, pinned: bool) -> CommittedStep:
    folder = folder_of(manifest.step)
    keys = frozenset(f"{folder}{file.key}" for file in manifest.files)
    return CommittedStep(info_of(manifest, pinned=pinned), keys, blob)
