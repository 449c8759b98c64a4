"""Every promise of StorageBackend, held by the three storages."""

import uuid
from typing import Any

import pytest

from vibe_store.testing import StorageContract, StorageRoot

pytestmark = pytest.mark.proof


def root_of(bucket: Any) -> StorageRoot:
    path = f"{uuid.uuid4().hex}/root"
    return StorageRoot(
        open=lambda: bucket.open(path),
        raw_set=lambda key, data: bucket.raw_set(f"{path}/{key}", data),
        raw_get=lambda key: bucket.raw_get(f"{path}/{key}"),
        secrets=bucket.secrets,
    )


class TestS3Obstore(StorageContract):
    @pytest.fixture
    def root(self, s3: Any) -> StorageRoot:
        return root_of(s3)


class TestGcsObstore(StorageContract):
    @pytest.fixture
    def root(self, gs: Any) -> StorageRoot:
        return root_of(gs)


class TestAzureObstore(StorageContract):
    @pytest.fixture
    def root(self, az: Any) -> StorageRoot:
        return root_of(az)
