"""MetricsLogger: what a run measured, one JSON object per line, where a killed writer cannot spoil it."""

import logging
import math
import operator
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vibe_store.errors import InvalidValueError
from vibe_store.metrics.file_log import FileLog
from vibe_store.metrics.lines import encoded
from vibe_store.metrics.url_log import UrlLog
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["MetricsLogger"]

_log = logging.getLogger("vibe_store")
_LAST_FLUSH_SECS = 10.0
"""How long closing may take when an exception ends the ``with`` block: a preempted machine has no longer."""


class MetricsLogger:
    """Appends one JSON object per line to a file, or to objects in a bucket. One writer at a time.

    In a file, a line has reached the operating system when ``write`` returns, so a process that is killed
    loses no line that it wrote. (A machine that loses power may lose the last ones: ``fsync`` is called only
    when lines are dropped.) A file whose last line was cut short is repaired when it is opened: with
    ``resume_step`` silently, since dropping lines was asked for, else with a
    :class:`~vibe_store.errors.VibeStoreWarning`.

    At a URL, the lines of ``logs/metrics.jsonl`` are in the segments ``logs/metrics.00001.jsonl`` and so on,
    of up to 1 MiB. ``write`` keeps a line in memory; a thread stores the lines every ``flush_secs`` by
    replacing the last segment, at once and whole. So a process that is killed loses at most the lines since,
    and so does one that ends without closing the log, which then says so. What goes wrong in the thread is
    raised by the next ``write``, unless a later flush has made it good; no line is lost by that, as all wait
    in memory for the next flush. A resumed run begins a segment of its own. A forked child cannot use the
    log, and its end stores nothing.

    Args:
        path: the file, which may begin with ``~`` and is created with its parent folders where it does not
            exist; or a URL.
        resume_step: the step that the run was restored at. Every line whose ``"step"`` is a number past it is
            dropped, since the resumed run will write it again; lines without such a ``"step"`` stay. A file
            is replaced as a whole, so that dying meanwhile leaves it as it was; of segments the last is
            replaced first, so that dying meanwhile leaves no hole.
        flush_secs: seconds between two flushes; of no meaning for a local file.
        storage_options: options of the storage of a URL, such as credentials.

    Attributes:
        path: where the log is.

    Raises:
        InvalidValueError: ``resume_step`` is negative or no integer, ``flush_secs`` is no number above 0, or
            ``path`` is a directory, or a URL that went through ``pathlib``.
        OSError: the file, or the first object, cannot be written; the message says which and why.
    """

    path: Path | UrlPath

    def __init__(
        self,
        path: str | os.PathLike[str] | UrlPath,
        *,
        resume_step: int | None = None,
        flush_secs: float = 10.0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if resume_step is not None:
            resume_step = _checked_step(resume_step)
        flush_secs = _checked_secs(flush_secs)
        place = place_of(path, storage_options)
        self._sink: FileLog | UrlLog
        if isinstance(place, UrlPath):
            self.path = place
            log = UrlLog(place, resume_step, flush_secs)
            weakref.finalize(self, log.let_go).atexit = False
            self._sink = log
        else:
            self.path = place.resolve()
            self._sink = FileLog(self.path, resume_step)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line; at a URL, to those that the next flush stores.

        Args:
            metrics: values by name: Python, NumPy and JAX scalars, 0-d arrays, strings, booleans, None, and
                dicts, lists and tuples of these. JSON has no NaN and no infinities: they are written as the
                strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which ``float`` reads back.

        Raises:
            InvalidValueError: a value is none of these (the message names its key), or the log is closed or
                another process's. Nothing was written.
            OSError: the line could not be written to the file (a full disk, say), which is as it was before;
                or the last flush to a URL failed, and this line waits with those before it.
        """
        if self._sink.closed:
            where = without_credentials(str(self.path))
            raise InvalidValueError(f"The metrics log {where} is closed, so nothing can be written to it.")
        self._sink.append(encoded(metrics))

    def flush(self) -> None:
        """Store every line now. (Of a file every line has left the process when ``write`` returns.)

        Raises:
            OSError: that failed; the lines wait for the next flush.
        """
        self._sink.flush()

    def close(self) -> None:
        """Store every line and close the log. Closing twice is no error.

        Raises:
            OSError: the last lines could not be stored and are lost.
        """
        self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, traceback
        if error is None:
            self.close()
            return
        try:
            self._sink.close(patience_secs=_LAST_FLUSH_SECS)
        except OSError as failure:
            _log.error("%s", failure)  # what ended the block is the error to raise


def _checked_step(step: Any) -> int:
    try:
        checked = operator.index(step)
    except TypeError:
        checked = -1
    if isinstance(step, bool) or checked < 0:
        raise InvalidValueError(f"resume_step must be an integer of 0 or more, or None, not {step!r}.")
    return checked


def _checked_secs(secs: Any) -> float:
    if isinstance(secs, bool) or not isinstance(secs, int | float) or not (math.isfinite(secs) and secs > 0):
        raise InvalidValueError(f"flush_secs must be a number above 0, not {secs!r}.")
    return float(secs)
