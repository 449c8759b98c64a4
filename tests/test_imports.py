"""What importing the package costs, and what its public names are."""

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

import vibe_store
import vibe_store.serializers

HEAVY = (
    "equinox", "fsspec", "gcsfs", "gymnax", "jax", "jaxlib", "ml_dtypes", "numpy", "optax", "orbax", "rich",
    "s3fs", "tyro", "xxhash",
)  # fmt: skip


def _imported_after(statement: str) -> set[str]:
    """Return the top-level modules that are loaded in a fresh interpreter after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_neither_jax_nor_a_storage_library_nor_pluggy() -> None:
    assert _imported_after("import vibe_store").isdisjoint({*HEAVY, "pluggy"})


@pytest.mark.parametrize("module", ["interfaces", "errors"])
def test_the_interfaces_need_only_the_standard_library(module: str) -> None:
    assert _imported_after(f"import vibe_store.{module}").isdisjoint({*HEAVY, "pluggy"})


@pytest.mark.parametrize("module", ["hookspecs", "builtins", "discovery", "registry", "cli.plugins"])
def test_finding_plugins_needs_only_pluggy(module: str) -> None:
    imported = _imported_after(f"import vibe_store.{module}")
    assert "pluggy" in imported
    assert imported.isdisjoint(HEAVY)


def test_looking_at_what_exists_imports_nothing_of_it() -> None:
    statement = "from vibe_store.cli.plugins import list_plugins; list_plugins(); list_plugins(as_json=True)"
    assert _imported_after(statement).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", vibe_store.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(vibe_store, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'vibe_store' has no attribute 'CheckpointManger'"):
        vibe_store.CheckpointManger  # noqa: B018 - looking it up is the test


def test_the_public_names_are_in_dir_before_they_are_imported() -> None:
    code = "import vibe_store; assert set(vibe_store.__all__) <= set(dir(vibe_store))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_errors_are_reachable_without_importing_them() -> None:
    subprocess.run([sys.executable, "-c", "import vibe_store; vibe_store.errors.VibeStoreError"], check=True)


@pytest.mark.parametrize("name", vibe_store.serializers.__all__)
def test_what_authors_of_serializers_need_can_be_imported_whatever_was_before(name: str) -> None:
    importlib.import_module("vibe_store.serializers.eqx")
    assert not isinstance(getattr(vibe_store.serializers, name), ModuleType)


def test_importing_the_serializers_imports_none_of_them() -> None:
    assert _imported_after("import vibe_store.serializers").isdisjoint({*HEAVY, "pluggy"})
    with pytest.raises(AttributeError, match=r"module 'vibe_store\.serializers' has no attribute 'snap'"):
        vibe_store.serializers.snap  # noqa: B018 - looking it up is the test
    assert set(vibe_store.serializers.__all__) <= set(dir(vibe_store.serializers))
