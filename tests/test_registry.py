"""From a URL or a name to the object that provides it, with plugins that exist in this process only."""

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace
from typing import Any

import fsspec
import pytest

from vibe_store import builtins
from vibe_store.discovery import Plugin
from vibe_store.errors import (
    InvalidValueError,
    MissingDependencyError,
    PluginError,
    UnknownProviderError,
)
from vibe_store.hookspecs import Provider, hookimpl
from vibe_store.interfaces import Serializer, StorageBackend
from vibe_store.provider_target import describe_target
from vibe_store.registry import Registry, get_retention, get_serializer, open_storage
from vibe_store.storage.local import LocalStorage


class Storage(LocalStorage):
    """A storage that only remembers how it was made."""

    def __init__(self, url: str, *, region: str = "eu", timeout: float | None = None) -> None:
        self.url, self.region, self.timeout = url, region, timeout


class FsspecStorage(LocalStorage):
    """A storage that needs the package of its protocol, as one over fsspec does."""

    def __init__(self, url: str) -> None:
        fsspec.get_filesystem_class(url.partition("://")[0])
        self.url = url


class NeedsAtUse(LocalStorage):
    def __init__(self, url: str) -> None:
        importlib.import_module("a_package_that_nobody_has")
        super().__init__(url)


class Refuses(LocalStorage):
    def __init__(self, url: str) -> None:
        raise MissingDependencyError(f"a sentence of its own about {url}")


class Particular(LocalStorage):
    """A storage whose constructor raises what its authors, or a mistake of theirs, raise."""

    def __init__(self, url: str, *, region: str = "") -> None:
        if region:
            raise ValueError(f"no region is called {region!r}")
        raise KeyError(url)


class Writes(Serializer):
    """A serializer that only remembers how it was made."""

    name = "writes"

    def __init__(self, *, level: int = 1, fast: bool = False) -> None:
        self.level, self.fast = level, fast

    def snapshot(self, tree: Any, *, reuse: Any = None) -> Any: ...

    def save(self, tree: Any, directory: Path, item: str) -> Any: ...

    def load(self, source: Any, item: str, like: Any, *, partial: bool = False) -> Any: ...


class Demands(Writes):
    name = "demands"

    def __init__(self, key: int) -> None:
        super().__init__(level=key)


def keeps(days: int = 1) -> Callable[[object], int]:
    return lambda _: days


def lazily(days: "int" = 1) -> Callable[[object], int]:
    return lambda _: days


def odd(days: "Missing" = 1) -> Callable[[object], int]:  # noqa: F821 - a name that only type checkers see
    return lambda _: days


class Unfinished(StorageBackend):
    def delete(self, keys: object, *, durable: bool = True) -> None: ...


RegistryOf = Callable[..., Registry]


@pytest.fixture
def registry_of(monkeypatch: pytest.MonkeyPatch) -> RegistryOf:
    """Make a registry with one plugin, whose targets are the objects above (``"targets:Storage"``)."""
    module = ModuleType("targets")
    for target in (
        *(Storage, FsspecStorage, NeedsAtUse, Refuses, Particular, Unfinished, Writes, Demands),
        *(keeps, lazily, odd),
    ):
        setattr(module, target.__name__, target)
    module.not_callable = 3
    module.makes_nothing = lambda: None
    monkeypatch.setitem(sys.modules, "targets", module)

    def make(
        *storages: Provider, serializers: tuple[Provider, ...] = (), retention: tuple[Provider, ...] = ()
    ) -> Registry:
        hooks = SimpleNamespace(
            vibe_store_storage=hookimpl(lambda: storages, specname="vibe_store_storage"),
            vibe_store_serializers=hookimpl(lambda: serializers, specname="vibe_store_serializers"),
            vibe_store_retention=hookimpl(lambda: retention, specname="vibe_store_retention"),
        )
        registry = Registry([Plugin("cloud", lambda: hooks, "vibe-store-cloud", "1.2")])
        assert registry.unavailable == ()
        return registry

    return make


def storage(name: str = "cloud", target: str = "targets:Storage", install: str = "") -> Provider:
    return Provider(name=name, target=target, install=install)


