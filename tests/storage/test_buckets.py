"""What storages on S3 and GCS do beside what every storage does."""

from collections.abc import Callable
from typing import Any

import pytest

from vibe_store import load_checkpoint, save_checkpoint
from vibe_store.registry import open_storage


@pytest.fixture(params=["s3", "gcs"])
def bucket(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_a_bucket_that_does_not_exist_is_named_at_once(bucket: Any) -> None:
    url, options = bucket.url.replace("bucket", "no-such-bucket") + "/run", bucket.storage_options
    calls: list[Callable[[], object]] = [
        lambda: save_checkpoint(url, 1, step=1, storage_options=options),
        lambda: load_checkpoint(url, step=1, storage_options=options),
        lambda: list(open_storage(url, **options).list()),
    ]
    for call in calls:
        with pytest.raises(
            FileNotFoundError, match=r"There is no bucket 'no-such-bucket'.* Create the bucket"
        ):
            call()


def test_what_another_client_wrote_is_listed_and_read_at_once(bucket: Any) -> None:
    ours, others = bucket.open("fresh"), bucket.open("fresh")
    assert list(ours.list()) == []
    others.write("step_1/a", b"one")
    assert [blob.key for blob in ours.list("step_")] == ["step_1/a"]
    others.write("step_1/a", b"two!")
    assert [blob.size for blob in ours.list("step_1/")] == [4]
    assert ours.read("step_1/a") == b"two!"
    others.delete(["step_1/a"])
    assert list(ours.list()) == []
