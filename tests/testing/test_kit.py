"""The kit that plugins test themselves with: what it needs, and what its failures say."""

import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import vibe_store.testing
from vibe_store import interfaces
from vibe_store.testing import (
    CheckpointerContract,
    RetentionContract,
    SerializerContract,
    StorageContract,
)

_CONTRACTS = [StorageContract, SerializerContract, RetentionContract, CheckpointerContract]
_INTERFACES = ["StorageBackend", "Serializer", "Checkpointer"]


def _tests_of(contract: type) -> dict[str, Any]:
    return {name: test for name, test in vars(contract).items() if name.startswith("test_")}


def _is_written(place: str) -> bool:
    name, _, member = place.partition(".")
    owner = getattr(interfaces, name)
    return not member or member in {*vars(owner), *owner.__annotations__}


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("contract", _CONTRACTS)
def test_each_test_of_a_contract_is_of_a_promise_that_is_written_somewhere(contract: type) -> None:
    for name, test in _tests_of(contract).items():
        assert test.promise.endswith("."), name
        assert test.places, name
        for place in test.places:
            assert _is_written(place.removeprefix("vibe_store.interfaces.")), place


def test_every_method_of_the_interfaces_has_a_test() -> None:
    tested = {
        place for contract in _CONTRACTS for test in _tests_of(contract).values() for place in test.places
    }
    for name in _INTERFACES:
        for method in getattr(interfaces, name).__abstractmethods__:
            assert f"vibe_store.interfaces.{name}.{method}" in tested


_WITHOUT_PYTEST = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {"pytest", "hypothesis"}:
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Absent())
"""


def test_a_storage_that_fails_needs_neither_pytest_nor_hypothesis_nor_jax() -> None:
    code = "from vibe_store.testing import Fault, FaultyStorage; print('jax' in sys.modules)"
    assert _run(_WITHOUT_PYTEST + code) == "False\n"


def test_a_contract_without_pytest_says_what_to_install() -> None:
    code = """
try:
    from vibe_store.testing import StorageContract
except ImportError as error:
    print(type(error).__name__, error)
"""
    assert _run(_WITHOUT_PYTEST + code) == (
        "MissingDependencyError vibe_store.testing.StorageContract needs pytest, which is not installed. "
        'Run `pip install "vibe-store[testing]"`.\n'
    )


def test_a_name_that_the_kit_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'vibe_store\.testing' has no attribute 'Contract'"):
        vibe_store.testing.Contract  # noqa: B018 - looking it up is the test


def test_every_public_name_can_be_imported() -> None:
    for name in vibe_store.testing.__all__:
        assert getattr(vibe_store.testing, name) is not None
        assert name in dir(vibe_store.testing)


def test_no_plugin_of_pytest_is_loaded_for_whoever_has_vibe_store() -> None:
    ours = [each for each in entry_points(group="pytest11") if each.value.startswith("vibe_store")]
    assert ours == []


def test_a_contract_says_which_fixture_to_override(tmp_path: Path) -> None:
    fixtures = {
        "Storage": "root",
        "Serializer": "serializer",
        "Retention": "policy",
        "Checkpointer": "directory",
    }
    path = tmp_path / "test_forgetful.py"
    lines = [f"from vibe_store.testing import {name}Contract" for name in fixtures]
    lines += [f"class Test{name}({name}Contract): pass" for name in fixtures]
    path.write_text("\n".join(lines))
    tests = [
        f"{path}::Test{contract.__name__.removesuffix('Contract')}::{_first(contract)}"
        for contract in _CONTRACTS
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    for name, fixture in fixtures.items():
        assert f"NotImplementedError: Test{name} has to override the fixture {fixture!r}." in done.stdout


def _first(contract: type) -> str:
    """The name of a test that asks for no more than the fixture to override."""
    return next(
        name for name, test in _tests_of(contract).items() if len(inspect.signature(test).parameters) == 2
    )
