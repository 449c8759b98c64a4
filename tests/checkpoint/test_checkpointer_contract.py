"""CheckpointManager keeps the contract, wherever its directory is and in whichever thread it saves."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import CheckpointManager
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import CheckpointerContract, CheckpointerDirectory, Fault, FaultyStorage


def directory_in(storage: StorageBackend, **options: Any) -> CheckpointerDirectory:
    faulty = FaultyStorage(storage)

    @contextmanager
    def failing() -> Iterator[None]:
        faulty.faults = (Fault(lambda call: call.method in {"write", "put"}),)
        try:
            yield
        finally:
            faulty.faults = ()

    def open_manager() -> CheckpointManager:
        return CheckpointManager(
            faulty,
            max_to_keep=12,
            save_interval_steps=10,
            best_fn=lambda metrics: metrics["loss"],
            **options,
        )

    return CheckpointerDirectory(open_manager, failing)


class TestLocalManager(CheckpointerContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> CheckpointerDirectory:
        return directory_in(LocalStorage(str(tmp_path / "checkpoints")))


class TestManagerInTheForeground(CheckpointerContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> CheckpointerDirectory:
        return directory_in(LocalStorage(str(tmp_path / "checkpoints")), async_timeout_secs=None)


class TestMemoryManager(CheckpointerContract):
    @pytest.fixture
    def directory(self) -> CheckpointerDirectory:
        return directory_in(MemoryStorage(f"memory://{uuid.uuid4().hex}/checkpoints"))


class TestOrbaxManager(CheckpointerContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> CheckpointerDirectory:
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
        return directory_in(LocalStorage(str(tmp_path / "checkpoints")), serializer="orbax")


@pytest.mark.proof
class TestS3Manager(CheckpointerContract):
    @pytest.fixture
    def directory(self, s3: Any) -> CheckpointerDirectory:
        return directory_in(s3.open(f"{uuid.uuid4().hex}/checkpoints"))


@pytest.mark.proof
class TestGCSManager(CheckpointerContract):
    @pytest.fixture
    def directory(self, gcs: Any) -> CheckpointerDirectory:
        return directory_in(gcs.open(f"{uuid.uuid4().hex}/checkpoints"))
