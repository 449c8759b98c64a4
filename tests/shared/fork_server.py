"""Processes that start in milliseconds, as they are forked from one that has imported all that they need.

That one is this file, run as a program: it has never computed with JAX, so forking it is safe and cheap. A
process runs a piece of code, which sees the names of one module, its ``arguments`` and ``Path``.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import vibe_store
from vibe_store.registry import get_serializer, open_storage


class Child:
    """A process that runs a piece of code."""

    def __init__(self, server: "ForkServer", pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output
        self._ended = False

    def wait(self, timeout: float = 60.0) -> int:
        """Return its exit status, negative for the signal that ended it."""
        status = self._server.ask(wait=self.pid, timeout=timeout)
        assert status is not None, f"process {self.pid} still runs after {timeout} s; it said:\n{self.output}"
        self._ended = True
        return int(status)

    @property
    def alive(self) -> bool:
        """Whether it still runs; a process that has ended stays known until :meth:`wait`."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        return state != "Z"

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
        return self._output.read_text() if self._output.exists() else ""


class ForkServer:
    """Starts processes.

    Args:
        module: the file whose names the code sees.
        serializers: the names of those to have imported.
        folder: where what the processes print is kept.
    """

    def __init__(self, module: Path, serializers: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._children: list[Child] = []
        root = Path(vibe_store.__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(module), *serializers],
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

    def end_children(self) -> None:
        while self._children:
            self._children.pop().end()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_children()
        self._process.communicate()


def _serve() -> Iterator[tuple[str, dict[str, Any]]]:
    """Answer requests; in each forked child, yield the code that it is to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: object = _wait(request["wait"], request["timeout"])
        else:
            sys.stdout.flush()
            answer = os.fork()
            if answer == 0:
                output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                yield request["code"], request["arguments"]
                return
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


if __name__ == "__main__":
    seen, *named = sys.argv[1:]
    sys.path.insert(0, str(Path(seen).parent))
    module = importlib.import_module(Path(seen).stem)
    # What is otherwise imported when it is first used: a child that gives up its rights may not read it then.
    open_storage(".")
    for each in named:
        get_serializer(each)
    gc.collect()
    gc.freeze()  # else a collection in a child would copy all memory
    # Libraries have idle threads of their own, of which the children need none.
    warnings.filterwarnings("ignore", message=".*fork")
    for code, arguments in _serve():
        # What the code defines outlives the block, so that the interpreter ends as it would for a script.
        here = vars(module) | {"Path": Path, "arguments": arguments}
        try:
            exec(compile(code, "<child>", "exec"), here)  # noqa: S102 - it comes from the tests, by a pipe that only they hold
        except Exception:  # noqa: BLE001 - the parent reads the traceback
            traceback.print_exc()
            sys.exit(1)
