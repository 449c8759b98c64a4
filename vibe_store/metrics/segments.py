"""The objects that hold a metrics log at a URL: ``metrics.00001.jsonl``, ``metrics.00002.jsonl``, ..."""

import io
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Self

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import StorageBackend
from vibe_store.metrics.lines import kept
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath

__all__ = ["Segments"]

_log = logging.getLogger("vibe_store")
_AT_ONCE = 8


@dataclass(frozen=True)
class Segments:
    """The segments of one log, by number; number 0 is the log's plain name (a file that was copied there)."""

    storage: StorageBackend
    name: str

    @classmethod
    def at(cls, url: UrlPath) -> Self:
        """Return the segments of the log at a URL.

        Raises:
            InvalidValueError: the URL names no object.
        """
        from vibe_store.registry import open_storage  # whoever logs to a file needs no plugins

        if url.is_root:
            raise InvalidValueError(
                f"The metrics log {without_credentials(url.url)!r} is a whole storage; give the URL of an "
                "object in it."
            )
        return cls(open_storage(url.parent.url, **url.storage_options), url.name)

    def key(self, number: int) -> str:
        """Return the key of a segment."""
        name = PurePosixPath(self.name)
        return f"{name.stem}.{number:05d}{name.suffix}" if number else self.name

    def numbers(self) -> list[int]:
        """Return the numbers of the segments that there are, ascending."""
        name = PurePosixPath(self.name)
        pattern = re.compile(rf"{re.escape(name.stem)}(?:\.(\d+))?{re.escape(name.suffix)}")
        found = [(pattern.fullmatch(blob.key), blob.key) for blob in self.storage.list(name.stem)]
        numbers = [(int(match[1] or 0), key) for match, key in found if match]
        return sorted(number for number, key in numbers if self.key(number) == key)

    def read(self, numbers: Sequence[int]) -> list[bytes]:
        """Return what these segments hold, several fetched at a time."""
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="vibe_store metrics") as threads:
            return list(threads.map(lambda number: self.storage.read(self.key(number)), numbers))

    def write(self, number: int, data: bytes) -> None:
        """Replace a segment, at once and whole."""
        self.storage.write(self.key(number), data)

    def begin(self, *, after: int) -> int:
        """Create an empty segment that no other writer has, and return its number."""
        number = after + 1
        while True:
            try:
                self.storage.write(self.key(number), b"", overwrite=False)
            except FileExistsError:
                number += 1
            else:
                return number

    def drop_past(self, numbers: Sequence[int], step: int) -> None:
        """Drop the lines past a step, of the last segment first: whoever dies meanwhile leaves no hole."""
        dropped = 0
        for number, data in reversed(list(zip(numbers, self.read(numbers), strict=True))):
            left = b"".join(kept(io.BytesIO(data), step))
            if not left:
                self.storage.delete([self.key(number)])
            elif left != data:
                self.write(number, left)
            dropped += len(data) - len(left)
        if dropped:
            _log.info("Dropped %d bytes of lines past step %d from %s.", dropped, step, self.storage.url)
