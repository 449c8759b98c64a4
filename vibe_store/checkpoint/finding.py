"""From what a user points at (a run, its checkpoints, one of them) to the one checkpoint that is meant.

Imports no JAX, so that the command line answers at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vibe_store.checkpoint.layout import check_step, has_manifest, read_best, split_step_folder
from vibe_store.checkpoint.looking import list_checkpoints
from vibe_store.checkpoint.manifest import Distribution, is_distribution
from vibe_store.checkpoint.opening import Directory, locate, open_directory
from vibe_store.checkpoint.step_index import committed_steps
from vibe_store.discovery import Kind
from vibe_store.errors import CheckpointNotFoundError, InvalidValueError
from vibe_store.interfaces import StorageBackend
from vibe_store.registry import open_storage
from vibe_store.retention import best
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["distribution_named", "find_checkpoint", "located"]


def find_checkpoint(
    directory: Directory,
    *,
    step: int | None = None,
    best_metric: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[StorageBackend, int]:
    """Return the storage of a directory of checkpoints, and the committed step in it that is meant.

    Args:
        directory: a run's folder (which holds ``checkpoints/``), a directory of checkpoints, one step's own
            folder, or the URL of one of these.
        step: which one; the newest by default, or the one whose folder ``directory`` is.
        best_metric: take the one that ``best`` points to; without a ``best``, the one with the highest value
            of this metric, the earliest of equals.
        storage_options: options of the storage, such as credentials.

    Raises:
        CheckpointNotFoundError: there is no such directory, no such checkpoint, or none that could be best.
        InvalidValueError: both ``step`` and ``best_metric`` were given, or the best one of a single step.
    """
    if step is not None and best_metric is not None:
        raise InvalidValueError(f"Give the step ({step}) or ask for the best one, not both.")
    storage, own = _opened(directory, None if step is None else check_step(step), storage_options)
    if best_metric is not None:
        if own is not None:
            raise InvalidValueError(
                f"Step {own} in {storage.url} is one checkpoint. Give the directory around it to take "
                "the best."
            )
        own = _best(storage, best_metric)
    elif own is None:
        own = max(committed_steps(storage), default=None)  # also one that was copied there without its mark
    if own is None:
        raise CheckpointNotFoundError(f"There is no committed checkpoint in {storage.url}.")
    if not has_manifest(storage, own):
        steps = ", ".join(map(str, committed_steps(storage))) or "none"
        raise CheckpointNotFoundError(
            f"There is no committed checkpoint of step {own} in {storage.url}; committed are: {steps}."
        )
    return storage, own


def located(directory: str, step: int | None, options: Mapping[str, Any] | None) -> tuple[str, int | None]:
    """Return the directory of checkpoints that is meant, and the step where the directory itself says it.

    Raises:
        CheckpointNotFoundError: there is no such directory; or it is that of a run whose checkpoints are
            elsewhere, which the message says. Nobody is led there unasked, as to delete something, say.
        InvalidValueError: the directory is empty text, or a URL that lost a slash.
    """
    if not directory:
        raise InvalidValueError(
            "The directory is empty text; give its path, '.' for the current folder, or a URL."
        )
    place = place_of(directory, options)
    path = open_storage(directory, **(options or {})).local_path("") if isinstance(place, UrlPath) else place
    if path is not None and not path.exists():
        raise CheckpointNotFoundError(f"There is no directory {without_credentials(directory)}.")
    if path is not None and not path.is_dir():
        raise CheckpointNotFoundError(
            f"{without_credentials(directory)} is a file; give a directory of checkpoints."
        )
    if path is None:
        return _located_by_url(UrlPath(directory, options), step)
    if (path / "checkpoints").is_dir():
        return str(path / "checkpoints"), step
    _refuse_run_elsewhere(open_directory(path, None))
    if isinstance(place, Path) and place.is_symlink():
        directory = str(place.resolve())
    folder = split_step_folder(directory)
    if folder is not None and step is None:
        return folder
    return directory, step


def _located_by_url(url: UrlPath, step: int | None) -> tuple[str, int | None]:
    found = locate(url, None, None)[1] if step is None else None
    if found is not None:
        return str(url.parent), found
    below = url / "checkpoints"
    if url.name != below.name and any(True for _ in open_storage(below.url, **below.storage_options).list()):
        return str(below), step
    _refuse_run_elsewhere(open_directory(url, None))
    return str(url), step


def _refuse_run_elsewhere(run: StorageBackend) -> None:
    """Raise where this is a run whose ``config.json`` says that its checkpoints are elsewhere."""
    try:
        config = json.loads(run.read("config.json"))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        # No run, or a file of somebody else's.
        return
    runner = config.get("runner") if isinstance(config, Mapping) else None
    place = runner.get("checkpoint_dir") if isinstance(runner, Mapping) else None
    if isinstance(place, str):
        origin = distribution_named(config, "storage")
        needs = "" if origin is None else f" It is in a storage of {origin} (`pip install {origin.name}`)."
        raise CheckpointNotFoundError(
            f"The run {run.url} keeps its checkpoints in {without_credentials(place)}: give that place."
            f"{needs}"
        )


def distribution_named(config: Mapping[str, Any], kind: Kind) -> Distribution | None:
    """Return the plugin package of which a run's ``config.json`` says that it had its storage, say."""
    plugins = config.get("plugins")
    origin = plugins.get(kind) if isinstance(plugins, Mapping) else None
    name = origin.get("distribution") if isinstance(origin, Mapping) else None
    if origin is None or not isinstance(name, str) or not is_distribution(name):
        return None
    version = origin.get("version")
    return Distribution(name, version if isinstance(version, str) and version.isprintable() else None)


def _opened(
    directory: Directory, step: int | None, options: Mapping[str, Any] | None
) -> tuple[StorageBackend, int | None]:
    if isinstance(directory, StorageBackend):
        return open_directory(directory, options), step
    place = place_of(directory, options)
    if isinstance(place, UrlPath):
        found, own = located(place.url, step, place.storage_options)
        return open_directory(found, place.storage_options), own
    # Of empty text, which `located` refuses, pathlib would make the current folder.
    found, own = located(str(place) if directory else "", step, None)
    return open_directory(found, None), own


def _best(storage: StorageBackend, metric: str) -> int:
    marked = read_best(storage)
    if marked is not None:
        return marked
    infos = [entry.info for entry in list_checkpoints(storage) if entry.info is not None]
    step = best(infos, lambda metrics: metrics[metric], "max")
    if step is None:
        raise CheckpointNotFoundError(
            f"No checkpoint in {storage.url} is marked as the best, and none was saved with the metric "
            f"{metric!r}. Name a step instead."
        )
    return step