# What a URL leads to.


@pytest.mark.parametrize("url", ["cloud://bucket/run", "CLOUD://bucket/run"])
def test_a_url_is_opened_by_the_provider_of_its_scheme(registry_of: RegistryOf, url: str) -> None:
    opened = registry_of(storage()).open_storage(url, region="us")
    assert isinstance(opened, Storage)
    assert (opened.url, opened.region, opened.timeout) == ("cloud://bucket/run", "us", None)


@pytest.mark.parametrize("path", ["runs/a", "/srv/runs", "~/runs", "run:1/12:30", "C:", Path("runs/a")])
def test_a_path_is_opened_by_the_provider_of_file(registry_of: RegistryOf, path: str | Path) -> None:
    opened = registry_of(storage("file"), storage("cloud", "targets:Refuses")).open_storage(path)
    assert isinstance(opened, Storage)
    assert opened.url == str(path)


def test_a_scheme_that_only_fsspec_knows_is_opened_by_the_provider_named_fsspec(
    registry_of: RegistryOf,
) -> None:
    registry = registry_of(storage("sftp"), storage("fsspec", "targets:FsspecStorage"))
    assert isinstance(registry.open_storage("ftp://a/b"), FsspecStorage)
    assert isinstance(registry.open_storage("sftp://a/b"), Storage)


def test_a_protocol_that_was_registered_with_fsspec_is_known_too(
    registry_of: RegistryOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocols = dict(fsspec.registry)
    monkeypatch.setattr(fsspec, "registry", {**protocols, "mine": fsspec.AbstractFileSystem})
    registry = registry_of(storage("fsspec"))
    assert registry.open_storage("mine://a").url == "mine://a"


def test_a_scheme_that_nobody_knows_is_answered_with_those_that_exist(registry_of: RegistryOf) -> None:
    registry = registry_of(storage(), storage("file"), storage("fsspec"))
    with pytest.raises(UnknownProviderError) as caught:
        registry.open_storage("clod://key:secret@bucket")
    message = str(caught.value)
    assert "URLs that begin with 'clod://'" in message
    assert "Did you mean 'cloud'" in message
    assert "Those that exist are cloud and file." in message
    assert re.search(r"\d+ more come with fsspec: see fsspec\.available_protocols\(\)", message)
    assert "dropbox" not in message, "a list of fifty names helps nobody"
    assert "Install the plugin package that provides it; `vibe-store plugins` lists" in message
    assert "secret" not in message


def test_fsspec_is_no_scheme(registry_of: RegistryOf) -> None:
    with pytest.raises(UnknownProviderError, match="URLs that begin with 'fsspec://'"):
        registry_of(storage("fsspec")).open_storage("fsspec://bucket")


@pytest.mark.parametrize(
    "url",
    [
        "s3:/bucket/run",
        "cloud:/bucket",
        "s3:",
        "/home/me/s3:/bucket",
        PurePosixPath("s3://bucket/run"),
        "./gs:/b",
    ],
)
def test_a_url_that_was_made_into_a_path_is_refused(
    registry_of: RegistryOf, url: str | PurePosixPath
) -> None:
    with pytest.raises(InvalidValueError, match=r"has lost a slash.*Pass the URL as text, '(s3|gs|cloud)://"):
        registry_of(storage(), storage("file")).open_storage(url)


def test_a_refused_url_shows_no_credentials(registry_of: RegistryOf) -> None:
    with pytest.raises(InvalidValueError, match=r"'cloud:/\*\*\*@bucket' has lost a slash"):
        registry_of(storage(), storage("file")).open_storage("cloud:/key:secret@bucket")


def test_a_file_url_may_hold_what_looks_like_a_mangled_url(registry_of: RegistryOf) -> None:
    assert registry_of(storage("file")).open_storage("file:///here/s3:/b").url == "file:///here/s3:/b"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("simplecache::cloud://bucket", "'simplecache::cloud' is no scheme"),
        ("://bucket", "'' is no scheme"),
        ("", "is empty; pass '.' for the current folder"),
        (b"runs", "not by bytes b'runs'"),
        (None, "not by NoneType None"),
    ],
)
def test_what_is_neither_a_url_nor_a_path_is_refused(
    registry_of: RegistryOf, url: Any, sentence: str
) -> None:
    with pytest.raises(InvalidValueError, match=re.escape(sentence)):
        registry_of(storage(), storage("file")).open_storage(url)


