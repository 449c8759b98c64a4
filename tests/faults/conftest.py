"""Folders, serializers and processes to kill for the tests of faults."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vibe_store

_WRITING = Path(__file__).with_name("writing.py")


def _orbax_is_here() -> bool:
    return importlib.util.find_spec("orbax") is not None and (
        importlib.util.find_spec("orbax.checkpoint") is not None
    )


@pytest.fixture(scope="session", params=["eqx", "orbax"])
def serializer(request: pytest.FixtureRequest) -> str:
    """The name of each serializer in turn."""
    if request.param == "orbax" and not _orbax_is_here():
        pytest.skip("the extra orbax is not installed")
    return str(request.param)


@pytest.fixture(scope="session")
def writing() -> ModuleType:
    """The module ``writing.py``: scenes, and checks of what they leave."""
    spec = importlib.util.spec_from_file_location("faults_writing", _WRITING)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fast_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where the system has one, as making files durable takes most of a test's time.

    Temporary files are there too, meanwhile.
    """
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made there
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("faults")
        return
    tmp_path_factory.getbasetemp()  # pytest's own folders outlive this one
    with (
        tempfile.TemporaryDirectory(dir=memory, prefix="vibe_store-tests-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


class Child:
    """A process that carries out an order."""

    def __init__(self, server: "Writers", pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output
        self._ended = False

    def wait(self, timeout: float = 60.0) -> int:
        """Return its exit status, negative for the signal that ended it."""
        status = self._server.ask(wait=self.pid, timeout=timeout)
        assert status is not None, f"process {self.pid} still runs after {timeout} s; it said:\n{self.output}"
        self._ended = True
        return int(status)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, self.output

    def end(self) -> None:
        """Kill it, if a test that failed has left it."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def output(self) -> str:
        return self._output.read_text()


class Writers:
    """Starts processes in which all that they need is imported already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: Child | None = None
        root = Path(vibe_store.__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, str(_WRITING), "eqx", *(["orbax"] if _orbax_is_here() else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )

    def start(self, order: str, **arguments: Any) -> Child:
        if self._last is not None:
            self._last.end()
        output = self._folder / "output"
        output.touch()
        pid = self.ask(order=order, arguments=arguments, output=str(output))
        self._last = Child(self, pid, output)
        return self._last

    def run_scene(
        self, root: Path, scene: str, serializer: str, *, kill_at: int | None = None, torn: bool = False
    ) -> int:
        """Act a scene, and return the exit status: 0 where it came to its end before that call."""
        child = self.start(
            "scene", root=str(root), scene=scene, serializer=serializer, kill_at=kill_at, torn=torn, log=None
        )
        status = child.wait()
        assert status in {0, -signal.SIGKILL}, child.output
        return status

    def calls_of(self, root: Path, scene: str, serializer: str) -> list[list[str]]:
        """Act a scene to its end, and return every call that changed a file: its name and its paths."""
        log = self._folder / f"calls-{uuid.uuid4().hex}"
        child = self.start(
            "scene",
            root=str(root),
            scene=scene,
            serializer=serializer,
            kill_at=None,
            torn=False,
            log=str(log),
        )
        assert child.wait() == 0, child.output
        said = json.loads(log.read_text())
        assert serializer == "orbax" or said["unseen"] == []  # Orbax writes files from C++, and as text
        calls: list[list[str]] = said["made"]
        return calls

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        if self._last is not None:
            self._last.end()
        self._process.communicate()


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Writers]:
    server = Writers(tmp_path_factory.mktemp("writers"))
    yield server
    server.close()
