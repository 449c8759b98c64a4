"""Folders, serializers and processes to kill for the tests of faults."""

import importlib.util
import json
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_WRITING = Path(__file__).with_name("writing.py")


def _orbax_is_here() -> bool:
    return importlib.util.find_spec("orbax") is not None and (
        importlib.util.find_spec("orbax.checkpoint") is not None
    )


@pytest.fixture(scope="session", params=["eqx", "orbax"])
def serializer(request: pytest.FixtureRequest) -> str:
    """The name of each serializer in turn."""
    if request.param == "orbax" and not _orbax_is_here():
        pytest.skip('needs pip install "vibe-store[orbax]"')
    return str(request.param)


@pytest.fixture(scope="session")
def writing(load: Callable[[Path], ModuleType]) -> ModuleType:
    """The module ``writing.py``: scenes, and checks of what they leave."""
    return load(_WRITING)


@pytest.fixture(scope="module")
def fast_path(
    fast_folder: Callable[[], AbstractContextManager[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A fast folder for all tests of a module; temporary files are there too, meanwhile."""
    tmp_path_factory.getbasetemp()  # pytest's own folders outlive this one
    with fast_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


class Writers:
    """Starts processes that see the names of ``writing.py``, to act its scenes above all."""

    def __init__(self, processes: Any, folder: Path) -> None:
        self.start, self._folder = processes.start, folder

    def run_scene(
        self, root: Path, scene: str, serializer: str, *, kill_at: int | None = None, torn: bool = False
    ) -> int:
        """Act a scene, and return the exit status: 0 where it came to its end before that call."""
        child = self._begin(root, scene, serializer, kill_at=kill_at, torn=torn)
        status: int = child.wait()
        assert status in {0, -signal.SIGKILL}, child.output
        return status

    def calls_of(self, root: Path, scene: str, serializer: str) -> list[list[str]]:
        """Act a scene to its end, and return every call that changed a file: its name and its paths."""
        log = self._folder / f"calls-{uuid.uuid4().hex}"
        child = self._begin(root, scene, serializer, log=str(log))
        assert child.wait() == 0, child.output
        said = json.loads(log.read_text())
        assert serializer == "orbax" or said["unseen"] == []  # Orbax writes files from C++, and as text
        calls: list[list[str]] = said["made"]
        return calls

    def _begin(self, root: Path, scene: str, serializer: str, **options: Any) -> Any:
        return self.start(
            "run_scene(**arguments)", root=str(root), scene=scene, serializer=serializer, **options
        )


@pytest.fixture(scope="session")
def _server(fork_server: Callable[..., Any]) -> Any:
    return fork_server(_WRITING, "eqx", *(["orbax"] if _orbax_is_here() else []))


@pytest.fixture
def writers(_server: Any, tmp_path: Path) -> Iterator[Writers]:
    yield Writers(_server, tmp_path)
    _server.end_children()
