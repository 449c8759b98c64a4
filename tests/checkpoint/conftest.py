"""Trees, storages and other processes for the tests of checkpoints."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage

_SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture(scope="session")
def scenarios(load: Callable[[Path], ModuleType]) -> ModuleType:
    """The module ``scenarios.py``: what is done to a directory, and checks of what it holds then."""
    return load(_SCENARIOS)


_BUCKETS = [pytest.param(kind, marks=pytest.mark.proof) for kind in ("s3", "gcs")]


@pytest.fixture(params=["local", "memory", *_BUCKETS])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StorageBackend:
    if request.param in ("s3", "gcs"):
        bucket: Any = request.getfixturevalue(request.param)
        return bucket.open(f"{uuid.uuid4().hex}/checkpoints")
    if request.param == "local":
        return LocalStorage(str(tmp_path / "checkpoints"))
    return MemoryStorage(f"memory://{uuid.uuid4().hex}/checkpoints")


@pytest.fixture
def dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a storage that cannot be locked be swept at once, without waiting a day."""
    monkeypatch.setattr(
        "vibe_store.checkpoint.manager.sweep_unnamed",
        lambda storage, **_: sweep_unnamed(storage, older_than=0.0),
    )


@pytest.fixture
def fast_path(fast_folder: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """A fast folder for one test."""
    with fast_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def _server(fork_server: Callable[..., Any]) -> Any:
    return fork_server(_SCENARIOS, "eqx")


@pytest.fixture
def processes(_server: Any) -> Iterator[Any]:
    """Starts processes whose code sees the names of ``scenarios.py``."""
    yield _server
    _server.end_children()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for something that another process or thread does."""

    def wait(happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60.0
        while not happened():
            assert time.monotonic() < deadline, "it did not happen within 60 s"
            time.sleep(0.005)

    return wait
