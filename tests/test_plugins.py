"""Plugins that are installed as distributions are: how they are found, blocked, checked and listed."""

import json
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vibe_store.cli.plugins import describe_plugins, plugins_json, plugins_text
from vibe_store.discovery import DISABLE_VARIABLE
from vibe_store.errors import PluginError, UnknownProviderError, VibeStoreWarning
from vibe_store.registry import Registry

Install = Callable[..., None]

STORAGE = """
from vibe_store.hookspecs import Provider, hookimpl

@hookimpl
def vibe_store_storage():
    return [Provider(name=NAME, target=f"{__name__}_target:Storage")]
"""
TARGET = """
from vibe_store.storage.local import LocalStorage

class Storage(LocalStorage):
    def __init__(self, url):
        self.url = url
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed distributions, on the path of this process and of its children."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[1]}")
    monkeypatch.delenv(DISABLE_VARIABLE, raising=False)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    """Install a distribution ``vibe-store-NAME`` 1.0 with one entry point, NAME, and its two modules."""

    def write(name: str, source: str = "", *, target: str = TARGET, entry_point: str | None = None) -> None:
        module = f"plugin_{name}"
        scheme = f"NAME = {name!r}\n"
        (site / f"{module}.py").write_text(scheme + textwrap.dedent(source or STORAGE))
        (site / f"{module}_target.py").write_text(target)
        info = site / f"vibe_store_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vibe-store-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[vibe_store]\n{entry_point or name} = {module}\n")

    return write


def run(code: str) -> str:
    """Run code in a fresh interpreter, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(registry: Registry) -> dict[str, dict[str, object]]:
    """Return the rows of the JSON listing that do not come from vibe_store itself, by plugin."""
    rows = json.loads(plugins_json(registry))
    return {row["plugin"]: row for row in rows if row["distribution"] != "vibe-store"}


def reason_for(name: str) -> str:
    """Return why a plugin is broken, after checking that it takes no other plugin down."""
    registry = Registry.from_entry_points()
    row = listed(registry)[name]
    assert row["status"] == "broken"
    with pytest.warns(VibeStoreWarning, match=f"plugin '{name}' of vibe-store-{name} 1.0 is broken"):
        assert registry.get_retention("latest") is not None
    return str(row["reason"])


def test_an_installed_plugin_provides_its_scheme(install: Install) -> None:
    install("alpha")
    registry = Registry.from_entry_points()
    assert registry.open_storage("alpha://bucket").url == "alpha://bucket"
    assert listed(registry)["alpha"] == {
        "kind": "storage",
        "name": "alpha",
        "target": "plugin_alpha_target:Storage",
        "install": None,
        "api": 1,
        "plugin": "alpha",
        "distribution": "vibe-store-alpha",
        "version": "1.0",
        "status": "ok",
        "reason": None,
    }


# Conflicts.