# What the provider of a name is asked, and what is said when it fails.


def test_an_option_that_the_target_does_not_take_is_answered_with_those_it_takes(
    registry_of: RegistryOf,
) -> None:
    with pytest.raises(InvalidValueError) as caught:
        registry_of(storage()).open_storage("cloud://bucket", regoin="a secret")
    message = str(caught.value)
    assert "'regoin'" in message
    assert "It takes region='eu', timeout=None." in message
    assert "vibe-store-cloud 1.2" in message
    assert "a secret" not in message


def test_a_name_that_does_not_exist_is_answered_with_those_that_do(registry_of: RegistryOf) -> None:
    registry = registry_of(
        serializers=(storage("npz"), storage("eqx")), retention=(storage("latest", "targets:makes_nothing"),)
    )
    with pytest.raises(
        UnknownProviderError, match=r"no serializer 'eqxx'\. Did you mean 'eqx'\? .*eqx and npz\."
    ):
        registry.get_serializer("eqxx")
    with pytest.raises(UnknownProviderError, match=r"no retention policy 'last'.* exist are latest\."):
        registry.get_retention("last")
    with pytest.raises(UnknownProviderError, match="None exists"):
        registry_of().get_retention("latest")


@pytest.mark.parametrize("target", ["a_package_that_nobody_has.deep:Storage", "targets:NeedsAtUse"])
def test_a_missing_package_is_answered_with_what_to_install(registry_of: RegistryOf, target: str) -> None:
    registry = registry_of(storage(target=target, install="vibe-store-cloud[fast]"))
    with pytest.raises(MissingDependencyError) as caught:
        registry.open_storage("cloud://bucket")
    assert "No module named 'a_package_that_nobody_has'" in str(caught.value)
    assert 'Run `pip install "vibe-store-cloud[fast]"`.' in str(caught.value)
    assert isinstance(caught.value.__cause__, ImportError)


# Options behind a name.


def test_options_behind_a_name_are_read_by_the_annotations_of_its_target(registry_of: RegistryOf) -> None:
    registry = registry_of(
        serializers=(storage("writes", "targets:Writes"),),
        retention=(storage("keeps", "targets:keeps"), storage("lazily", "targets:lazily")),
    )
    serializer = registry.get_serializer("writes:level=3,fast=true")
    assert (serializer.name, serializer.level, serializer.fast) == ("writes", 3, True)
    assert registry.get_retention("keeps:days=2")("given") == 2
    assert registry.get_retention("lazily:days=2")("given") == 2
    assert registry.get_serializer("writes:level=3", fast=True).fast is True


def test_an_unknown_option_behind_a_name_is_answered_with_those_it_takes(registry_of: RegistryOf) -> None:
    registry = registry_of(
        serializers=(storage("writes", "targets:Writes"),), retention=(storage("keeps", "targets:keeps"),)
    )
    with pytest.raises(InvalidValueError, match=r"serializer 'writes' takes level and fast; 'lvl' is none"):
        registry.get_serializer("writes:lvl=3")
    with pytest.raises(InvalidValueError, match=r"retention policy 'keeps' takes days; 'hours' is none"):
        registry.get_retention("keeps:hours=3")


def test_an_option_behind_a_name_and_as_a_keyword_is_refused(registry_of: RegistryOf) -> None:
    registry = registry_of(retention=(storage("keeps", "targets:keeps"),))
    with pytest.raises(InvalidValueError, match="'keeps' is given days twice"):
        registry.get_retention("keeps:days=2", days=2)


def test_annotations_that_cannot_be_evaluated_are_blamed_on_the_distribution(registry_of: RegistryOf) -> None:
    registry = registry_of(retention=(storage("odd", "targets:odd"),))
    assert registry.get_retention("odd", days=1)("given") == 1
    with pytest.raises(
        PluginError, match=r"signature cannot be read \(NameError.*authors of vibe-store-cloud"
    ):
        registry.get_retention("odd:days=1")


