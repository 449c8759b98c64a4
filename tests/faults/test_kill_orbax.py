"""A writer whose files Orbax writes, from threads of its own, is killed at random moments of its saves.

It is killed a hundred times, or as often as the environment variable ``VIBE_STORE_TEST_KILLS`` says; at other
moments each time, as what the threads do by then is never the same anyhow.
"""

import os
import random
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import CheckpointManager, list_checkpoints, load_manifest, verify_checkpoint

pytestmark = pytest.mark.proof

KILLS = int(os.environ.get("VIBE_STORE_TEST_KILLS", "100"))


def _said(log: Path) -> list[str]:
    """The whole lines of what a writer has said so far."""
    return log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []


def _committed(log: Path) -> dict[int, int]:
    """The seed that each step was last saved with, according to those who saved it."""
    pairs = [line.split() for line in _said(log) if line != "ready"]
    return {int(step): int(seed) for step, seed in pairs}


class Reader:
    """Reads each checkpoint that a writer left, bit for bit; one whose files did not change only once."""

    def __init__(self, root: Path, writing: ModuleType) -> None:
        self._root, self._writing = root, writing
        self._known: dict[tuple[int, str], int] = {}

    def held(self) -> dict[int, int]:
        """Return the seed of each step, having made sure that all of it is there, and of no half a one."""
        listed = list_checkpoints(self._root)
        assert {status.status for status in listed} <= {"committed"}
        found = {status.step: self._seed_of(status.step) for status in listed}
        assert not found or verify_checkpoint(self._root) == []
        return found

    def newest(self) -> int:
        """Return the seed of the newest checkpoint."""
        return int(CheckpointManager(self._root).restore(None, self._writing.tree(0))["seed"])

    def _seed_of(self, step: int) -> int:
        place = step, load_manifest(self._root, step=step).attempt
        if place not in self._known:
            tree = self._writing.tree
            reader = CheckpointManager(self._root)
            state, items = reader.restore(step, tree(0), items={"aux": tree(0)})
            seed = int(state["seed"])
            assert self._writing.same(state, tree(seed))
            assert self._writing.same(items["aux"], tree(seed + 1000))
            assert reader.metadata(step) == {"seed": seed}
            self._known[place] = seed
        return self._known[place]


def _wait_for(lines: int, log: Path, child: Any) -> None:
    deadline = time.monotonic() + 60
    while len(_said(log)) < lines:
        assert time.monotonic() < deadline, child.output
        time.sleep(0.002)


def test_killed_at_any_moment_every_checkpoint_is_whole_and_what_was_committed_stays(
    fast_path: Path, tmp_path: Path, writing: ModuleType, writers: Any
) -> None:
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    root, log = fast_path / "run" / "checkpoints", tmp_path / "said"
    reader = Reader(root, writing)
    unfinished, longest = 0, 0.0
    for life in range(1 + KILLS):
        lines = len(_said(log))
        child = writers.start("save_for_ever(**arguments)", root=str(root), serializer="orbax", log=str(log))
        _wait_for(lines + 1, log, child)
        if life == 0:  # see how long two saves take
            began = time.monotonic()
            _wait_for(lines + 3, log, child)
            longest = 1.2 * (time.monotonic() - began)
        time.sleep(dice.uniform(0, longest))
        child.kill()
        unfinished += any((root / ".vibe_store" / "staging").glob("*"))
        held, said = reader.held(), _committed(log)
        for step, committed_seed in said.items():
            if sum(each > step for each in held) < 2:  # else max_to_keep may have let it go
                assert held.get(step, -1) >= committed_seed, (seed, life, held, said)
        for step, found_seed in held.items():  # its writer may have been killed before it could say so
            assert found_seed in {said.get(step), 100 * step, 100 * step + 1}, (seed, life, held, said)
    assert unfinished >= KILLS // 10, "the moments were no random ones"
    assert len(_committed(log)) >= KILLS // 10, "the moments were no random ones"
    assert reader.newest() == held[max(held)]
    with CheckpointManager(root, serializer="orbax", max_to_keep=100) as manager:
        manager.save(10**6, writing.tree(1))
    assert writing.stray(root) == set()
