"""What two writers did to a directory, with faults and crashes, is what a model says: see ``state_machine``.

At least 10,000 rules run in memory and 500 on disk, the same ones each time. With the environment variable
``VIBE_STORE_STATE_MACHINE_STEPS`` set to a number, that many run in memory, a twentieth of them on disk,
and other ones each time; a million takes about an hour (keeping the log of them all would take longer)::

    VIBE_STORE_STATE_MACHINE_STEPS=1000000 pytest -n 0 -p no:logging tests/checkpoint/test_state_machine.py
"""

import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage

pytestmark = pytest.mark.proof

_BY_HAND = os.environ.get("VIBE_STORE_STATE_MACHINE_STEPS")
_STEPS_AT_A_TIME = 50


@pytest.fixture(scope="session")
def state_machine(load: Callable[[Path], ModuleType]) -> ModuleType:
    """The package ``state_machine``: the model, the rules, and the machine that they make."""
    return load(Path(__file__).with_name("state_machine"))


def _run(state_machine: ModuleType, make: Callable[[], StorageBackend], rules: int) -> None:
    by_hand = _BY_HAND is not None

    class Machine(state_machine.Directory):
        rules_run = 0

    Machine.make = staticmethod(make)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=math.ceil(rules / _STEPS_AT_A_TIME * 1.3),
            stateful_step_count=_STEPS_AT_A_TIME,
            derandomize=not by_hand,
            database=None,
            deadline=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Machine.rules_run >= rules


@pytest.mark.usefixtures("dead_at_once")
def test_a_directory_in_memory_holds_what_the_model_says(
    fast_path: Path, state_machine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(fast_path))  # what is loaded from memory passes through it
    _run(state_machine, lambda: MemoryStorage(f"memory://{uuid.uuid4().hex}"), int(_BY_HAND or 10_000))


@pytest.mark.usefixtures("dead_at_once")
def test_a_directory_on_disk_holds_what_the_model_says(fast_path: Path, state_machine: ModuleType) -> None:
    _run(
        state_machine,
        lambda: LocalStorage(str(fast_path / uuid.uuid4().hex / "checkpoints")),
        int(_BY_HAND or 10_000) // 20,
    )
