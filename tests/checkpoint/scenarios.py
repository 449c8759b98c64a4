"""Writing to a directory of checkpoints, and what must hold of it afterwards, however the writing went."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vibe_store.checkpoint.directory import initialize_checkpoint_dir
from vibe_store.checkpoint.looking import list_checkpoints, load_manifest
from vibe_store.checkpoint.manager import CheckpointManager
from vibe_store.checkpoint.oneshot import load_metadata, save_checkpoint
from vibe_store.checkpoint.step_index import mark_key
from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.errors import CheckpointNotFoundError
from vibe_store.interfaces import StorageBackend

OLD_STEPS = (1, 2, 3)
NEW_STEP = 4
LATER_STEP = 9


def tree(seed: int) -> dict[str, Any]:
    """A small pytree of NumPy leaves, another one for each seed."""
    random = np.random.default_rng(seed)
    return {"w": random.normal(size=(3, 4)).astype(np.float32), "n": np.arange(seed, seed + 5), "k": seed}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        type(one[key]) is type(other[key])
        and np.asarray(one[key]).dtype == np.asarray(other[key]).dtype
        and np.asarray(one[key]).tobytes() == np.asarray(other[key]).tobytes()
        for key in ("w", "n", "k")
    )


def manager_of(storage: StorageBackend, **options: Any) -> CheckpointManager:
    return CheckpointManager(storage, async_timeout_secs=None, **options)


def save(manager: CheckpointManager, step: int, seed: int) -> None:
    manager.save(step, tree(seed), items={"aux": tree(seed + 1000)}, metadata={"seed": seed})


def prepare(storage: StorageBackend) -> None:
    with manager_of(storage) as manager:
        for step in OLD_STEPS:
            save(manager, step, step)


def save_new(storage: StorageBackend) -> None:
    with manager_of(storage) as manager:
        save(manager, NEW_STEP, NEW_STEP)


def replace(storage: StorageBackend) -> None:
    save_checkpoint(storage, tree(33), step=3, items={"aux": tree(1033)}, metadata={"seed": 33})


def prune(storage: StorageBackend) -> None:
    with manager_of(storage, max_to_keep=1) as manager:
        save(manager, NEW_STEP, NEW_STEP)


def wipe(storage: StorageBackend) -> None:
    initialize_checkpoint_dir(storage, overwrite=True)


SCENARIOS: dict[str, Callable[[StorageBackend], None]] = {
    "save": save_new,
    "replace": replace,
    "prune": prune,
    "wipe": wipe,
}


def held(storage: StorageBackend, step: int) -> int | None:
    """Return the seed of what a step holds, whole, or None where there is no such step."""
    try:
        manifest = load_manifest(storage, step=step)
    except CheckpointNotFoundError:
        return None
    like = {"w": np.zeros((3, 4), np.float32), "n": np.zeros(5, int), "k": 0}
    state, items = manager_of(storage).restore(step, like, items={"aux": like})
    seed = int(state["k"])
    assert manifest.step == step
    assert same(state, tree(seed))
    assert same(items["aux"], tree(seed + 1000))
    assert load_metadata(storage, step=step) == {"seed": seed}
    return seed


def check(scenario: str, storage: StorageBackend) -> bool:
    """Check that every step is wholly old, wholly new or absent, as the scenario allows.

    Returns:
        Whether the whole of the scenario took place.
    """
    found = {step: held(storage, step) for step in (*OLD_STEPS, NEW_STEP)}
    listed = [status for status in list_checkpoints(storage) if status.status != "set-aside"]
    assert [status.step for status in listed] == [step for step, seed in found.items() if seed is not None]
    assert {status.status for status in listed} <= {"committed"}
    assert manager_of(storage).all_steps() == [status.step for status in listed]
    old = {step: step for step in OLD_STEPS}
    if scenario == "save":
        assert found in ({**old, NEW_STEP: None}, {**old, NEW_STEP: NEW_STEP})
        return found[NEW_STEP] is not None
    if scenario == "replace":
        assert found in ({**old, NEW_STEP: None}, {**old, 3: 33, NEW_STEP: None})
        return found[3] == 33
    assert all(found[step] in {step, None} for step in OLD_STEPS)
    if scenario == "prune":
        assert found[NEW_STEP] in {NEW_STEP, None}
        assert found[NEW_STEP] is not None or all(found[step] for step in OLD_STEPS)
        return found[NEW_STEP] is not None and not any(found[step] for step in OLD_STEPS)
    assert found[NEW_STEP] is None
    return not any(found.values())


def keys_of(storage: StorageBackend) -> set[str]:
    """Every key; on a local disk every file, those that a storage hides too."""
    root = storage.local_path("")
    if root is None:
        return {blob.key for blob in storage.list()}
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}


def garbage(storage: StorageBackend) -> set[str]:
    """Every key that no manifest names, less those that are ours for good.

    Where a storage cannot be locked, some of it stays until it is old enough: what is left of that then.
    """
    if storage.local_path("") is None:
        sweep_unnamed(storage, older_than=0.0)
    return _unnamed(storage)


def _unnamed(storage: StorageBackend) -> set[str]:
    named = {".vibe_store/writer.lock", ".vibe_store/writer.json"}
    for status in list_checkpoints(storage):
        if status.status == "committed":
            folder = f"step_{status.step}/"
            manifest = load_manifest(storage, step=status.step)
            named |= {f"{folder}manifest.json", *(f"{folder}{file.key}" for file in manifest.files)}
            named.add(mark_key(status.step))
    return keys_of(storage) - named


def check_next_writer(storage: StorageBackend) -> None:
    """Check that another writer can save, and sweeps what the one before left."""
    with manager_of(storage, max_to_keep=100) as manager:
        save(manager, LATER_STEP, LATER_STEP)
    assert held(storage, LATER_STEP) == LATER_STEP
    left = _unnamed(storage)
    assert not left, left
    marked = {mark_key(step) for step in manager.all_steps()} & keys_of(storage)
    assert len(marked) == (0 if storage.local_path("") else len(manager.all_steps()))
    root = storage.local_path(".vibe_store/staging")
    assert root is None or not root.exists() or list(root.iterdir()) == []
