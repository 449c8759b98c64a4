"""Standard output and error that may go away while a command runs: a reader leaves, a disk is full."""

import io
import os
import warnings
from typing import TextIO

from vibe_store.errors import VibeStoreWarning

__all__ = ["LastingOutput", "silence"]


class LastingOutput(io.TextIOBase):
    """Standard output of a command that has better things to do than to end when it cannot print.

    Once the stream fails there is one warning, and what is printed from then on goes nowhere.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has an attribute; here it only is read
        """The encoding of the stream."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write a text, or nothing any more."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Hand on what was written, or nothing any more."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def isatty(self) -> bool:
        """Say whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        return self._stream.fileno()

    def _give_up(self, error: OSError) -> None:
        silence(self._stream)
        warnings.warn(
            f"Standard output cannot be written to any more ({error}), so no progress is shown; training "
            "goes on.",
            VibeStoreWarning,
            stacklevel=2,
        )


def silence(stream: TextIO) -> None:
    """Let a standard stream that failed lead nowhere, or what it still buffers would fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
