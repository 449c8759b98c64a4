"""MetricsLogger: what a run measured, one JSON object per line, in a file that survives a killed writer."""

import json
import logging
import math
import operator
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vibe_store.errors import InvalidValueError, VibeStoreWarning

__all__ = ["MetricsLogger"]

_log = logging.getLogger("vibe_store")


class MetricsLogger:
    """Appends one JSON object per line to a file.

    A line has reached the operating system when ``write`` returns, so a process that is killed loses no line
    that it wrote. (A machine that loses power may lose the last ones: ``fsync`` is called only when lines are
    dropped.) One writer at a time.

    A file whose last line was cut short is repaired when it is opened: with ``resume_step`` silently, since
    dropping lines was asked for, else with a :class:`~vibe_store.errors.VibeStoreWarning`.

    Args:
        path: the file; it and its parent folders are created where they do not exist.
        resume_step: the step that the run was restored at. Every line whose ``"step"`` is a number past it is
            dropped, since the resumed run will write it again; lines without such a ``"step"`` stay. The file
            is replaced as a whole, so that dying meanwhile leaves it as it was.

    Raises:
        InvalidValueError: ``resume_step`` is negative or no integer, or ``path`` is a directory.
        OSError: the file cannot be opened; the message says which and why.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None) -> None:
        if resume_step is not None:
            resume_step = _checked_step(resume_step)
        self.path = Path(path).resolve()
        if self.path.is_dir():
            raise InvalidValueError(f"The metrics log {self.path} is a directory; give the path of a file.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                if resume_step is not None:
                    _drop_past(self.path, resume_step)
                else:
                    _end_last_line(self.path)
            self._file: FileIO = self.path.open("ab", buffering=0)
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"The metrics log {self.path} cannot be opened for writing: {reason}."
            raise OSError(error.errno, message) from error

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            metrics: values by name: Python, NumPy and JAX scalars, 0-d arrays, strings, booleans, None, and
                dicts, lists and tuples of these. JSON has no NaN and no infinities: they are written as the
                strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float`` reads back.

        Raises:
            InvalidValueError: a value is none of these (the message names its key), or the log is closed.
                Nothing was written.
            OSError: the line could not be written (a full disk, say); the file is as it was before.
        """
        if self._file.closed:
            raise InvalidValueError(
                f"The metrics log {self.path} is closed, so nothing can be written to it."
            )
        if not isinstance(metrics, Mapping):
            raise InvalidValueError(f"A line of metrics must be a mapping, not {_described(metrics)}.")
        line = json.dumps(_plain_mapping(metrics, ""), allow_nan=False) + "\n"
        self._append(line.encode("ascii"))

    def flush(self) -> None:
        """Do nothing: every line has left the process when ``write`` returns."""

    def close(self) -> None:
        """Close the file. Closing twice is no error."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        self.close()

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            if written:
                self._file.truncate(size)
            message = f"A line of metrics could not be written to {self.path}: {error.strerror or error}."
            raise OSError(error.errno, message) from error


def _checked_step(step: Any) -> int:
    try:
        checked = operator.index(step)
    except TypeError:
        checked = -1
    if isinstance(step, bool) or checked < 0:
        raise InvalidValueError(f"resume_step must be an integer of 0 or more, or None, not {step!r}.")
    return checked


def _plain(value: Any, key: str) -> Any:
    """Turn a value into what JSON can hold; ``key`` is its place, for the message."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _NON_FINITE[str(float(value))]
    if isinstance(value, Mapping):
        return _plain_mapping(value, key)
    if isinstance(value, list | tuple):
        return [_plain(element, f"{key}[{index}]") for index, element in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            scalar = value.item()
        except Exception as error:
            raise InvalidValueError(
                f"The metric {key!r} is {_described(value)}, which has no value to log (was it traced "
                "by jax.jit?); log it outside of the traced function."
            ) from error
        if scalar is None or isinstance(scalar, bool | int | float | str):
            return _plain(scalar, key)
    hint = "; call .tolist() on it first" if hasattr(value, "tolist") and hasattr(value, "shape") else ""
    raise InvalidValueError(
        f"The metric {key!r} is {_described(value)}, but only numbers, strings, booleans, None, and dicts "
        f"and lists of these can be logged{hint}."
    )


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _plain_mapping(mapping: Mapping[Any, Any], key: str) -> dict[str, Any]:
    plain = {}
    for name, value in mapping.items():
        if not isinstance(name, str):
            place = f" in {key!r}" if key else ""
            raise InvalidValueError(f"The names of metrics must be strings, but one{place} is {name!r}.")
        plain[name] = _plain(value, f"{key}.{name}" if key else name)
    return plain


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = f"of type {type(value).__name__}"
    return f"{kind} (shape {shape}, dtype {dtype})" if shape is not None and dtype is not None else kind


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_past(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    logged = record.get("step") if isinstance(record, dict) else None
    return isinstance(logged, int | float) and not isinstance(logged, bool) and logged > step


def _lines_to_keep(path: Path, step: int) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                # What a writer left when it was killed, unless only the line's end is missing.
                if _is_object(line) and not _is_past(line, step):
                    yield line + b"\n"
            elif not _is_past(line, step):
                yield line


def _drop_past(path: Path, step: int) -> None:
    """Replace the file by one without the lines past ``step`` and without a partial last line."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    kept = Path(name)
    try:
        with open(descriptor, "wb") as target:  # noqa: PTH123 - a descriptor has no Path
            target.writelines(_lines_to_keep(path, step))
            target.flush()
            os.fsync(target.fileno())
        shutil.copymode(path, kept)
        dropped = path.stat().st_size - kept.stat().st_size
        if dropped:
            kept.replace(path)
            _log.info("Dropped %d bytes of lines past step %d from %s.", dropped, step, path)
    finally:
        kept.unlink(missing_ok=True)


def _end_last_line(path: Path) -> None:
    """Make the file end with a line's end: by adding it to a whole object, by dropping a partial one."""
    with path.open("r+b") as file:
        start, last = 0, b""
        for line in file:
            start, last = start + len(last), line
        if not last or last.endswith(b"\n"):
            return
        if _is_object(last):
            file.write(b"\n")
            return
        file.truncate(start)
    warnings.warn(
        f"The last line of the metrics log {path} was cut short by a killed writer and has been dropped: "
        f"{last[:80]!r}.",
        VibeStoreWarning,
        stacklevel=3,
    )
