"""Checkpoints to tamper with, and a watch on what Python opens, imports and runs while they are loaded."""

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from vibe_store.checkpoint import CheckpointManager, load_checkpoint, save_checkpoint
from vibe_store.errors import VibeStoreError

CODE = {
    "code.__new__",
    "compile",
    "ctypes.dlopen",
    "exec",
    "import",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pickle.find_class",
    "subprocess.Popen",
}
"""Audit events of code that comes to be run."""

FILES = {
    "open",
    "os.chmod",
    "os.link",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
}
"""Audit events whose first argument is the path of what is touched."""


@dataclass
class Seen:
    """What happened while a watch was on: pieces of code, and paths that were touched."""

    code: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def outside(self, *folders: Path) -> list[str]:
        """Return the touched paths that are in none of the folders."""
        roots = tuple(os.path.realpath(folder) for folder in folders)
        # A relative path is one in a folder that is open already, and was noted when it was opened.
        paths = [path for path in self.paths if os.path.isabs(path)]  # noqa: PTH117 - they are texts
        return [path for path in paths if not os.path.realpath(path).startswith(roots)]


_OF_INSPECT = b"def foo(): pass"
"""What ``inspect.signature`` compiles for a class without ``__init__``."""

_watching: list[Seen] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in CODE and not (event == "compile" and arguments[0] == _OF_INSPECT):
        _watching[-1].code.append(f"{event} {str(arguments[0])[:200]}")
    elif event in FILES and isinstance(arguments[0], str | bytes | os.PathLike):
        _watching[-1].paths.append(os.fsdecode(arguments[0]))


@pytest.fixture(scope="session")
def watch() -> Callable[[], Any]:
    """A context in which everything that is run or touched is noted."""
    sys.addaudithook(_hook)

    @contextmanager
    def watching() -> Iterator[Seen]:
        seen = Seen()
        _watching.append(seen)
        try:
            yield seen
        finally:
            _watching.remove(seen)

    return watching


def make_tree() -> Any:
    return {
        "weights": jnp.arange(6.0).reshape(2, 3),
        "half": jnp.ones(3, jnp.bfloat16),
        "host": np.arange(3),
        "key": jax.random.key(0),
        "steps": 3,
        "rate": 0.5,
        "text": "hello",
        "raw": b"bytes",
        "activation": jnp.tanh,
    }


@pytest.fixture(scope="session")
def tree() -> Any:
    return make_tree()


@pytest.fixture(scope="session")
def original(tree: Any) -> Iterator[Path]:
    """A directory with the good steps 4 and 5."""
    with tempfile.TemporaryDirectory(prefix="vibe_store-security-") as folder:
        for step in (4, 5):
            save_checkpoint(folder, tree, step=step, metadata={"env": "Pong"}, metrics={"loss": 0.5})
        # Once unwatched, as much is imported when it is first used.
        load_checkpoint(folder, tree, step=5)
        CheckpointManager(folder).restore(None, tree)
        yield Path(folder)


class Tampering:
    """A copy of a directory of checkpoints, for one who writes any bytes into it and knows the checksums."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def manifest(self, step: int = 5) -> dict[str, Any]:
        fields = json.loads((self.root / f"step_{step}" / "manifest.json").read_bytes())
        del fields["checksum"]
        return dict(fields)

    def write_manifest(self, fields: dict[str, Any], step: int = 5) -> None:
        self.write_body(json.dumps(fields)[1:].encode("utf-8", "surrogatepass"), step)

    def write_body(self, body: bytes, step: int = 5) -> None:
        """Write a manifest whose own checksum holds; ``body`` is what follows the checksum."""
        line = b'{"checksum": "' + xxhash.xxh3_128_hexdigest(body).encode() + b'",\n'
        (self.root / f"step_{step}" / "manifest.json").write_bytes(line + body)

    def write_file(self, data: bytes, name: str = "state.eqx", step: int = 5, item: str = "state") -> None:
        """Replace a file, and what the manifest says of it."""
        (self.root / f"step_{step}" / name).write_bytes(data)
        fields = self.manifest(step)
        entry = fields["metadata"] if name == "metadata.json" else fields["items"][item]["files"][name]
        entry |= {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
        self.write_manifest(fields, step)


@pytest.fixture
def tampering(original: Path, tmp_path: Path) -> Tampering:
    shutil.copytree(original, tmp_path / "checkpoints", symlinks=True)
    return Tampering(tmp_path / "checkpoints")


def check_sentence(error: BaseException) -> None:
    text = str(error)
    assert isinstance(error, VibeStoreError), repr(error)
    assert len(text) < 6000, f"{text[:300]}..."
    assert text.rstrip().endswith((".", ")", ":", "more")) or "\n" in text, text
    assert "\0" not in text
    assert "\x1b" not in text


@pytest.fixture(scope="session")
def is_sentence() -> Callable[[BaseException], None]:
    """A check that an error is one of ours, and short enough to read."""
    return check_sentence


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests in which warnings are not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
