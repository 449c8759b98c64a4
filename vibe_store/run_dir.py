"""RunDir: the folder of one training run, local or in a bucket, with configuration, checkpoints and logs."""

import dataclasses
import json
import os
import re
import secrets
import socket
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from vibe_store.checkpoint.arguments import check_json_object, check_positive
from vibe_store.checkpoint.directory import delete_step_folders
from vibe_store.checkpoint.layout import OWN, StepFolder, check_step, read_best, step_folders, write_best
from vibe_store.checkpoint.opening import open_directory
from vibe_store.checkpoint.pending import pending_keys
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["Place", "RunDir", "find_runs"]

Place: TypeAlias = Path | UrlPath
"""Where something of a run is: a ``pathlib.Path`` on a local disk, a UrlPath anywhere else."""

_CONFIG = "config.json"
_CLAIM = f"{OWN}/run.json"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


class RunDir:
    """One run's folder, ``<base_dir>/<run_id>/``, with ``config.json``, ``checkpoints/`` and ``logs/``.

    In a bucket there are no folders: nothing is made by asking where something is, and a new run is there
    from its start by the object ``.vibe_store/run.json``, which says when and where it began.

    Args:
        name: begin a new run, whose id is this name and the local time (``dqn_cartpole_20260215_143022``).
        base_dir: what holds all runs: a local folder (``~`` is the home folder), or a URL as text or as a
            UrlPath.
        run_id: open the run of this id instead, whether it exists yet or not.
        storage_options: options of the storage of a URL, such as credentials. The paths of the run bring them
            along wherever vibe_store takes a path.

    Attributes:
        path: the run's folder.
        run_id: its name.

    Raises:
        InvalidValueError: neither or both of ``name`` and ``run_id`` were given, or one is no folder name; or
            ``base_dir`` is a URL that went through ``pathlib``.
    """

    path: Place
    run_id: str

    def __init__(
        self,
        name: str | None = None,
        *,
        base_dir: str | os.PathLike[str] | UrlPath = "runs",
        run_id: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if (name is None) == (run_id is None):
            raise InvalidValueError(
                "RunDir takes the name of a new run, or the run_id of one that exists: "
                f"got name={name!r} and run_id={run_id!r}."
            )
        base = _base(base_dir, storage_options)
        self.path = base / _check_name(run_id) if run_id is not None else _new_run(base, _check_name(name))
        self.run_id = self.path.name

    def __repr__(self) -> str:
        base = without_credentials(str(self.path.parent))
        return f"RunDir(base_dir={base!r}, run_id={self.run_id!r})"

    @property
    def checkpoints(self) -> Place:
        """The folder that holds one ``step_N`` folder for each checkpoint, and ``best``."""
        return self.path / "checkpoints"

    @property
    def config_path(self) -> Place:
        """Where :meth:`save_config` writes."""
        return self.path / _CONFIG

    @property
    def logs(self) -> Place:
        """The folder for logs."""
        return self.path / "logs"

    def log_path(self, name: str = "metrics.jsonl") -> Place:
        """Return where a log of this name is; a local folder for it is created."""
        return _made(self.logs) / _check_name(name)

    def checkpoint_dir(self, step: int) -> Place:
        """Return the folder of one step; a local one is created."""
        return _made(self.checkpoints / f"step_{check_step(step)}")

    def save_config(self, config: Any) -> None:
        """Write a dataclass or a dict to ``config.json``, at once and whole.

        Raises:
            InvalidValueError: it is neither, or holds something that JSON cannot hold, by path; or the
                storage does not show in the base directory what is in the run, so that no run can be there.
        """
        fields = (
            dataclasses.asdict(config)
            if dataclasses.is_dataclass(config) and not isinstance(config, type)
            else config
        )
        open_directory(self.path, None).write(_CONFIG, check_json_object("config", fields, indent=2))
        if isinstance(self.path, UrlPath):
            _check_nesting(self.path)

    def load_config(self) -> dict[str, Any] | None:
        """Return what :meth:`save_config` wrote; None where nothing was written.

        Raises:
            InvalidValueError: what is there is no JSON object.
        """
        where = without_credentials(str(self.config_path))
        try:
            config = json.loads(self._read_config())
        except FileNotFoundError:
            return None
        except IsADirectoryError as error:
            raise InvalidValueError(f"{where} is a folder, and no file with a JSON object.") from error
        except ValueError as error:  # no JSON, or no UTF-8
            raise InvalidValueError(f"{where} is no JSON: {error}.") from error
        except RecursionError as error:
            raise InvalidValueError(f"{where} is nested too deeply to be read as JSON.") from error
        if not isinstance(config, Mapping):
            raise InvalidValueError(f"{where} holds no JSON object.")
        return dict(config)

    def list_checkpoints(self) -> list[tuple[int, Place]]:
        """Return every step and its folder, ascending: committed ones, and those that were written by hand.

        A half-written one is not among them.
        """
        return [(folder.step, self.checkpoints / f"step_{folder.step}") for folder in self._folders()]

    @property
    def latest_checkpoint(self) -> Place | None:
        """The folder of the highest step, or None."""
        found = self.list_checkpoints()
        return found[-1][1] if found else None

    def mark_best(self, step: int) -> None:
        """Point ``checkpoints/best`` to a step, at once and whole: a link on a local disk, else an object.

        The step need not be committed yet: a save in the background may still be under way.
        """
        write_best(open_directory(self.checkpoints, None), check_step(step))

    @property
    def best_checkpoint(self) -> Place | None:
        """The folder that ``best`` points to; None where nothing is marked.

        None, with a warning, where the marked step is not there (yet).
        """
        step = read_best(open_directory(self.checkpoints, None))
        if step is None:
            return None
        for found, folder in self.list_checkpoints():
            if found == step:
                return folder
        where = without_credentials(str(self.checkpoints / "best"))
        warnings.warn(
            f"{where} points to step {step}, which is not there (yet): its save is under way, failed or "
            "never happened.",
            VibeStoreWarning,
            stacklevel=2,
        )
        return None

    def cleanup_checkpoints(self, keep: int = 5) -> list[Place]:
        """Delete all but the ``keep`` highest steps; the target of ``best`` and pinned steps stay as well.

        Returns:
            The folders that were deleted, by step.

        Raises:
            WriterLockedError: another process is writing there.
        """
        keep = check_positive("keep", keep)
        storage = open_directory(self.checkpoints, None)

        def doomed() -> list[int]:
            best = read_best(storage)
            return [f.step for f in self._folders()[:-keep] if f.step != best and not f.pinned]

        return [self.checkpoints / f"step_{step}" for step in delete_step_folders(storage, doomed)]

    def _folders(self) -> list[StepFolder]:
        storage = open_directory(self.checkpoints, None)
        found = step_folders(storage, pending_keys(storage))
        return [folder for folder in found if folder.status != "set-aside"]

    def _read_config(self) -> str | bytes:
        if isinstance(self.path, Path):
            return (self.path / _CONFIG).read_text("utf-8")
        return open_directory(self.path, None).read(_CONFIG)


def find_runs(
    base_dir: str | os.PathLike[str] | UrlPath, *, storage_options: Mapping[str, Any] | None = None
) -> list[RunDir]:
    """Return every run in a base directory that has a ``config.json``, by id.

    In a bucket this lists everything below the base directory: a request for each thousand objects.
    """
    base = _base(base_dir, storage_options)
    if isinstance(base, Path):
        found = [path.parent.name for path in base.glob(f"*/{_CONFIG}")]
    else:
        keys = [blob.key.split("/") for blob in open_directory(base, None).list()]
        found = [key[0] for key in keys if key[1:] == [_CONFIG]]
    return [RunDir(base_dir=base, run_id=name) for name in sorted(found) if _NAME.fullmatch(name)]


def _check_name(name: str | None) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"The name {name!r} cannot be used: it becomes the name of a folder or file, so give letters, "
            "digits, '_', '-', '+' and '.', not beginning with '.', '-' or '+'."
        )
    return name


