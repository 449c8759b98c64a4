"""Fresh storages of each kind for the tests of storages."""

import uuid
from collections.abc import Callable

import pytest

from vibe_store.interfaces import StorageBackend
from vibe_store.storage.fsspec import FsspecStorage
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage

Opener = Callable[[], StorageBackend]
"""Opens the same, at first empty, root each time."""


def _opener(kind: str, request: pytest.FixtureRequest) -> Opener:
    if kind in ("s3", "gcs"):
        bucket, path = request.getfixturevalue(kind), f"{uuid.uuid4().hex}/root"
        return lambda: bucket.open(path)
    tmp_path = request.getfixturevalue("tmp_path")
    if kind == "local":
        return lambda: LocalStorage(str(tmp_path / "root"))
    if kind == "fsspec":
        return lambda: FsspecStorage(f"file://{tmp_path}/root")
    url = f"memory://{uuid.uuid4().hex}/root"
    return lambda: MemoryStorage(url)


_BUCKETS = [pytest.param(kind, marks=pytest.mark.proof) for kind in ("s3", "gcs")]


@pytest.fixture(params=["local", "memory", "fsspec", *_BUCKETS])
def opener(request: pytest.FixtureRequest) -> Opener:
    return _opener(request.param, request)


@pytest.fixture(params=["local", "memory", *_BUCKETS])
def exact_opener(request: pytest.FixtureRequest) -> Opener:
    """Of the kinds that create conditionally."""
    return _opener(request.param, request)


@pytest.fixture
def storage(opener: Opener) -> StorageBackend:
    return opener()


@pytest.fixture
def exact_storage(exact_opener: Opener) -> StorageBackend:
    return exact_opener()
