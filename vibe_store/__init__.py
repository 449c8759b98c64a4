"""One checkpoint interface for JAX over any storage, any serializer and any retention policy.

Every public name is imported when it is first used, so ``import vibe_store`` costs next to nothing and pulls
in neither JAX nor a storage library.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vibe_store import errors
    from vibe_store.checkpoint import (
        CheckpointManager,
        initialize_checkpoint_dir,
        load_checkpoint,
        load_eqx,
        load_metadata,
        save_checkpoint,
        save_eqx,
    )
    from vibe_store.interfaces import (
        Blob,
        Checkpointer,
        CheckpointInfo,
        RetentionPolicy,
        Serializer,
        StorageBackend,
    )
    from vibe_store.metrics import MetricsLogger
    from vibe_store.registry import open_storage
    from vibe_store.run_dir import RunDir

    __version__: str

__all__ = [
    "Blob",
    "CheckpointInfo",
    "CheckpointManager",
    "Checkpointer",
    "MetricsLogger",
    "RetentionPolicy",
    "RunDir",
    "Serializer",
    "StorageBackend",
    "__version__",
    "errors",
    "initialize_checkpoint_dir",
    "load_checkpoint",
    "load_eqx",
    "load_metadata",
    "open_storage",
    "save_checkpoint",
    "save_eqx",
]

_HOME = {
    "Blob": "vibe_store.interfaces",
    "CheckpointInfo": "vibe_store.interfaces",
    "CheckpointManager": "vibe_store.checkpoint",
    "Checkpointer": "vibe_store.interfaces",
    "MetricsLogger": "vibe_store.metrics",
    "RetentionPolicy": "vibe_store.interfaces",
    "RunDir": "vibe_store.run_dir",
    "Serializer": "vibe_store.interfaces",
    "StorageBackend": "vibe_store.interfaces",
    "initialize_checkpoint_dir": "vibe_store.checkpoint",
    "load_checkpoint": "vibe_store.checkpoint",
    "load_eqx": "vibe_store.checkpoint",
    "load_metadata": "vibe_store.checkpoint",
    "open_storage": "vibe_store.registry",
    "save_checkpoint": "vibe_store.checkpoint",
    "save_eqx": "vibe_store.checkpoint",
}


def __getattr__(name: str) -> object:
    value: object
    if name == "errors":
        value = importlib.import_module("vibe_store.errors")
    elif name == "__version__":
        value = _version()
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    try:
        return importlib.metadata.version("vibe-store")
    except importlib.metadata.PackageNotFoundError:
        # The source tree is on the path without being installed, so no version is recorded anywhere.
        return "0+unknown"
