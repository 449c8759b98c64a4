"""Reading a metrics log back, from wherever it is."""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vibe_store.errors import VibeStoreWarning
from vibe_store.metrics.lines import parsed
from vibe_store.metrics.segments import Segments
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["read_metrics"]


def read_metrics(
    path: str | os.PathLike[str] | UrlPath, *, storage_options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the lines of a metrics log, in the order in which they were written.

    Args:
        path: what :class:`MetricsLogger` was given: a file, or a URL whose segments are read.
        storage_options: options of the storage of a URL, such as credentials.

    Returns:
        A dict for each line. Lines that are no JSON objects (one that a killed writer cut short, say) are
        passed over, with a warning.

    Raises:
        FileNotFoundError: there is no such log.
    """
    place = place_of(path, storage_options)
    records, strange = [], []
    for line in _lines_at(place) if isinstance(place, UrlPath) else _lines_in(place):
        record = parsed(line)
        if record is not None:
            records.append(record)
        elif line.strip():
            strange.append(line)
    if strange:
        warnings.warn(
            f"{len(strange)} lines of the metrics log {without_credentials(str(place))} are no JSON objects "
            f"and are passed over; the first is {strange[0][:80]!r}.",
            VibeStoreWarning,
            stacklevel=2,
        )
    return records


def _lines_in(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        yield from lines


def _lines_at(url: UrlPath) -> Iterator[bytes]:
    segments = Segments.at(url)
    numbers = segments.numbers()
    if not numbers:
        raise FileNotFoundError(f"There is no metrics log {without_credentials(url.url)}.")
    for data in segments.read(numbers):
        yield from io.BytesIO(data)
