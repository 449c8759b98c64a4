"""What two writers did to a directory, with faults and crashes, is what a model says.

The rules are those of ``vibe_store.testing.state_machine``. At least 10,000 run in memory and 500 on disk,
the same ones each time. With the environment variable ``VIBE_STORE_STATE_MACHINE_STEPS`` set to a number, that
many run in memory, a twentieth of them on disk, and other ones each time; a million takes about an hour
(keeping the log of them all would take longer)::

    VIBE_STORE_STATE_MACHINE_STEPS=1000000 pytest -n 0 -p no:logging tests/checkpoint/test_state_machine.py
"""

import os
import uuid
from pathlib import Path

import pytest

from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import check_directory

pytestmark = pytest.mark.proof

_BY_HAND = os.environ.get("VIBE_STORE_STATE_MACHINE_STEPS")
_RULES = int(_BY_HAND or 10_000)


def test_a_directory_in_memory_holds_what_the_model_says(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(fast_path))  # what is loaded from memory passes through it
    check_directory(
        lambda: MemoryStorage(f"memory://{uuid.uuid4().hex}"), rules=_RULES, vary=_BY_HAND is not None
    )


def test_a_directory_on_disk_holds_what_the_model_says(fast_path: Path) -> None:
    check_directory(
        lambda: LocalStorage(str(fast_path / uuid.uuid4().hex / "checkpoints")),
        rules=_RULES // 20,
        vary=_BY_HAND is not None,
    )
