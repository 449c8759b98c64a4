"""TensorBoardLogger: what a run measured, as curves that TensorBoard shows."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["TensorBoardLogger", "check_tensorboard"]


class TensorBoardLogger(AbstractContextManager["TensorBoardLogger"]):
    """Writes each number of a line of metrics as a point of the curve of that name, at the line's ``"step"``.

    Lists are curves of their own (``eval_return_by_seed/0`` and so on); what is no number is left out, as are
    lines without a step. Points reach the disk within ten seconds, and when the logger is closed.

    Args:
        folder: a local folder for the event files, which is created.
        resume_step: the step that the run was restored at: TensorBoard drops what it showed past it.

    Raises:
        InvalidValueError: ``folder`` is a URL.
        MissingDependencyError: tensorboardX cannot be imported.
    """

    def __init__(self, folder: str | os.PathLike[str] | UrlPath, *, resume_step: int | None = None) -> None:
        self.folder, writer = check_tensorboard(folder)
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = writer(str(self.folder), purge_step=purge_step, flush_secs=10)

    def write(self, metrics: Mapping[str, Any], /) -> None:
        """Add the points of one line."""
        step = metrics.get("step")
        if isinstance(step, int):
            for name, value in metrics.items():
                if name != "step":
                    self._add(name, value, step)

    def _add(self, name: str, value: object, step: int) -> None:
        if isinstance(value, Sequence) and not isinstance(value, str):
            for index, part in enumerate(value):
                self._add(f"{name}/{index}", part, step)
        elif isinstance(value, int | float):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left; twice is no error."""
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def check_tensorboard(folder: str | os.PathLike[str] | UrlPath) -> tuple[Path, Any]:
    """Return a folder as a path, and the class that writes there; make nothing.

    Raises:
        InvalidValueError: ``folder`` is a URL.
        MissingDependencyError: tensorboardX cannot be imported.
    """
    place = place_of(folder, None)
    if isinstance(place, UrlPath):
        raise InvalidValueError(
            "TensorBoard's files are written to local folders only, and "
            f"{without_credentials(str(place))} is a URL. Choose a folder."
        )
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            f"TensorBoardLogger needs tensorboardX, which cannot be imported ({error}): "
            'pip install "vibe-store[tensorboard]"'
        ) from error
    return place, SummaryWriter
