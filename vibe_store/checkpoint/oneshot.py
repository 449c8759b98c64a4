"""Saving and loading one checkpoint outside a training loop."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vibe_store.checkpoint.arguments import (
    STATE,
    check_items,
    check_json_object,
    check_metrics,
    check_positive,
)
from vibe_store.checkpoint.commit import commit
from vibe_store.checkpoint.content import Content, draft_of
from vibe_store.checkpoint.eqx_files import local_file
from vibe_store.checkpoint.layout import METADATA, folder_of, step_folders
from vibe_store.checkpoint.manifest import MAX_JSON_BYTES, strict_json
from vibe_store.checkpoint.opening import Directory, locate
from vibe_store.checkpoint.pending import pending_keys
from vibe_store.checkpoint.reading import check_verify, load_items, load_metadata_of
from vibe_store.checkpoint.settings import serializer_of
from vibe_store.checkpoint.writer import become_writer
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedLeafError,
)
from vibe_store.interfaces import PyTree, Serializer, StorageBackend, Verify
from vibe_store.serializers import eqx

__all__ = ["load_checkpoint", "load_metadata", "save_checkpoint"]


def save_checkpoint(
    directory: Directory,
    pytree: PyTree,
    *,
    step: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    unreplicate: bool = False,
    items: Mapping[str, PyTree] | None = None,
    metrics: Mapping[str, float] | None = None,
    serializer: str | Serializer = "eqx",
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Save a pytree, durably when this returns; a checkpoint that is there already is replaced, at once and
    whole.

    Args:
        directory: a local folder or the URL of one; it is created. A folder called ``step_N`` is step N of
            the folder around it.
        pytree: what to save.
        step: save into the subfolder ``step_{step}``; without it, into ``directory`` itself.
        metadata: anything that JSON can hold; see :func:`load_metadata`.
        unreplicate: save only the first replica, ``leaf[0]`` of every array.
        items: further pytrees by name, in files of their own.
        metrics: numbers to rank checkpoints by.
        serializer: the name of a serializer, with options as ``"orbax:compress=true"``; or a serializer.
        storage_options: options of the storage, such as credentials.

    Raises:
        InvalidValueError: an argument has a value that cannot be used.
        UnsupportedLeafError: a leaf cannot be stored, or has no replicas to take the first of; by path.
        WriterLockedError: another process is writing to this directory.
        OSError: the storage failed; what was there before is there still.
    """
    storage, step = locate(directory, step, storage_options)
    trees, described = (
        check_items(pytree, items),
        None if metadata is None else check_json_object("metadata", metadata),
    )
    if unreplicate:
        trees = {name: _first_replica(tree) for name, tree in trees.items()}
    writer = serializer_of(serializer)
    content = Content(trees, described, check_metrics(metrics))
    lease = become_writer(storage, "one-shot")
    try:
        commit(storage, draft_of(step, content, writer), replace=True)
    except OSError as error:
        if error.errno is None:
            raise
        what = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        message = f"Could not save {what} in {storage.url}: {error.strerror or error}"
        raise OSError(error.errno, message, error.filename) from error
    finally:
        lease.release()


