"""Saving and restoring training state: the part of vibe_store that most people use.

Names are imported when they are first used, so that looking at checkpoints does not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vibe_store.checkpoint.copying import CopiedCheckpoints as CopiedCheckpoints
    from vibe_store.checkpoint.copying import CopyProgress as CopyProgress
    from vibe_store.checkpoint.copying import copy_checkpoints as copy_checkpoints
    from vibe_store.checkpoint.directory import initialize_checkpoint_dir as initialize_checkpoint_dir
    from vibe_store.checkpoint.eqx_files import load_eqx as load_eqx
    from vibe_store.checkpoint.eqx_files import save_eqx as save_eqx
    from vibe_store.checkpoint.finding import find_checkpoint as find_checkpoint
    from vibe_store.checkpoint.looking import CheckpointStatus as CheckpointStatus
    from vibe_store.checkpoint.looking import Fault as Fault
    from vibe_store.checkpoint.looking import list_checkpoints as list_checkpoints
    from vibe_store.checkpoint.looking import load_manifest as load_manifest
    from vibe_store.checkpoint.looking import verify_checkpoint as verify_checkpoint
    from vibe_store.checkpoint.manager import CheckpointManager as CheckpointManager
    from vibe_store.checkpoint.manifest import Manifest as Manifest
    from vibe_store.checkpoint.oneshot import load_checkpoint as load_checkpoint
    from vibe_store.checkpoint.oneshot import load_metadata as load_metadata
    from vibe_store.checkpoint.oneshot import save_checkpoint as save_checkpoint
    from vibe_store.checkpoint.pruning import PrunedCheckpoints as PrunedCheckpoints
    from vibe_store.checkpoint.pruning import prune_checkpoints as prune_checkpoints

_WHERE = {
    "CheckpointManager": "vibe_store.checkpoint.manager",
    "CheckpointStatus": "vibe_store.checkpoint.looking",
    "CopiedCheckpoints": "vibe_store.checkpoint.copying",
    "CopyProgress": "vibe_store.checkpoint.copying",
    "Fault": "vibe_store.checkpoint.looking",
    "Manifest": "vibe_store.checkpoint.manifest",
    "PrunedCheckpoints": "vibe_store.checkpoint.pruning",
    "copy_checkpoints": "vibe_store.checkpoint.copying",
    "find_checkpoint": "vibe_store.checkpoint.finding",
    "initialize_checkpoint_dir": "vibe_store.checkpoint.directory",
    "list_checkpoints": "vibe_store.checkpoint.looking",
    "load_checkpoint": "vibe_store.checkpoint.oneshot",
    "load_eqx": "vibe_store.checkpoint.eqx_files",
    "load_manifest": "vibe_store.checkpoint.looking",
    "load_metadata": "vibe_store.checkpoint.oneshot",
    "prune_checkpoints": "vibe_store.checkpoint.pruning",
    "save_checkpoint": "vibe_store.checkpoint.oneshot",
    "save_eqx": "vibe_store.checkpoint.eqx_files",
    "verify_checkpoint": "vibe_store.checkpoint.looking",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
