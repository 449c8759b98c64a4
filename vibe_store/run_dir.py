"""RunDir: the folder of one training run, with its configuration, checkpoints and logs."""

import dataclasses
import json
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from vibe_store.checkpoint.arguments import check_json_object, check_positive
from vibe_store.checkpoint.directory import delete_step_folders
from vibe_store.checkpoint.layout import StepFolder, check_step, read_best, step_folders, write_best
from vibe_store.checkpoint.pending import pending_keys
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.registry import open_storage
from vibe_store.storage.redaction import without_credentials

__all__ = ["RunDir"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class RunDir:
    """One run's folder, ``<base_dir>/<run_id>/``, with ``config.json``, ``checkpoints/`` and ``logs/``.

    Args:
        name: begin a new run, whose id is this name and the local time (``dqn_cartpole_20260215_143022``).
        base_dir: the local folder that holds all runs.
        run_id: open the run of this id instead, whether it exists yet or not.

    Raises:
        InvalidValueError: neither or both of ``name`` and ``run_id`` were given, or one is no folder name.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        base_dir: str | os.PathLike[str] = "runs",
        run_id: str | None = None,
    ) -> None:
        if (name is None) == (run_id is None):
            raise InvalidValueError(
                "RunDir takes the name of a new run, or the run_id of one that exists: "
                f"got name={name!r} and run_id={run_id!r}."
            )
        if "://" in os.fspath(base_dir):
            raise InvalidValueError(
                f"base_dir is {without_credentials(os.fspath(base_dir))!r}, and a run's folder is on a local "
                "disk. Give a local base_dir; checkpoints alone can go elsewhere, by the directory of the "
                "CheckpointManager."
            )
        base = Path(base_dir).expanduser().absolute()
        self.path = base / _check_name(run_id) if run_id is not None else _new_folder(base, _check_name(name))
        self.run_id = self.path.name

    def __repr__(self) -> str:
        return f"RunDir(base_dir={str(self.path.parent)!r}, run_id={self.run_id!r})"

    @property
    def checkpoints(self) -> Path:
        """The folder that holds one ``step_N`` folder for each checkpoint, and ``best``."""
        return self.path / "checkpoints"

    @property
    def config_path(self) -> Path:
        """Where :meth:`save_config` writes."""
        return self.path / "config.json"

    @property
    def logs(self) -> Path:
        """The folder for logs."""
        return self.path / "logs"

    def log_path(self, name: str = "metrics.jsonl") -> Path:
        """Return where a log of this name is; the folder is created."""
        self.logs.mkdir(parents=True, exist_ok=True)
        return self.logs / _check_name(name)

    def checkpoint_dir(self, step: int) -> Path:
        """Return the folder of one step; it is created."""
        folder = self.checkpoints / f"step_{check_step(step)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def save_config(self, config: Any) -> None:
        """Write a dataclass or a dict to ``config.json``, at once and whole.

        Raises:
            InvalidValueError: it is neither, or holds something that JSON cannot hold; by path.
        """
        fields = (
            dataclasses.asdict(config)
            if dataclasses.is_dataclass(config) and not isinstance(config, type)
            else config
        )
        open_storage(self.path).write(self.config_path.name, check_json_object("config", fields, indent=2))

    def load_config(self) -> dict[str, Any] | None:
        """Return what :meth:`save_config` wrote; None where nothing was written."""
        try:
            text = self.config_path.read_text("utf-8")
        except FileNotFoundError:
            return None
        try:
            config = json.loads(text)
        except ValueError as error:
            raise InvalidValueError(f"{self.config_path} is no JSON: {error}.") from error
        if not isinstance(config, Mapping):
            raise InvalidValueError(f"{self.config_path} holds no JSON object.")
        return dict(config)

    def list_checkpoints(self) -> list[tuple[int, Path]]:
        """Return every step and its folder, ascending: committed ones, and those that were written by hand.

        A half-written one is not among them.
        """
        return [(folder.step, self.checkpoints / f"step_{folder.step}") for folder in self._folders()]

    @property
    def latest_checkpoint(self) -> Path | None:
        """The folder of the highest step, or None."""
        found = self.list_checkpoints()
        return found[-1][1] if found else None

    def mark_best(self, step: int) -> None:
        """Point ``checkpoints/best`` to a step, at once and whole.

        The step need not be committed yet: a save in the background may still be under way.
        """
        write_best(open_storage(self.checkpoints), check_step(step))

    @property
    def best_checkpoint(self) -> Path | None:
        """The folder that ``best`` points to; None where nothing is marked.

        None, with a warning, where the marked step is not there (yet).
        """
        step = read_best(open_storage(self.checkpoints))
        if step is None:
            return None
        for found, folder in self.list_checkpoints():
            if found == step:
                return folder
        warnings.warn(
            f"{self.checkpoints / 'best'} points to step {step}, which is not there (yet): its save is under "
            "way, failed or never happened.",
            VibeStoreWarning,
            stacklevel=2,
        )
        return None

    def cleanup_checkpoints(self, keep: int = 5) -> list[Path]:
        """Delete all but the ``keep`` highest steps; the target of ``best`` and pinned steps stay as well.

        Returns:
            The folders that were deleted, by step.

        Raises:
            WriterLockedError: another process is writing there.
        """
        keep = check_positive("keep", keep)
        storage = open_storage(self.checkpoints)
        best = read_best(storage)
        doomed = [f.step for f in self._folders()[:-keep] if f.step != best and not f.pinned]
        delete_step_folders(storage, doomed)
        return [self.checkpoints / f"step_{step}" for step in doomed]

    def _folders(self) -> list[StepFolder]:
        storage = open_storage(self.checkpoints)
        found = step_folders(storage, pending_keys(storage))
        return [folder for folder in found if folder.status != "set-aside"]


def _check_name(name: str | None) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"The name {name!r} cannot be used: it becomes the name of a folder or file, so give letters, "
            "digits, '_', '-', '+' and '.', not beginning with '.', '-' or '+'."
        )
    return name


def _new_folder(base: Path, name: str) -> Path:
    """Create a folder that no other run has, by name and time."""
    base.mkdir(parents=True, exist_ok=True)
    stamped = f"{name}_{datetime.now().astimezone():%Y%m%d_%H%M%S}"
    folder = base / stamped
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            folder = base / f"{stamped}_{secrets.token_hex(2)}"
        else:
            return folder