def test_a_name_that_does_not_exist_is_asked_for_without_its_options(registry_of: RegistryOf) -> None:
    with pytest.raises(UnknownProviderError, match="no retention policy 'gfs'"):
        registry_of().get_retention("gfs:hourly=1")


def test_a_serializer_that_calls_itself_otherwise_is_blamed_on_its_distribution(
    registry_of: RegistryOf,
) -> None:
    registry = registry_of(serializers=(storage("other", "targets:Writes"),))
    said = "its attribute `name` is 'writes' instead of 'other'"
    with pytest.raises(PluginError, match=said):
        registry.get_serializer("other")
    with pytest.raises(PluginError, match=said):
        describe_target(*registry.named("other"))


def test_a_serializer_that_could_not_load_without_an_option_is_not_made(registry_of: RegistryOf) -> None:
    registry = registry_of(serializers=(storage("demands", "targets:Demands"),))
    with pytest.raises(PluginError, match=r"its option has no default: key\. A checkpoint is loaded without"):
        registry.get_serializer("demands", key=3)


# What a target says of itself.


def test_a_target_is_described_by_its_signature_and_its_docstring(registry_of: RegistryOf) -> None:
    registry = registry_of(storage(), serializers=(storage("writes", "targets:Writes"),))
    (opens,) = map(describe_target, registry.named("cloud"))
    (writes,) = map(describe_target, registry.named("writes"))
    assert [option.name for option in opens.options] == ["region", "timeout"]
    assert opens.help == "A storage that only remembers how it was made."
    assert [(option.name, option.type, option.default) for option in writes.options] == [
        ("level", "int", 1),
        ("fast", "bool", False),
    ]


def test_a_name_that_nothing_has_is_answered_with_those_that_exist(registry_of: RegistryOf) -> None:
    registry = registry_of(storage(), retention=(storage("keeps", "targets:keeps"),))
    with pytest.raises(
        UnknownProviderError, match=r"called 'keep'\. Did you mean 'keeps'\? .* cloud and keeps\."
    ):
        registry.named("keep")


def test_a_missing_package_of_a_protocol_is_named_as_fsspec_names_it(registry_of: RegistryOf) -> None:
    registry = registry_of(storage("fsspec", "targets:FsspecStorage"))
    with pytest.raises(MissingDependencyError, match="Install adlfs to access"):
        registry.open_storage("abfs://bucket")


