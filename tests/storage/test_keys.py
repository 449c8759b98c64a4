"""What a key, a prefix and a root URL may be."""

import pytest

from vibe_store.durable_files import TEMPORARY_PREFIX
from vibe_store.errors import InvalidValueError
from vibe_store.storage.keys import check_key, check_keys, check_prefix, check_url, is_key

BAD_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "a/",
    "a//b",
    ".",
    "..",
    "../a",
    "a/../b",
    "a/./b",
    "a/..",
    "a\\b",
    "..\\a",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\x85b",
    "a\ud800b",
    "C:/a",
    "c:a",
    f"{TEMPORARY_PREFIX}1",
    f"a/{TEMPORARY_PREFIX}1/b",
]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_what_is_no_key_is_refused_with_its_value(key: str) -> None:
    assert not is_key(key)
    with pytest.raises(InvalidValueError) as caught:
        check_key(key)
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    "key", ["a", "a/b", "...", "..a", ".a", "a b", "é/日本/🦆", "a.b/c-d_e=f", "step_1:2", "~"]
)
def test_any_other_names_make_a_key(key: str) -> None:
    assert is_key(key)
    assert check_key(key) == key


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="bytes"):
        check_key(b"a")


@pytest.mark.parametrize("keys", ["abc", b"abc"])
def test_one_string_is_no_collection_of_keys(keys: object) -> None:
    with pytest.raises(InvalidValueError, match="not one"):
        check_keys(keys)


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "..", ".", "a/.."])
def test_whatever_a_key_can_begin_with_is_a_prefix(prefix: str) -> None:
    assert check_prefix(prefix) == prefix


@pytest.mark.parametrize(
    "prefix", ["/", "/a", "../", "a/../", "./a", "a//", "a\\", "a\0", "C:/", f"a/{TEMPORARY_PREFIX}"]
)
def test_what_no_key_begins_with_is_no_prefix(prefix: str) -> None:
    with pytest.raises(InvalidValueError, match="prefix"):
        check_prefix(prefix)


@pytest.mark.parametrize(
    ("url", "meant"),
    [("s3:/bucket/run", "s3://bucket/run"), ("file:/a", "file:///a"), ("memory:/", "memory://")],
)
def test_a_url_that_went_through_pathlib_is_refused_with_the_one_that_was_meant(url: str, meant: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        check_url(url)
    assert f"'{meant}'" in str(caught.value)


@pytest.mark.parametrize("url", ["", " ", "a\0b", "C:/a"])
def test_a_root_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["a", "./s3:/b", "~/a", "/a/b c", "s3://b/r", "file:///a", "memory://", "ab:c"]
)
def test_a_path_or_a_url_is_a_root(url: str) -> None:
    assert check_url(url) == url
