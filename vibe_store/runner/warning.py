"""Warnings that point at the line of the user which led to them, however deep in a runner they are issued."""

import sys
import warnings

from vibe_store.errors import VibeStoreWarning

__all__ = ["warn_caller"]

_OURS = ("vibe_store.", "contextlib")
"""How the names of modules begin whose lines say nothing to a user."""


def warn_caller(message: str) -> None:
    """Issue a VibeStoreWarning that points at the innermost line outside of this package."""
    # warnings.warn can skip them by itself from Python 3.12 on.
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, VibeStoreWarning, stacklevel=level)
