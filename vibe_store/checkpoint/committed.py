"""What is committed in a directory, as a manager knows it from one look to the next."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vibe_store.checkpoint.layout import StepFolder, folder_of, step_folders
from vibe_store.checkpoint.lookup import info_of, read_manifests
from vibe_store.checkpoint.manifest import Manifest
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
        self._unread: StepFolder | None = None

    def surely_lacks(self, step: int) -> bool:
        """Whether the last look, if there was one, did not show this step."""
        return bool(self._known) and step not in self._known

    def look(self, *, just_written: Manifest | None = None) -> Mapping[int, CommittedStep]:
        """List the directory, and return every committed step that can be read.

        A step whose manifest is damaged, or of a newer format, is left out with a log line: it is neither
        ranked nor deleted.

        Args:
            just_written: a manifest that need not be read this time. (Next time it is, unless :meth:`confirm`
                was called, since what the listing shows may be another's, who has replaced it.)
        """
        self._unread = None
        folders = [f for f in step_folders(self._storage, frozenset()) if f.manifest is not None]
        written = None if just_written is None else just_written.step
        changed = [
            folder.step
            for folder in folders
            if folder.step != written and not self._is_known(folder.step, folder.manifest)
        ]
        manifests = read_manifests(self._storage, changed)
        found = {}
        for folder in folders:
            if just_written is not None and folder.step == written:
                known, self._unread = _record(None, just_written, pinned=folder.pinned), folder
            elif folder.step not in changed:
                known = self._known[folder.step]
                if known.info.pinned != folder.pinned:
                    known = replace(known, info=replace(known.info, pinned=folder.pinned))
            elif (manifest := manifests.get(folder.step)) is None:
                continue  # deleted meanwhile
            elif isinstance(manifest, Exception):
                _log.warning("Step %d is left alone: %s", folder.step, manifest)
                continue
            else:
                known = _record(folder.manifest, manifest, pinned=folder.pinned)
            found[folder.step] = known
        self._known = found
        return found

    def confirm(self) -> None:
        """Read the manifest that the last look did not, so that the next one need not."""
        folder = self._unread
        if folder is not None and (manifest := read_manifests(self._storage, [folder.step]).get(folder.step)):
            if isinstance(manifest, Manifest):
                self._known[folder.step] = _record(folder.manifest, manifest, pinned=folder.pinned)
            self._unread = None

    def _is_known(self, step: int, manifest: Blob | None) -> bool:
        known = self._known.get(step)
        return known is not None and known.manifest is not None and known.manifest == manifest


def _record(blob: Blob | None, manifest: Manifest, *, pinned: bool) -> CommittedStep:
    folder = folder_of(manifest.step)
    keys = frozenset(f"{folder}{file.key}" for file in manifest.files)
    return CommittedStep(info_of(manifest, pinned=pinned), keys, blob)
