"""Every exception and warning of vibe_store; each exception also derives from a standard one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

__all__ = [
    "CheckpointNotFoundError",
    "CheckpointerClosedError",
    "CheckpointsExistError",
    "CorruptCheckpointError",
    "DamagedCheckpointWarning",
    "InvalidValueError",
    "MissingDependencyError",
    "NewerFormatError",
    "PluginError",
    "SaveFailedError",
    "SaveTimeoutError",
    "StepAlreadyExistsError",
    "TemplateMismatchError",
    "TrainerFailedError",
    "UnknownProviderError",
    "UnsupportedLeafError",
    "UnverifiedCheckpointWarning",
    "VibeStoreError",
    "VibeStoreWarning",
    "WriterLockedError",
    "WriterSupersededError",
]


class VibeStoreError(Exception):
    """Base class of every exception that vibe_store raises on purpose."""


class InvalidValueError(VibeStoreError, ValueError):
    """An argument has a value that cannot be used; the message names the argument and the value."""


class CheckpointNotFoundError(VibeStoreError, FileNotFoundError):
    """No checkpoint (or no such item or file of it) where one was asked for."""


class CheckpointerClosedError(VibeStoreError, RuntimeError):
    """A checkpointer was asked to write after it had been closed."""


class CheckpointsExistError(VibeStoreError, FileExistsError):
    """The directory already holds checkpoints, and neither ``resume`` nor ``overwrite`` was asked for."""


class StepAlreadyExistsError(VibeStoreError, FileExistsError):
    """A checkpoint of this step is already committed."""


class CorruptCheckpointError(VibeStoreError, ValueError):
    """What is stored is not what was written: a size, a checksum or the manifest itself does not hold."""


class NewerFormatError(VibeStoreError, ValueError):
    """The checkpoint was written in a format that only a newer vibe_store can read."""


class TemplateMismatchError(VibeStoreError, ValueError):
    """The template and the checkpoint differ.

    ``differences`` holds one sentence for each differing leaf, each beginning with the leaf's path;
    ``paths`` holds those paths in the same order.
    """

    def __init__(self, message: str, *, differences: Sequence[str] = (), paths: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)
        self.paths = tuple(paths)


class UnsupportedLeafError(VibeStoreError, TypeError):
    """A leaf of the pytree cannot be stored; the message names its path and type."""


class SaveFailedError(VibeStoreError, RuntimeError):
    """A save in the background failed; ``step`` says which, ``__cause__`` why."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling calls the class with `args` alone, which has no step.
        return partial(type(self), step=self.step), self.args, self.__dict__


class SaveTimeoutError(VibeStoreError, TimeoutError):
    """A save in the background did not finish within ``async_timeout_secs``."""


class TrainerFailedError(VibeStoreError, RuntimeError):
    """A trainer that was to be killed and resumed failed by itself, or did not resume."""


class WriterLockedError(VibeStoreError, BlockingIOError):
    """Another process is writing to this directory."""


class WriterSupersededError(VibeStoreError, RuntimeError):
    """Another process has become the writer of this directory, in a bucket, say, which cannot be locked."""


class PluginError(VibeStoreError, RuntimeError):
    """A plugin is broken, misspells a hook, or claims a name that another plugin already has."""


class UnknownProviderError(VibeStoreError, ValueError):
    """No plugin provides a storage, serializer or retention policy of this name."""


class MissingDependencyError(VibeStoreError, ImportError):
    """A provider exists, but a package that it needs is not installed; the message says what to install."""


class VibeStoreWarning(UserWarning):
    """Base class of every warning that vibe_store issues."""


class UnverifiedCheckpointWarning(VibeStoreWarning):
    """What was read carries no checksum of ours (a file of plain Equinox, say), so rot would go unnoticed."""


class DamagedCheckpointWarning(VibeStoreWarning):
    """A checkpoint does not verify, and an older one is used in its place."""
