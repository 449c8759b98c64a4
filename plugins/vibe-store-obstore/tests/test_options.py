"""What the storages take as URL and options, and what they show of them; no server is asked."""

import multiprocessing
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest

from vibe_store import open_storage
from vibe_store.cli.plugins import plugins_text
from vibe_store.errors import InvalidValueError
from vibe_store.registry import Registry

S3 = {"access_key_id": "an-id", "secret_access_key": "a-secret", "region": "us-east-1"}
GS = {"bearer_token": "a-secret"}
AZ = {"account_name": "account", "account_key": "YS1zZWNyZXQ="}
OPTIONS = {"s3+obstore": S3, "gs+obstore": GS, "az+obstore": AZ}


@pytest.fixture(params=sorted(OPTIONS))
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_plugin_lists_its_three_schemes_without_importing_the_object_store() -> None:
    code = (
        "import sys; from vibe_store import registry; from vibe_store.cli import plugins;"
        "print(plugins.plugins_text(registry.Registry.from_entry_points()));"
        "assert not {'obstore', 'fsspec', 'jax'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for scheme in OPTIONS:
        assert scheme in ran.stdout
    assert "vibe-store-obstore 0.1.0" in " ".join(plugins_text(Registry.from_entry_points()).split())


@pytest.mark.parametrize(
    ("path", "url"),
    [("bucket", "bucket"), ("bucket/", "bucket"), ("b.u-c_k/a/é b?c#d/", "b.u-c_k/a/é b?c#d")],
)
def test_the_url_is_the_bucket_and_a_path(scheme: str, path: str, url: str) -> None:
    storage = open_storage(f"{scheme}://{path}", **OPTIONS[scheme])
    assert storage.url == f"{scheme}://{url}"
    assert storage.url in repr(storage)
    assert storage.concurrency > 1
    assert storage.local_path("") is None


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "names no bucket. Write it as '.*://bucket/path'"),
        ("/run", "names no bucket"),
        ("user:hidden@bucket/run", "credentials, account and endpoint as storage options"),
        ("hidden@bucket/run", "credentials, account and endpoint as storage options"),
        ("bucket?token=hidden", "must be the name of a bucket"),
        ("bucket/a//b", "one of its names is empty"),
        ("bucket/../b", "holds the name '..'"),
    ],
)
def test_a_url_of_another_form_is_refused_and_shows_no_credentials(scheme: str, path: str, says: str) -> None:
    with pytest.raises(InvalidValueError, match=says) as caught:
        open_storage(f"{scheme}://{path}", **OPTIONS[scheme])
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nope": 1}, "'nope' is not valid for store .* stand in https://developmentseed.org/obstore/"),
        ({"client_options": {"nope": 1}}, "Invalid key: nope"),
        ({"client_options": {"timeout": "soon"}}, 'failed to parse "soon" as Duration'),
        ({"retry_config": {"nope": 1}}, "retry_config has no 'nope'. It takes backoff, max_retries, retry_"),
        ({"retry_config": {"backoff": {"nope": 1}}}, r"\['backoff'\] has no 'nope'. It takes base, init_"),
        ({"retry_config": {"max_retries": "many"}}, "cannot be opened with the options"),
        ({"retry_config": {"retry_timeout": "1 s"}}, "cannot be opened with the options"),
        ({"skip_signature": object()}, "cannot be opened with the options"),
        ({"retry_attempts": 0}, "retry_attempts is a whole number, 1 or more; got 0"),
        ({"retry_backoff_secs": -1}, "retry_backoff_secs is a number of seconds, 0 or more"),
        ({"retry_backoff_secs": "1"}, "retry_backoff_secs is a number of seconds, 0 or more; got '1'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_a_sentence(
    scheme: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidValueError, match=says) as caught:
        open_storage(f"{scheme}://bucket/run", **OPTIONS[scheme], **options)
    assert "Debug source" not in str(caught.value)
    assert "secret" not in str(caught.value).replace("secret_access_key", "")


def test_an_account_that_is_missing_is_told() -> None:
    with pytest.raises(InvalidValueError, match="Account must be specified"):
        open_storage("az+obstore://container/run", account_key="YS1zZWNyZXQ=")


def test_the_users_own_retries_and_timeouts_win(scheme: str) -> None:
    retries = {"max_retries": 3, "retry_timeout": timedelta(seconds=9)}
    storage: Any = open_storage(
        f"{scheme}://bucket", **OPTIONS[scheme], client_options={"timeout": "7s"}, retry_config=retries
    )
    for client in (storage._client, storage._uploader):
        assert client.retry_config["max_retries"] == 3
        assert client.retry_config["retry_timeout"] == timedelta(seconds=9)
        assert client.client_options["timeout"] == "7s"
        assert client.client_options["connect_timeout"] == "5s"


def test_an_endpoint_without_tls_says_which_option_allows_it() -> None:
    storage = open_storage("s3+obstore://bucket/run", **S3, endpoint="http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"would be again: .*needs client_options=\{'allow_http': True\}"):
        storage.read("k")


def _read(outcome: Any) -> None:
    try:
        open_storage("s3+obstore://bucket/run", **S3, retry_attempts=1).read("k")
    except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
        outcome.put(repr(error))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks by itself")
@pytest.mark.filterwarnings("ignore:.*fork")  # which is what is tested
def test_a_forked_child_is_told_that_it_cannot_go_on() -> None:
    with pytest.raises(OSError, match="would be again"):
        open_storage("s3+obstore://bucket/run", **S3, endpoint="http://127.0.0.1:9").read("k")
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    child = context.Process(target=_read, args=(outcome,), daemon=True)
    child.start()
    assert "cannot go on in a child" in outcome.get(timeout=30)
    child.join()
