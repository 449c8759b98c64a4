"""A directory to which two writers do all that can be done, while a model says what it should hold."""

from .one_at_a_time import OneAtATime
from .two_at_once import TwoAtOnce

__all__ = ["Directory"]


class Directory(OneAtATime, TwoAtOnce):
    """All the rules together."""