def load_checkpoint(
    directory: Directory,
    like: PyTree = None,
    *,
    step: int | None = None,
    replicate_to: int | None = None,
    partial: bool = False,
    verify: Verify = "full",
    storage_options: Mapping[str, Any] | None = None,
) -> PyTree:
    """Load the pytree of one checkpoint, verified, into the structure of ``like``.

    Arrays come back strongly typed, weakly typed ones too, which may promote to other dtypes than before:
    make such an array strong before training, as ``jnp.asarray(0.9, jnp.bfloat16)``.

    Args:
        directory: the folder that was given to :func:`save_checkpoint`, or one step's own folder.
        like: a template of the same structure, shapes and dtypes; its leaves may be ``jax.ShapeDtypeStruct``.
            Without one, the tree comes back in dicts and lists after the paths of its leaves: attributes and
            dict keys are names, tuples are lists, None where a list has no leaf. Arrays are ``jax.Array``
            where JAX can hold their dtype as it is configured, NumPy arrays otherwise; of callables there is
            only the name.
        step: load from the subfolder ``step_{step}``; without it, from ``directory`` itself.
        replicate_to: broadcast every array to ``(replicate_to, *shape)``; other leaves stay as they are.
        partial: load only what the template has, of a checkpoint that may hold more; the rest is not read,
            where the serializer can do without.
        verify: ``"full"`` checks sizes and checksums, ``"sizes"`` sizes only, ``"off"`` neither, to save what
            can be saved of a damaged checkpoint.
        storage_options: options of the storage, such as credentials.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        TemplateMismatchError: template and checkpoint differ; every difference is in it, by path.
        CorruptCheckpointError: what is stored is not what was saved.
    """
    copies = None if replicate_to is None else check_positive("replicate_to", replicate_to)
    level = check_verify(verify)
    storage, step = locate(directory, step, storage_options)
    try:
        tree = load_items(storage, step, {STATE: like}, partial=partial, verify=level)[STATE]
    except CheckpointNotFoundError:
        tree = _load_hand_written(storage, step, like, partial=partial)
    return tree if copies is None else jax.tree.map(lambda leaf: _replicate(leaf, copies), tree)


def load_metadata(
    directory: Directory,
    *,
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the metadata that a checkpoint was saved with; None where there is none.

    Args:
        directory: the folder that was given to :func:`save_checkpoint`, or one step's own folder.
        step: the step; without it, the checkpoint of ``directory`` itself.
        storage_options: options of the storage, such as credentials.

    Raises:
        CorruptCheckpointError: what is stored is not what was saved.
    """
    storage, step = locate(directory, step, storage_options)
    try:
        return load_metadata_of(storage, step)
    except CheckpointNotFoundError:
        return _hand_written_metadata(storage, f"{folder_of(step)}{METADATA}")


def _load_hand_written(storage: StorageBackend, step: int | None, like: PyTree, *, partial: bool) -> PyTree:
    """Load a ``state.eqx`` that no manifest names; raise what is there instead."""
    key = f"{folder_of(step)}{STATE}.eqx"
    with ExitStack() as stack:
        file = None if key in pending_keys(storage) else local_file(storage, key, stack)
        if file is not None:
            return eqx.load_eqx(file, like, partial=partial, name=f"{storage.url}/{key}")
    steps = [str(folder.step) for folder in step_folders(storage, pending_keys(storage))]
    what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    hint = f" It has the steps {', '.join(steps)}; pass one as step=." if steps else ""
    raise CheckpointNotFoundError(f"There is {what} in {storage.url}.{hint}")


def _hand_written_metadata(storage: StorageBackend, key: str) -> dict[str, Any] | None:
    """Read a ``metadata.json`` that no manifest names."""
    if key in pending_keys(storage):
        return None
    try:
        metadata = strict_json(storage.read(key, 0, MAX_JSON_BYTES + 1))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptCheckpointError(f"{storage.url}/{key} is no JSON: {error}.") from error
    if not isinstance(metadata, dict):
        raise CorruptCheckpointError(f"{storage.url}/{key} holds no JSON object.")
    return metadata


def _first_replica(tree: PyTree) -> PyTree:
    def first(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        if leaf.ndim == 0:
            raise UnsupportedLeafError(
                f"The leaf {jax.tree_util.keystr(path) or 'at the root'} is a 0-d array, "
                "so it has no device axis to take the first replica of. Save without unreplicate=True."
            )
        if not len(leaf):
            raise UnsupportedLeafError(
                f"The leaf {jax.tree_util.keystr(path) or 'at the root'} has the shape {leaf.shape}, so it "
                "has no first replica. Save without unreplicate=True."
            )
        return leaf[0]

    return jax.tree_util.tree_map_with_path(first, tree)


def _replicate(leaf: Any, copies: int) -> Any:
    if isinstance(leaf, jax.Array):
        return jnp.broadcast_to(leaf, (copies, *leaf.shape))
    if isinstance(leaf, np.ndarray):
        return np.broadcast_to(leaf, (copies, *leaf.shape)).copy()
    return leaf
