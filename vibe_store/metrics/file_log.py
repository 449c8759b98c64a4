"""A metrics log in a local file: each line reaches the operating system at once."""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from vibe_store.durable_files import discarded, open_temporary, remove_abandoned
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.metrics.lines import is_object, kept

__all__ = ["FileLog"]

_log = logging.getLogger("vibe_store")


class FileLog:
    """One open file that lines are appended to.

    Args:
        path: the file.
        resume_step: drop every line past this step first; None keeps all.

    Raises:
        InvalidValueError: ``path`` is a directory.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self._path = path
        if path.is_dir():
            raise InvalidValueError(f"The metrics log {path} is a directory; give the path of a file.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent)
            if path.exists():
                if resume_step is not None:
                    _drop_past(path, resume_step)
                else:
                    _end_last_line(path)
            self._file: FileIO = path.open("ab", buffering=0)
        except OSError as error:
            reason = error.strerror or str(error)
            message = f"The metrics log {path} cannot be opened for writing: {reason}."
            raise OSError(error.errno, message) from error

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def append(self, line: bytes) -> None:
        """Write a line, whole or not at all."""
        size = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            if written:
                self._file.truncate(size)
            message = f"A line of metrics could not be written to {self._path}: {error.strerror or error}."
            raise OSError(error.errno, message) from error

    def flush(self) -> None:
        """Do nothing: every line has left the process when ``append`` returns."""

    def close(self, *, patience_secs: float | None = None) -> None:
        """Close the file, at once."""
        del patience_secs
        self._file.close()


def _drop_past(path: Path, step: int) -> None:
    """Replace the file by one without the lines past ``step`` and without a partial last line."""
    with discarded(*open_temporary(path.parent)) as (target, kept):
        shutil.copymode(path, kept)  # before anything is in it that not everybody may read
        target.writelines(_kept_of(path, step))
        target.flush()
        os.fsync(target.fileno())
        dropped = path.stat().st_size - kept.stat().st_size
        if dropped:
            kept.replace(path)
            _log.info("Dropped %d bytes of lines past step %d from %s.", dropped, step, path)


def _kept_of(path: Path, step: int) -> Iterator[bytes]:
    with path.open("rb") as lines:
        yield from kept(lines, step)


def _end_last_line(path: Path) -> None:
    """Make the file end with a line's end: by adding it to a whole object, by dropping a partial one."""
    with path.open("r+b") as file:
        start, last = 0, b""
        for line in file:
            start, last = start + len(last), line
        if not last or last.endswith(b"\n"):
            return
        if is_object(last):
            file.write(b"\n")
            return
        file.truncate(start)
    warnings.warn(
        f"The last line of the metrics log {path} was cut short by a killed writer and has been dropped: "
        f"{last[:80]!r}.",
        VibeStoreWarning,
        stacklevel=4,
    )
