"""Buckets of three kinds on servers of this machine, and the plugin as if it were installed.

The server of S3, the proxy and the checks of every object store are those of vibe_store's own tests, as the
plugin lives in one repository with them.
"""

import dataclasses
import fcntl
import importlib
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bucket import Bucket

from vibe_store import registry
from vibe_store.interfaces import StorageBackend

_PROJECT = Path(__file__).parents[1]
_AZURITE = "azurite@3.37.0"
_PATIENCE_SECS = 60.0
_ANSWERS_WITHIN_SECS = 0.5
_S3_SECRET = uuid.uuid4().hex

# The account of every emulator of Azure, which Microsoft publishes.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A shell starts what runs in its background with Ctrl-C ignored, and every process from there inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class ObstoreBucket(Bucket):
    """A bucket of a server, for the plugin.

    Attributes:
        endpoint: the name of the option that says where the server is.
        raw_set: stores an object without the plugin, by its name in the bucket.
        raw_get: returns the bytes of an object, or None where there is none, likewise.
        list_uploads: returns the unfinished uploads whose name begins so.
    """

    endpoint: str
    raw_set: Callable[[str, bytes], object]
    raw_get: Callable[[str], bytes | None]
    list_uploads: Callable[[str], list[Any]]

    @property
    def secrets(self) -> tuple[str, ...]:
        """What nothing may show."""
        names = ("account_key", "bearer_token", "secret_access_key")
        return tuple(self.storage_options[name] for name in names if name in self.storage_options)

    def through(self, proxy: Any, **options: Any) -> "ObstoreBucket":
        place = self.storage_options[self.endpoint].replace(self.server, proxy.url)
        return dataclasses.replace(
            self, server=proxy.url, storage_options={**self.storage_options, self.endpoint: place, **options}
        )

    def patience(self, seconds: float) -> dict[str, Any]:
        return {"client_options": {"allow_http": True, "read_timeout": f"{int(seconds * 1000)}ms"}}

    def uploads(self, prefix: str) -> list[Any]:
        return self.list_uploads(prefix)

    def opener(self) -> Callable[[], StorageBackend]:
        """Return what opens the same, at first empty, root each time."""
        path = f"{uuid.uuid4().hex}/root"
        return lambda: self.open(path)


def _load(path: Path) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        return importlib.import_module(path.stem)


@pytest.fixture(scope="session", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the entry point be found in this process and its children, where only the source is on the path."""
    try:
        importlib.metadata.version("vibe-store-obstore")
    except importlib.metadata.PackageNotFoundError:
        site = tmp_path_factory.mktemp("site")
    else:
        yield
        return
    project = tomllib.loads((_PROJECT / "pyproject.toml").read_text())["project"]
    info = site / f"vibe_store_obstore-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    rows = [f"{name} = {target}" for name, target in project["entry-points"]["vibe_store"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[vibe_store]", *rows, ""]))
    paths = [str(site), str(_PROJECT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(_PROJECT)
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        # Other tests of this process may have asked for the registry, which is made once.
        patch.setattr(registry, "_default", type(registry._default)())
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[ObstoreBucket]:
    """A bucket of moto's S3 server."""
    pytest.importorskip("moto.server", reason='needs pip install "moto[s3,server]"')
    import servers

    with servers.s3_server() as url:
        seen = servers.s3_bucket(url, secret=_S3_SECRET)
        options = {
            "endpoint": url,
            "region": servers.REGION,
            "access_key_id": seen.storage_options["key"],
            "secret_access_key": _S3_SECRET,
            "client_options": {"allow_http": True},
        }
        yield ObstoreBucket(
            "s3+obstore://bucket",
            url,
            options,
            _ANSWERS_WITHIN_SECS,
            "endpoint",
            seen.raw_set,
            seen.raw_get,
            seen.uploads,
        )


@pytest.fixture(scope="session")
def gs() -> Iterator[ObstoreBucket]:
    """A bucket of a server of Google's XML API, which is in ``gcs_server.py``."""
    module = _load(Path(__file__).with_name("gcs_server.py"))
    with module.gcs_server() as server:
        bucket = server.buckets["bucket"] = module.Bucket()

        def raw_set(name: str, data: bytes) -> None:
            with bucket.lock:
                bucket.set(name, data, {})

        def raw_get(name: str) -> bytes | None:
            found = bucket.objects.get(name)
            return found.data if found else None

        options = {
            "base_url": server.url,
            "bearer_token": module.TOKEN,
            "client_options": {"allow_http": True},
        }
        yield ObstoreBucket(
            "gs+obstore://bucket",
            server.url,
            options,
            _ANSWERS_WITHIN_SECS,
            "base_url",
            raw_set,
            raw_get,
            lambda prefix: [each for each in bucket.uploads.values() if each.name.startswith(prefix)],
        )


@pytest.fixture(scope="session")
def az() -> Iterator[ObstoreBucket]:
    """A container of the real Azurite."""
    blob = pytest.importorskip("azure.storage.blob", reason="needs pip install azure-storage-blob")
    from azure.core.exceptions import ResourceNotFoundError

    with _azurite() as url:
        service = blob.BlobServiceClient(f"{url}/{_ACCOUNT}", {"account_name": _ACCOUNT, "account_key": _KEY})
        container = service.create_container("container")

        def raw_get(name: str) -> bytes | None:
            try:
                return bytes(container.download_blob(name).readall())
            except ResourceNotFoundError:
                return None

        options = {
            "account_name": _ACCOUNT,
            "account_key": _KEY,
            "endpoint": f"{url}/{_ACCOUNT}",
            "client_options": {"allow_http": True},
        }
        yield ObstoreBucket(
            "az+obstore://container",
            url,
            options,
            3 * _ANSWERS_WITHIN_SECS,
            "endpoint",
            lambda name, data: container.upload_blob(name, data, overwrite=True),
            raw_get,
            lambda _prefix: [],  # blocks of an upload that is not finished belong to nothing that is listed
        )
        container.close()
        service.close()


@pytest.fixture(params=["s3", "gs", "az"])
def bucket(request: pytest.FixtureRequest) -> ObstoreBucket:
    """A bucket of each kind."""
    found: ObstoreBucket = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[Any]:
    """A proxy in front of the bucket's server, which fails when it is told to."""
    from proxy import run_proxy

    with run_proxy(bucket.server) as running:
        yield running


@contextmanager
def _azurite() -> Iterator[str]:
    """Run Azurite, which npm installs into the user's cache the first time; yield its URL."""
    node = shutil.which("node")
    main = _install_azurite()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [str(node), str(main), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    command += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _PATIENCE_SECS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionError:
                assert process.poll() is None, f"{command} ended with {process.returncode}"
                assert time.monotonic() < deadline, f"{command} did not listen"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _install_azurite() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vibe_store-tests"
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("needs node and npm, of which Azurite is made")
    main = folder / _AZURITE / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that test, one installs
        if not main.exists():
            command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
            ran = subprocess.run(
                [*command, "--prefix", str(folder / _AZURITE), _AZURITE],
                capture_output=True,
                text=True,
                check=False,
            )
            if ran.returncode != 0 and "CI" not in os.environ:
                pytest.skip(f"npm could not install {_AZURITE}: {ran.stderr.strip()[-200:]}")
            assert ran.returncode == 0, ran.stderr
    return main
