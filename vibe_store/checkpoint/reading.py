"""Reading what a manifest names, verified: sizes and checksums on the way, before anything is returned."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar, get_args

from vibe_store.checkpoint.layout import folder_of
from vibe_store.checkpoint.lookup import read_manifest
from vibe_store.checkpoint.manifest import ItemRecord, Manifest, strict_json
from vibe_store.checkpoint.source import StoredSource, open_file
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InvalidValueError,
    UnknownProviderError,
    VibeStoreError,
)
from vibe_store.interfaces import PyTree, Serializer, StorageBackend, Verify
from vibe_store.registry import get_serializer

__all__ = ["check_verify", "load_items", "load_metadata_of", "of_one_manifest", "serializer_missing"]

_T = TypeVar("_T")


def check_verify(verify: str) -> Verify:
    """Return a level of verification, or raise."""
    for level in get_args(Verify):
        if verify == level:
            return level  # type: ignore[no-any-return] # get_args says Any
    raise InvalidValueError(f'verify is "full" (every size and checksum), "sizes" or "off"; got {verify!r}.')


def load_items(
    storage: StorageBackend,
    step: int | None,
    likes: Mapping[str, PyTree],
    *,
    partial: bool,
    verify: Verify = "full",
    serializer: Serializer | None = None,
) -> dict[str, PyTree]:
    """Load items of one committed checkpoint into templates, by name.

    Where a file is missing because the checkpoint was replaced meanwhile, the new one is loaded.

    Args:
        storage: where the checkpoint is.
        step: its step; None for one without a step.
        likes: templates by item name; None loads an item into plain containers.
        partial: allow items to hold leaves that their templates do not.
        verify: what to check of the files.
        serializer: an instance to use where it is the one that wrote an item; others are looked up by name.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or no such item of it.
        TemplateMismatchError: a template and an item differ.
        CorruptCheckpointError: the manifest or a file is missing or is not what was written.
    """

    def load(manifest: Manifest) -> dict[str, PyTree]:
        return {
            name: _load_item(
                storage,
                folder_of(step),
                manifest,
                name,
                like,
                partial=partial,
                verify=verify,
                serializer=serializer,
            )
            for name, like in likes.items()
        }

    return of_one_manifest(storage, step, load)


def load_metadata_of(storage: StorageBackend, step: int | None) -> dict[str, Any] | None:
    """Return the metadata of one committed checkpoint, or None where it has none.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: the manifest or the metadata is missing or is not what was written.
    """

    def load(manifest: Manifest) -> dict[str, Any] | None:
        if manifest.metadata is None:
            return None
        with open_file(storage, folder_of(step), manifest.metadata, verify="full") as stream:
            metadata = strict_json(stream.read())
        if not isinstance(metadata, dict):
            where = f"{storage.url}/{folder_of(step)}{manifest.metadata.key}"
            raise CorruptCheckpointError(f"The metadata in {where} is no JSON object.")
        return metadata

    return of_one_manifest(storage, step, load)


def of_one_manifest(storage: StorageBackend, step: int | None, load: Callable[[Manifest], _T]) -> _T:
    """Load what a manifest names; again, where the checkpoint was replaced and its files went meanwhile.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint, or not any more.
        CorruptCheckpointError: the manifest is damaged, or ``load`` says that a file of it is.
    """
    manifest = read_manifest(storage, step)
    while True:
        try:
            return load(manifest)
        except CorruptCheckpointError:
            again = read_manifest(storage, step)
            if again.attempt == manifest.attempt:
                raise
            manifest = again


def _load_item(
    storage: StorageBackend,
    folder: str,
    manifest: Manifest,
    name: str,
    like: PyTree,
    *,
    partial: bool,
    verify: Verify,
    serializer: Serializer | None,
) -> PyTree:
    where = f"{storage.url}/{folder}".rstrip("/")
    item = manifest.items.get(name)
    if item is None:
        raise CheckpointNotFoundError(
            f"The checkpoint {where} has no item {name!r}; it has {', '.join(sorted(manifest.items))}."
        )
    if serializer is None or serializer.name != item.serializer:
        serializer = _serializer_of(item, f"item {name!r} of {where}")
    with ExitStack() as stack:
        source = StoredSource(storage, folder, item, stack, verify=verify)
        try:
            if like is None:
                return _load_without_template(serializer, source, name)
            return serializer.load(source, name, like, partial=partial)
        except VibeStoreError as error:
            error.add_note(f"While loading the item {name!r} of {where}.")
            raise


def _serializer_of(item: ItemRecord, what: str) -> Serializer:
    """Return the serializer that wrote an item, or say which distribution has it."""
    try:
        return get_serializer(item.serializer)
    except UnknownProviderError as error:
        raise serializer_missing(item, what, error) from error


def serializer_missing(item: ItemRecord, what: str, error: UnknownProviderError) -> UnknownProviderError:
    """Return the error that says which distribution has the serializer that wrote an item."""
    origin = item.distribution
    if origin is None:
        return UnknownProviderError(f"The {what} cannot be loaded. {error}")
    return UnknownProviderError(
        f"The {what} cannot be loaded: it was written by the serializer {item.serializer!r} of "
        f"{origin}, which is not installed or does not provide it. Run `pip install {origin.name}`, "
        f"if you trust who wrote the checkpoint to name it. {error}"
    )


def _load_without_template(serializer: Serializer, source: StoredSource, name: str) -> PyTree:
    from vibe_store.serializers.template import in_containers, template_of

    return in_containers(serializer.load(source, name, template_of(source.leaves)))