def _base(base_dir: object, storage_options: Mapping[str, Any] | None) -> Place:
    base = place_of(base_dir, storage_options)
    return base if isinstance(base, UrlPath) else base.absolute()


def _made(folder: Place) -> Place:
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _new_run(base: Place, name: str) -> Place:
    """Claim a place that no other run has, by name and time."""
    if isinstance(base, Path):
        base.mkdir(parents=True, exist_ok=True)
    now = datetime.now().astimezone()
    stamped = f"{name}_{now:%Y%m%d_%H%M%S}"
    run_id = stamped
    while True:
        try:
            if isinstance(base, Path):
                (base / run_id).mkdir()
            else:
                _claim(base / run_id, now)
        except FileExistsError:
            run_id = f"{stamped}_{secrets.token_hex(2)}"
        else:
            return base / run_id


def _check_nesting(run: UrlPath) -> None:
    """Refuse a storage of a plugin that finds no run from its base directory, before anything is trained."""
    name = f"{run.name}/{_CONFIG}"
    if not any(blob.key == name for blob in open_directory(run.parent, None).list(name)):
        base = without_credentials(str(run.parent))
        raise InvalidValueError(
            f"{base} cannot hold runs: the config.json of {run.name!r} is not listed there, so this storage "
            "keeps what is below a URL apart from it. It can hold the checkpoints of one run: give a local "
            "base_dir, and the URL as the checkpoint_dir."
        )


def _claim(run: UrlPath, began: datetime) -> None:
    """Create the object by which a run is there, unless another run of the same id created it."""
    host = {"host": socket.gethostname(), "pid": os.getpid(), "claim": secrets.token_hex(8)}
    claim = check_json_object("claim", {"run_id": run.name, "began": began.isoformat(), **host}, indent=2)
    storage = open_directory(run, None)
    try:
        storage.write(_CLAIM, claim, overwrite=False)
    except FileExistsError:
        # A storage that repeats a request whose answer was lost finds what the first one created.
        if storage.read(_CLAIM) != claim:
            raise
