"""UrlPath: a URL that takes ``/``, and which places are URLs at all."""

import copy
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from vibe_store import load_checkpoint, load_eqx, save_checkpoint, save_eqx
from vibe_store.errors import InvalidValueError
from vibe_store.metrics import MetricsLogger, read_metrics
from vibe_store.run_dir import RunDir
from vibe_store.storage.url_path import UrlPath, place_of, url_path_of


def test_a_path_has_a_name_a_parent_and_places_below() -> None:
    path = UrlPath("s3://bucket/runs/") / "run" / "checkpoints/step_5"
    assert str(path) == "s3://bucket/runs/run/checkpoints/step_5"
    assert path.name == "step_5"
    assert path.parent == UrlPath("s3://bucket/runs/run/checkpoints")
    assert UrlPath("s3://bucket").parent.parent == UrlPath("s3://")
    assert str(UrlPath("memory://") / "a") == "memory://a"
    assert str(UrlPath("file:///") / "tmp") == "file:///tmp"
    assert UrlPath("file:///tmp").parent == UrlPath("file:///")
    assert str(UrlPath("zip://a::file:///x.zip") / "b") == "zip://a/b::file:///x.zip"


def test_the_options_come_along_and_are_shown_nowhere() -> None:
    path = UrlPath("ftp://user:hunter2@host/runs", {"password": "hunter3"})
    assert (path / "run").parent.storage_options == {"password": "hunter3"}
    assert repr(path / "run") == "UrlPath('ftp://user@host/runs/run')"
    assert str(path) == "ftp://user:hunter2@host/runs"


def test_paths_are_equal_by_url_and_options_and_can_be_keys() -> None:
    one, same = UrlPath("s3://b/r", {"anon": True}), UrlPath("s3://b/r/", {"anon": True})
    assert one == same
    assert len({one, same, UrlPath("s3://b/r")}) == 2
    assert copy.deepcopy(one) == one
    with pytest.raises(AttributeError, match="cannot be set"):
        one.url = "s3://other"
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301 - it is ours


def test_a_configuration_that_holds_one_is_not_taken_apart_with_its_secrets() -> None:
    config = dataclasses.make_dataclass("Config", ["place"])(UrlPath("s3://b", {"secret": "hunter2"}))
    assert "hunter2" not in repr(dataclasses.asdict(config))


def test_it_is_no_path_of_the_system() -> None:
    with pytest.raises(TypeError):
        os.fspath(UrlPath("s3://bucket"))
    with pytest.raises(TypeError):
        UrlPath("s3://bucket") / Path("a")


@pytest.mark.parametrize("name", ["", "..", "a/../b", "/a", "a//b", "a\\b"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match="cannot be used"):
        UrlPath("s3://bucket") / name


@pytest.mark.parametrize("url", ["", "runs", "/runs", "simplecache::s3://bucket/run"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError, match=r"is no URL of the form|must be a path or a URL"):
        UrlPath(url)


class UPath:
    """What universal-pathlib's paths have, which is no dependency."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url, self.storage_options = url, options
        self.protocol = url.partition("://")[0] if "://" in url else ""

    def __str__(self) -> str:
        return self._url

    def __fspath__(self) -> str:
        return self._url


def test_places_are_paths_or_url_paths() -> None:
    assert place_of("runs") == Path("runs")
    assert place_of(Path("/runs")) == Path("/runs")
    assert place_of("file:///runs") == Path("/runs")
    assert place_of(UrlPath("file:///runs")) == Path("/runs")
    assert place_of(UPath("/runs")) == Path("/runs")
    assert place_of("./s3:/bucket") == Path("s3:/bucket")
    assert place_of("s3://bucket/runs") == UrlPath("s3://bucket/runs")
    assert place_of(UPath("s3://bucket/runs", anon=True)) == UrlPath("s3://bucket/runs", {"anon": True})
    assert url_path_of("simplecache::s3://bucket") is None


def test_a_tilde_is_the_home_folder_wherever_a_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    save_checkpoint("~/run/step_5", {"a": 1})
    save_eqx("~/m.eqx", {"a": 2})
    with MetricsLogger(Path("~/m.jsonl")) as logger:
        logger.write({"step": 3})
    assert load_checkpoint("~/run", {"a": 0}, step=5) == load_eqx("~/run/step_5/state.eqx") == {"a": 1}
    assert load_eqx("~/m.eqx", {"a": 0}) == {"a": 2}
    assert read_metrics("~/m.jsonl") == [{"step": 3}]
    assert RunDir("r", base_dir="~/runs").path.parent == home / "runs"
    assert {path.name for path in home.iterdir()} == {"run", "m.eqx", "m.jsonl", "runs"}
    assert list(here.iterdir()) == []
    for place in ("file:///~/a", tmp_path / "~"):
        assert "~" in str(place_of(place))
    with pytest.raises(InvalidValueError, match="The home folder in '~no-such-user/a' is not known"):
        save_eqx("~no-such-user/a", {})


def test_options_that_are_given_win_over_those_of_the_path_by_name() -> None:
    path = UrlPath("s3://bucket", {"key": "old", "anon": False})
    found = place_of(path, {"key": "new"})
    assert isinstance(found, UrlPath)
    assert found.storage_options == {"key": "new", "anon": False}
    assert path.storage_options == {"key": "old", "anon": False}


@pytest.mark.parametrize(
    ("place", "whole"),
    [
        (Path("s3://bucket/r"), "'s3://bucket/r'"),
        (Path("/home/me") / Path("gs://bucket/r"), "'gs://bucket/r'"),
        ("hanging:/x", "'hanging://x'"),
        ("file:/x", "'file:///x'"),
    ],
)
def test_a_url_that_lost_a_slash_is_refused_with_the_whole_one(place: Any, whole: str) -> None:
    with pytest.raises(InvalidValueError, match=f"is a URL that lost a slash.*{whole}"):
        place_of(place)


def test_what_is_neither_a_path_nor_a_url_is_refused() -> None:
    for place in ("file://host", "a::s3://b", b"runs", 5, None):
        with pytest.raises(InvalidValueError, match=r"neither a path nor a URL|A place is a path or a URL"):
            place_of(place)
    with pytest.raises(InvalidValueError, match=r"no storage_options, but 'runs' was given \['key'\]"):
        place_of("runs", {"key": "secret"})