def test_two_plugins_that_claim_one_name_are_both_named_with_the_way_to_block_one(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = STORAGE.replace(
        "return [", "return [Provider(name='shared', target=f'{__name__}_target:Storage'), "
    )
    install("alpha", source)
    install("beta", source)
    registry = Registry.from_entry_points()
    with pytest.raises(PluginError) as caught:
        registry.open_storage("shared://bucket")
    message = str(caught.value)
    assert "plugin 'alpha' of vibe-store-alpha 1.0 and the plugin 'beta' of vibe-store-beta 1.0" in message
    assert f"putting alpha or beta into the environment variable {DISABLE_VARIABLE}" in message
    assert registry.open_storage("alpha://bucket").url == "alpha://bucket"
    rows = json.loads(plugins_json(registry))
    assert [row["status"] for row in rows if row["name"] == "shared"] == ["conflict", "conflict"]
    assert all(row["status"] == "ok" for row in rows if row["name"] != "shared")

    monkeypatch.setenv(DISABLE_VARIABLE, "beta")
    assert Registry.from_entry_points().open_storage("shared://bucket").url == "shared://bucket"


def test_a_plugin_that_claims_the_name_of_a_built_in_is_a_conflict(install: Install) -> None:
    install("file")
    registry = Registry.from_entry_points()
    with pytest.raises(PluginError) as caught:
        registry.open_storage("runs")
    assert "plugin 'builtins' of vibe-store" in str(caught.value)
    assert "plugin 'file' of vibe-store-file 1.0" in str(caught.value)
    assert f"putting file into the environment variable {DISABLE_VARIABLE}" in str(caught.value)


def test_two_plugins_of_one_entry_point_name_are_told_apart_by_their_distributions(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = STORAGE.replace("name=NAME", "name='shared'")
    install("alpha", source, entry_point="cloud")
    install("beta", source, entry_point="cloud")
    with pytest.raises(PluginError, match="putting vibe-store-alpha or vibe-store-beta into"):
        Registry.from_entry_points().open_storage("shared://bucket")
    monkeypatch.setenv(DISABLE_VARIABLE, "vibe-store-alpha")
    assert Registry.from_entry_points().open_storage("shared://bucket").url == "shared://bucket"


# Blocking.


@pytest.mark.parametrize("value", ["alpha", "vibe-store-alpha", "Vibe_Store.Alpha", "*", " beta , alpha,"])
def test_a_blocked_plugin_is_not_imported(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install("alpha", "raise SystemExit('imported')")
    install("beta")
    monkeypatch.setenv(DISABLE_VARIABLE, value)
    registry = Registry.from_entry_points()
    assert "plugin_alpha" not in sys.modules
    assert listed(registry)["alpha"]["status"] == "blocked"
    assert DISABLE_VARIABLE in str(listed(registry)["alpha"]["reason"])
    with pytest.raises(UnknownProviderError, match=r"Perhaps the plugin 'alpha' .* which is blocked"):
        registry.open_storage("alpha://bucket")
    assert registry.open_storage("runs") is not None
    assert listed(registry)["beta"]["status"] == ("ok" if value.lower().endswith("alpha") else "blocked")


def test_a_distribution_is_blocked_however_its_name_is_written(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("Alpha_One", entry_point="cloud")
    monkeypatch.setenv(DISABLE_VARIABLE, "vibe-store-alpha-one")
    assert listed(Registry.from_entry_points())["cloud"]["status"] == "blocked"


@pytest.mark.parametrize("name", ["alhpa", "vibe-store", "builtins"])
def test_blocking_what_cannot_be_blocked_is_reported(
    install: Install, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install("alpha")
    monkeypatch.setenv(DISABLE_VARIABLE, name)
    registry = Registry.from_entry_points()
    with pytest.warns(VibeStoreWarning, match=f"names '{name}', but no plugin of this name"):
        registry.open_storage("runs")
    assert listed(registry)["alpha"]["status"] == "ok"


# Broken plugins.


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "import a_package_that_nobody_has",
            "ModuleNotFoundError: No module named 'a_package_that_nobody_has'",
        ),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("def broken(:", "SyntaxError: "),
    ],
)
def test_a_plugin_that_fails_on_import_takes_no_other_down(install: Install, source: str, error: str) -> None:
    install("alpha", source)
    install("beta")
    registry = Registry.from_entry_points()
    with pytest.warns(VibeStoreWarning, match="plugin 'alpha' of vibe-store-alpha 1.0 is broken") as caught:
        assert registry.open_storage("beta://bucket").url == "beta://bucket"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second lookup does not warn again
        with pytest.raises(
            UnknownProviderError, match=r"Perhaps the plugin 'alpha' .* which is broken"
        ) as unknown:
            registry.open_storage("alpha://bucket")
    assert f"Importing it raised {error}" in str(unknown.value)
    assert f"Importing it raised {error}" in str(listed(registry)["alpha"]["reason"])


def test_the_warning_of_a_broken_plugin_points_at_the_line_that_used_the_registry(install: Install) -> None:
    install("alpha", "import a_package_that_nobody_has")
    code = """
    import warnings
    import vibe_store
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vibe_store.open_storage("runs")
        vibe_store.open_storage("runs")
    print(len(caught), caught[0].filename)
    """
    assert run(code).split() == ["1", "<string>"]


def test_a_misspelled_hook_is_named_with_the_one_that_was_meant(install: Install) -> None:
    install("alpha", STORAGE.replace("vibe_store_storage", "vibe_store_storages"))
    assert reason_for("alpha") == (
        "It implements vibe_store_storages, which is no hook of vibe_store: did you mean vibe_store_storage?"
    )


def test_a_hook_of_quite_another_name_is_answered_with_the_hooks_that_exist(install: Install) -> None:
    install("alpha", STORAGE.replace("vibe_store_storage", "register"))
    assert "the hooks are vibe_store_storage, vibe_store_serializers and vibe_store_retention" in reason_for(
        "alpha"
    )


def test_a_hook_without_its_decorator_is_noticed(install: Install) -> None:
    install("alpha", STORAGE + "def vibe_store_retention(): return []\n")
    assert "defines vibe_store_retention without the decorator" in reason_for("alpha")


def test_a_plugin_may_import_every_name_of_hookspecs(install: Install) -> None:
    install("alpha", "from vibe_store.hookspecs import *\n" + STORAGE)
    assert listed(Registry.from_entry_points())["alpha"]["status"] == "ok"


def test_a_plugin_without_hooks_is_noticed(install: Install) -> None:
    install("alpha", "x = 1")
    assert reason_for("alpha").startswith("It implements no hook")


def test_a_hook_that_takes_an_argument_it_is_not_given_is_noticed(install: Install) -> None:
    install("alpha", STORAGE.replace("storage():", "storage(config):"))
    assert "config" in reason_for("alpha")


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("None", "returned None instead of a list of Provider"),
        ("'s3'", "returned 's3' instead of a list of Provider"),
        ("Provider(name='a', target='b:C')", "instead of a list of Provider"),
        ("['s3']", "returned a list with 's3', which is no Provider"),
        ("[Provider(name=3, target='b:C')]", "whose name is no text"),
        ("[Provider(name='', target='b:C')]", "whose name is no text"),
        ("[Provider(name='S3', target='b:C')]", "whose name is no URL scheme in lower case"),
        ("[Provider(name='a b', target='b:C')]", "whose name is no URL scheme in lower case"),
        ("[Provider(name='a', target='b.C')]", "whose target is not of the form 'package.module:Attribute'"),
        ("[Provider(name='a', target=int)]", "whose target is not of the form 'package.module:Attribute'"),
        ("[Provider(name='a', target='b:C', install=None)]", "whose install is no text"),
        ("[Provider(name='a', target='b:C', api='2')]", "whose api is no positive integer"),
        (
            "[Provider(name='a', target='b:C'), Provider(name='a', target='b:D')]",
            "registers a more than once",
        ),
        ("1 / 0", "Calling its vibe_store_storage raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_hook_that_returns_rubbish_breaks_its_own_plugin_only(
    install: Install, returned: str, sentence: str
) -> None:
    install("alpha", STORAGE.partition("    return")[0] + f"    return {returned}\n")
    assert sentence in reason_for("alpha")


def test_a_provider_of_a_newer_interface_is_refused_when_used_and_nothing_else_of_its_plugin(
    install: Install,
) -> None:
    install("alpha", STORAGE.replace("return [", "return [Provider('new', 'nowhere:Storage', api=2), "))
    registry = Registry.from_entry_points()
    assert registry.open_storage("alpha://bucket").url == "alpha://bucket"
    with pytest.raises(PluginError) as caught:
        registry.open_storage("new://bucket")
    assert "plugin 'alpha' of vibe-store-alpha 1.0 was written for version 2" in str(caught.value)
    assert "pip install --upgrade vibe-store" in str(caught.value)


def test_a_plugin_that_uses_the_registry_while_it_is_imported_is_broken(install: Install) -> None:
    install("alpha", "import vibe_store; vibe_store.open_storage('runs')\n" + STORAGE)
    install("beta")
    code = """
    import json
    from vibe_store.cli.plugins import list_plugins
    print(json.dumps({row["plugin"]: row["reason"] for row in json.loads(list_plugins(as_json=True))}))
    """
    reasons = json.loads(run(code))
    assert "while the plugins were still being imported" in reasons["alpha"]
    assert reasons["beta"] is None


# The registry of the process, and its listing.


def test_threads_that_ask_at_once_get_one_registry(install: Install) -> None:
    install("alpha", "import time; time.sleep(0.2)\n" + STORAGE)
    code = """
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier
    from vibe_store.registry import default_registry
    barrier = Barrier(8)
    def ask(_):
        barrier.wait()
        return default_registry()
    with ThreadPoolExecutor(8) as pool:
        print(len(set(map(id, list(pool.map(ask, range(8)))))))
    """
    assert run(code).strip() == "1"


def test_listing_does_not_import_a_target(install: Install) -> None:
    install("alpha", target="import time; time.sleep(60)")
    code = """
    import sys
    from vibe_store.cli.plugins import list_plugins
    print(list_plugins())
    assert "plugin_alpha" in sys.modules and "plugin_alpha_target" not in sys.modules
    """
    assert "alpha" in run(code)


def test_the_text_says_what_is_wrong_below_a_table(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("alpha")
    install("beta", "import a_package_that_nobody_has")
    install("gamma")
    monkeypatch.setenv(DISABLE_VARIABLE, "gamma")
    table, _, reasons = plugins_text(Registry.from_entry_points()).partition("\n\n")
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "PLUGIN", "STATUS"]
    assert ["storage", "alpha", "vibe-store-alpha", "1.0", "alpha", "ok"] in rows
    assert ["-", "-", "vibe-store-beta", "1.0", "beta", "broken"] in rows
    assert ["-", "-", "vibe-store-gamma", "1.0", "gamma", "blocked"] in rows
    assert reasons.splitlines() == [
        "beta: Importing it raised ModuleNotFoundError: No module named 'a_package_that_nobody_has'.",
        f"gamma: It is disabled by the environment variable {DISABLE_VARIABLE}.",
    ]


def test_one_name_of_several_kinds_is_described_whole_where_one_of_them_is_broken(install: Install) -> None:
    install(
        "alpha",
        STORAGE
        + """
@hookimpl
def vibe_store_retention():
    return [Provider(name=NAME, target="plugin_alpha_policies:alpha", install="vibe-store-alpha")]
""",
    )
    registry = Registry.from_entry_points()
    text, whole = describe_plugins("alpha", registry=registry)
    assert not whole
    assert text.startswith(
        "storage alpha, of the plugin 'alpha' of vibe-store-alpha 1.0 (plugin_alpha_target:"
    )
    assert "It has no help" not in text  # that of the class it derives from
    assert "retention policy alpha, of the plugin" in text
    assert "needs a package that is not installed: No module named 'plugin_alpha_policies'" in text
    opens, keeps = json.loads(describe_plugins("alpha", as_json=True, registry=registry)[0])
    assert (opens["status"], opens["options"]) == ("ok", [])
    assert (keeps["status"], keeps["options"], keeps["help"]) == ("broken", None, None)
    assert 'Run `pip install "vibe-store-alpha"`' in keeps["reason"]


def test_what_is_in_conflict_is_not_imported_to_be_described(install: Install) -> None:
    source = STORAGE.replace("name=NAME", "name='shared'")
    install("alpha", source, target="raise SystemExit")
    install("beta", source, target="raise SystemExit")
    text, whole = describe_plugins("shared", registry=Registry.from_entry_points())
    assert not whole
    assert text.count("Several plugins claim this name") == 2


@pytest.mark.parametrize("hook", ["vibe_store_serializers", "vibe_store_retention"])
def test_a_name_that_could_not_be_told_from_its_options_breaks_its_plugin(
    install: Install, hook: str
) -> None:
    install("alpha", STORAGE.replace("vibe_store_storage", hook).replace("name=NAME", "name='a:b'"))
    assert "whose name holds other characters than letters, digits and any of ._+-" in reason_for("alpha")


def test_every_row_of_the_json_has_the_same_keys(install: Install) -> None:
    install("alpha")
    install("beta", "x = 1")
    rows = json.loads(plugins_json(Registry.from_entry_points()))
    assert {tuple(row) for row in rows} == {
        ("kind", "name", "target", "install", "api", "plugin", "distribution", "version", "status", "reason")
    }
    assert {row["kind"] for row in rows} == {"storage", "serializer", "retention", None}
