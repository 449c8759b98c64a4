"""A run's folder with two real checkpoints, and the command run in this process."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vibe_store.cli import main


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def vibe_store(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """``vibe_store("ls", directory)`` runs the command in this process."""

    def run(*arguments: str | Path) -> Ran:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ran(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def pristine_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vibe_store.checkpoint import CheckpointManager

    path = tmp_path_factory.mktemp("pristine") / "run"
    with CheckpointManager(path / "checkpoints") as manager:
        for step, metric in ((10, 12.5), (20, float("nan"))):
            manager.save(
                step,
                {"w": np.ones((3, 2), np.float32), "k[0]": np.int8(1)},
                items={"runner": {"n": 3, "name": "[bold]text"}},
                metrics={"eval_return": metric},
                metadata={"env": "CartPole-v1"},
            )
    return path


@pytest.fixture
def run_path(pristine_run: Path, tmp_path: Path) -> Path:
    """A copy of a run with the committed steps 10 and 20, for this test alone."""
    return Path(shutil.copytree(pristine_run, tmp_path / "run", symlinks=True))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a module compiles once it takes from a cache from then on."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    cache = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    for name, value in cache.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
