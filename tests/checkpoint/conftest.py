"""Trees, storages and other processes for the tests of checkpoints."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vibe_store
from vibe_store.interfaces import StorageBackend
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage

_HERE = Path(__file__).parent
_SCENARIOS = _HERE / "scenarios.py"


def _load_scenarios() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checkpoint_scenarios", _SCENARIOS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    return _load_scenarios()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StorageBackend:
    if request.param == "local":
        return LocalStorage(str(tmp_path / "checkpoints"))
    return MemoryStorage(f"memory://{uuid.uuid4().hex}/checkpoints")


@pytest.fixture
def dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a storage that cannot be locked be swept at once, without waiting a day."""
    monkeypatch.setattr("vibe_store.checkpoint.writer._SURELY_DEAD_SECS", 0.0)


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one, as making files durable takes most of a test's time."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made there
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="vibe_store-tests-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


class Child:
    """A process that runs a piece of code."""

    def __init__(self, server: "ForkServer", pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output
        self._ended = False

    def wait(self, timeout: float = 60.0) -> int:
        status = self._server.ask(wait=self.pid, timeout=timeout)
        assert status is not None, f"process {self.pid} still runs after {timeout} s; it said:\n{self.output}"
        self._ended = True
        return int(status)

    def end(self) -> None:
        """Kill it, if a test that failed has left it."""
        if not self._ended:
            self.kill()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""


class ForkServer:
    """Starts processes in which vibe_store is imported already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []
        root = Path(vibe_store.__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, str(_SCENARIOS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )

    def start(self, code: str, **arguments: Any) -> Child:
        output = self._folder / uuid.uuid4().hex
        pid = self.ask(code=textwrap.dedent(code), arguments=arguments, output=str(output))
        self._children.append(Child(self, pid, output))
        return self._children[-1]

    def run(self, code: str, **arguments: Any) -> str:
        """Run a piece of code to its end and return what it printed."""
        child = self.start(code, **arguments)
        status = child.wait()
        assert status == 0, child.output
        return child.output

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        for child in self._children:
            child.end()
        self._process.communicate()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("output"))
    yield server
    server.close()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for something that another process or thread does."""

    def wait(happened: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60.0
        while not happened():
            assert time.monotonic() < deadline, "it did not happen within 60 s"
            time.sleep(0.005)

    return wait