def test_an_object_store_whose_package_is_missing_names_the_extra_that_brings_it() -> None:
    pytest.importorskip("tenacity", reason='needs pip install "vibe-store[s3]"')
    code = """
import sys
sys.modules["s3fs"] = sys.modules["gcsfs"] = None
import vibe_store
for scheme in ("s3", "gs", "gcs"):
    try:
        vibe_store.open_storage(f"{scheme}://bucket")
    except vibe_store.errors.MissingDependencyError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    s3, gs, gcs = done.stdout.splitlines()
    assert "Install s3fs to access S3" in s3
    assert 'Run `pip install "vibe-store[s3]"`.' in s3
    assert 'Run `pip install "vibe-store[gcs]"`.' in gs
    assert 'Run `pip install "vibe-store[gcs]"`.' in gcs


def test_an_error_of_ours_that_a_target_raises_stays_as_it_is(registry_of: RegistryOf) -> None:
    with pytest.raises(MissingDependencyError, match=r"^a sentence of its own about cloud://bucket$"):
        registry_of(storage(target="targets:Refuses")).open_storage("cloud://bucket")


def test_a_value_that_a_target_refuses_is_told_in_its_words(registry_of: RegistryOf) -> None:
    registry = registry_of(storage(target="targets:Particular"))
    with pytest.raises(InvalidValueError) as caught:
        registry.open_storage("cloud://bucket", region="moon")
    assert "refuses what it was given: no region is called 'moon'" in str(caught.value)
    assert "vibe-store-cloud" in str(caught.value)


def test_an_error_in_the_making_is_blamed_on_the_distribution(registry_of: RegistryOf) -> None:
    registry = registry_of(storage(target="targets:Particular"))
    with pytest.raises(PluginError, match=r"making it raised KeyError: .*\. Report this to the"):
        registry.open_storage("cloud://bucket")


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("vibe_store.no_such_module:Storage", "there is no module vibe_store.no_such_module"),
        ("targets:Nothing", "the module targets has no Nothing"),
        ("targets:not_callable", "it is no subclass of vibe_store.StorageBackend"),
        ("pathlib:Path", "it is no subclass of vibe_store.StorageBackend"),
        ("targets:Unfinished", "it does not implement get, list, put, read and write"),
    ],
)
def test_a_target_that_is_wrong_is_blamed_on_its_distribution(
    registry_of: RegistryOf, target: str, sentence: str
) -> None:
    with pytest.raises(PluginError) as caught:
        registry_of(storage(target=target)).open_storage("cloud://bucket")
    assert sentence in str(caught.value)
    assert "Report this to the authors of vibe-store-cloud." in str(caught.value)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("targets:not_callable", "it is 3, which cannot be called"),
        ("targets:makes_nothing", "it returned None, which cannot be called"),
    ],
)
def test_a_retention_policy_that_cannot_be_called_is_blamed_on_its_distribution(
    registry_of: RegistryOf, target: str, sentence: str
) -> None:
    registry = registry_of(retention=(storage("never", target),))
    with pytest.raises(PluginError, match=f"{sentence}. Report this to the authors of vibe-store-cloud"):
        registry.get_retention("never")


def test_a_registry_without_faults_warns_of_nothing(registry_of: RegistryOf) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry_of(storage()).open_storage("cloud://bucket")


# The built-ins, through the public functions.


def test_the_built_in_storages_open(tmp_path: Path) -> None:
    assert open_storage(tmp_path).local_path("") == tmp_path
    assert open_storage(f"file://{tmp_path}").local_path("") == tmp_path
    memory = open_storage("memory://a-registry-test")
    assert memory.local_path("") is None
    assert list(memory.list()) == []


@pytest.mark.parametrize("url", ["MEMORY://Name", "File:///tmp/Name"])
def test_a_scheme_in_capitals_opens_what_it_does_in_small_letters(url: str) -> None:
    opened = open_storage(url)
    assert opened.url == open_storage(url.lower().replace("name", "Name")).url
    assert open_storage(opened.url).url == opened.url


def test_what_a_built_in_storage_calls_itself_opens_it_again(tmp_path: Path) -> None:
    first = open_storage(tmp_path / "runs")
    first.write("a/b", b"1")
    assert open_storage(first.url).read("a/b") == b"1"


def test_the_built_in_serializer_is_known_by_the_name_that_it_has() -> None:
    serializer = get_serializer("eqx")
    assert isinstance(serializer, Serializer)
    assert serializer.name == "eqx"


def test_the_built_in_retention_policy_takes_its_options() -> None:
    assert get_retention("latest", max_to_keep=2)([]) == frozenset()
    with pytest.raises(
        InvalidValueError, match=r"'latest' \(.*\) cannot be made with the options keep: .* It takes max_"
    ):
        get_retention("latest", keep=2)


@pytest.mark.parametrize(
    "provider",
    [*builtins.vibe_store_storage(), *builtins.vibe_store_serializers(), *builtins.vibe_store_retention()],
    ids=lambda provider: provider.name,
)
def test_every_target_of_the_built_ins_exists(provider: Provider) -> None:
    module, _, attribute = provider.target.partition(":")
    package = {"orbax": "orbax", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(provider.name)
    if package is not None:
        pytest.importorskip(package, reason=f'needs pip install "{provider.install}"')
    assert callable(getattr(importlib.import_module(module), attribute))


def test_the_built_in_policies_and_serializers_take_their_options_as_text() -> None:
    assert repr(get_retention("best_n:n=2,metric=eval_return,mode=max")) == (
        "best_n(2, 'eval_return', mode='max')"
    )
    assert repr(get_retention("every_seconds:interval=60")) == "every_seconds(60.0)"
    with pytest.raises(InvalidValueError, match=r"max_to_keep is .* 1 or more; got 0"):
        get_retention("latest:max_to_keep=0")
