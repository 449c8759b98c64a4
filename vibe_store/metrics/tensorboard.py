"""TensorBoardLogger: what a run measured, as curves that TensorBoard shows."""

import operator
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.metrics.lines import not_loggable, unboxed
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["TensorBoardLogger", "check_tensorboard"]


class TensorBoardLogger(AbstractContextManager["TensorBoardLogger"]):
    """Writes each number of a line of metrics as a point of the curve of that name, at the line's ``"step"``.

    Numbers are those of Python, NumPy and JAX. What is in lists, arrays and dicts has curves of its own
    (``eval_return_by_seed/0``, ``losses/actor`` and so on). Texts and None are left out, as are lines without
    a step. Points reach the disk within ten seconds, and when the logger is closed.

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
        self._closed = False

    def write(self, metrics: Mapping[str, Any], /) -> None:
        """Add the points of one line.

        Raises:
            InvalidValueError: the step is no whole number, a value is none that
                :class:`~vibe_store.metrics.MetricsLogger` takes and no array either (the message names its
                curve), or the logger is closed. Nothing was written.
        """
        if self._closed:
            raise InvalidValueError(
                f"TensorBoard's log in {self.folder} is closed, so nothing can be written to it."
            )
        if metrics.get("step") is None:
            return
        step = _whole(metrics["step"])
        curves = [(name, value) for name, value in metrics.items() if name != "step"]
        for curve, number in [point for name, value in curves for point in _points(name, value)]:
            self._writer.add_scalar(curve, number, step)

    def close(self) -> None:
        """Write what is left; twice is no error."""
        self._closed = True
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError:
        raise InvalidValueError(
            f"The step of a line of metrics is {step!r}, but TensorBoard's curves go by whole numbers."
        ) from None


def _points(curve: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield the numbers in a value, each with the name of its curve."""
    value = unboxed(value, curve)
    if isinstance(value, int | float):
        yield curve, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _points(f"{curve}/{name}", part)
    elif isinstance(value, list | tuple) or hasattr(value, "tolist"):
        for index, part in enumerate(value):
            yield from _points(f"{curve}/{index}", part)
    elif value is not None and not isinstance(value, str):
        raise not_loggable(value, curve)


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
