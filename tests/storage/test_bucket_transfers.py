"""How many requests storages on S3 and GCS make, in which order, and how many at once."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from bucket_checks import BIG, TransferChecks
from proxy import Fault, run_proxy

from vibe_store.deadline import remaining, within
from vibe_store.errors import InvalidValueError
from vibe_store.registry import open_storage


class TestTransfers(TransferChecks):
    @pytest.fixture
    def in_parts(self, s3: Any) -> Any:
        """Google Cloud Storage takes a large file in one request."""
        return s3


@pytest.fixture
def root() -> str:
    return os.urandom(8).hex()


@pytest.fixture
def storage(proxy: Any, bucket: Any, root: str) -> Any:
    return bucket.through(proxy, retry_backoff_secs=0.01).open(root)


def test_no_cache_of_the_filesystem_is_filled(storage: Any, tmp_path: Path) -> None:
    storage.write("a/b", b"1")
    list(storage.list())
    storage.read("a/b")
    storage.get("a/b", tmp_path / "target")
    assert len(storage.fs.dircache) == 0


def test_the_marker_of_a_folder_is_no_object(s3: Any, root: str) -> None:
    client = s3.boto3_client()
    for key in ("", "folder/"):
        client.put_object(Bucket="bucket", Key=f"{root}/{key}")
    storage = s3.open(root)
    storage.write("folder/k", b"1")
    assert [blob.key for blob in storage.list()] == ["folder/k"]


@pytest.mark.parametrize(
    ("calculation", "checked"), [({}, True), ({"request_checksum_calculation": "when_required"}, False)]
)
def test_a_large_object_is_checked_by_the_store_unless_the_options_say_otherwise(
    s3: Any, root: str, tmp_path: Path, calculation: dict[str, str], checked: bool
) -> None:
    (tmp_path / "file").write_bytes(BIG)
    options = {**s3.storage_options, "config_kwargs": calculation}
    open_storage(f"{s3.url}/{root}", **options).put(tmp_path / "file", "big")
    about = s3.boto3_client().head_object(Bucket="bucket", Key=f"{root}/big", ChecksumMode="ENABLED")
    assert ("ChecksumCRC32" in about) is checked


def test_a_read_goes_to_the_store_every_time(storage: Any, bucket: Any, root: str) -> None:
    other = bucket.open(root)
    for data in (b"1", b"22", b"333"):
        other.write("k", data)
        assert storage.read("k") == data
        assert storage.read("k", 0, 9) == data
    other.delete(["k"])
    with pytest.raises(FileNotFoundError):
        storage.read("k", 5, 5)


# options


def test_the_users_own_retries_and_timeouts_win(s3: Any, gcs: Any) -> None:
    config = {"retries": {"max_attempts": 7}, "read_timeout": 99}
    storage: Any = open_storage("s3://bucket/run", **{**s3.storage_options, "config_kwargs": config})
    assert storage.fs.config_kwargs["retries"] == {"max_attempts": 7}
    assert storage.fs.config_kwargs["read_timeout"] == 99
    storage = open_storage("gs://bucket/run", **{**gcs.storage_options, "requests_timeout": 99})
    assert storage.fs.requests_timeout == 99


@pytest.mark.parametrize(
    "options",
    [
        {"retry_attempts": 0},
        {"retry_attempts": "3"},
        {"retry_attempts": 2.5},
        {"retry_backoff_secs": -1},
        {"retry_backoff_secs": "1"},
        {"retry_backoff_secs": float("nan")},
    ],
)
def test_retries_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    pytest.importorskip("s3fs", reason='needs pip install "vibe-store[s3]"')
    with pytest.raises(InvalidValueError, match=r"retry_\w+ is .*; got "):
        open_storage("s3://bucket/run", **options)


def test_no_options_of_botocore_may_be_said_as_none() -> None:
    pytest.importorskip("s3fs", reason='needs pip install "vibe-store[s3]"')
    assert open_storage("s3://bucket/run", config_kwargs=None).url == "s3://bucket/run"


def test_the_session_of_an_upload_is_in_no_error_and_no_log(
    gcs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "source").write_bytes(BIG)
    with run_proxy(gcs.server) as proxy:
        storage = gcs.through(proxy, retry_attempts=2, retry_backoff_secs=0.01).open("secret")
        proxy.faults = lambda index, _: Fault("status", 403) if index else None
        with caplog.at_level(logging.INFO), pytest.raises(PermissionError, match="Forbidden: ") as caught:
            storage.put(tmp_path / "source", "k")
        session = proxy.requests[1].query.rpartition("upload_id=")[2]
    shown, error = caplog.text, caught.value
    while error is not None:
        shown += f"{error} {error!r} {json.dumps(getattr(error, '__notes__', []))}"
        error = error.__cause__ or error.__context__
    assert session
    assert session not in shown


# the deadline


def test_the_earlier_of_two_deadlines_holds() -> None:
    assert remaining() is None
    with within(100):
        with within(1):
            assert 0 < (remaining() or 0) <= 1
            with within(50):
                assert 0 < (remaining() or 0) <= 1
        assert 90 < (remaining() or 0) <= 100
    assert remaining() is None


def test_a_deadline_that_has_passed_leaves_nothing() -> None:
    with within(-1):
        assert remaining() == 0
