"""Reading the manifests of a directory, one or several at once."""

from collections.abc import Iterable
from typing import TypeVar

from vibe_store.checkpoint.layout import MANIFEST, folder_of
from vibe_store.checkpoint.manifest import MAX_JSON_BYTES, Manifest, decode
from vibe_store.checkpoint.requests import at_once
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import CheckpointInfo, StorageBackend

__all__ = ["info_of", "read_manifest", "read_manifests"]

_Step = TypeVar("_Step", int, int | None)


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


def read_manifests(
    storage: StorageBackend, steps: Iterable[_Step]
) -> dict[_Step, Manifest | CorruptCheckpointError | NewerFormatError]:
    """Read the manifests of several steps, or say why one cannot be read; a step that is gone is left out."""

    def read(step: _Step) -> Manifest | CorruptCheckpointError | NewerFormatError | None:
        try:
            return read_manifest(storage, step)
        except CheckpointNotFoundError:
            return None
        except (CorruptCheckpointError, NewerFormatError) as error:
            return error

    listed = list(steps)
    found = zip(listed, at_once(storage, read, listed), strict=True)
    return {step: manifest for step, manifest in found if manifest is not None}


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
