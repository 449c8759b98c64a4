"""What the built distributions hold, and what installing them brings."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def wheel_names(distributions: Path) -> list[str]:
    with zipfile.ZipFile(_only(distributions, "*.whl")) as wheel:
        return wheel.namelist()


@pytest.fixture(scope="module")
def metadata(distributions: Path) -> Message:
    with zipfile.ZipFile(_only(distributions, "*.whl")) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel_names: list[str]) -> None:
    assert {re.sub(r"^vibe_store-[^/]*", "", name).partition("/")[0] for name in wheel_names} == {
        "",
        "vibe_store",
    }


def test_the_wheel_holds_every_module_of_the_tree(wheel_names: list[str]) -> None:
    modules = {str(path.relative_to(_ROOT)) for path in (_ROOT / "vibe_store").rglob("*.py")}
    assert modules == {name for name in wheel_names if name.endswith(".py")}


def test_the_wheel_is_marked_as_typed(wheel_names: list[str]) -> None:
    assert "vibe_store/py.typed" in wheel_names


def test_the_wheel_carries_the_licence(metadata: Message, wheel_names: list[str]) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_the_source_distribution_holds_no_scratch(distributions: Path) -> None:
    with tarfile.open(_only(distributions, "*.tar.gz")) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "vibe_store/py.typed", "tests/test_readme.py"} <= names
    scratch = re.compile(r"(^|/)(\.tox|\.venv|runs|dist|__pycache__)(/|$)")
    assert [name for name in names if scratch.search(name)] == []


def test_a_plain_install_brings_neither_the_reinforcement_learning_nor_a_cloud(metadata: Message) -> None:
    plain = {
        re.split(r"[^A-Za-z0-9-]", required)[0]
        for required in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in required
    }
    assert {"equinox", "jax"} <= plain
    assert plain & {"gcsfs", "gymnax", "optax", "orbax-checkpoint", "rich", "s3fs", "six", "tyro"} == set()


def test_the_extra_all_brings_every_other_extra_but_that_for_tests(metadata: Message) -> None:
    by_extra: dict[str, set[str]] = {}
    for required in metadata.get_all("Requires-Dist", []):
        requirement, _, extra = required.partition("; extra == ")
        by_extra.setdefault(extra.strip("'\""), set()).add(requirement)
    plain, everything = by_extra.pop(""), by_extra.pop("all")
    assert {requirement.partition(">")[0] for requirement in by_extra.pop("testing")} == {
        "hypothesis",
        "pytest",
    }
    assert plain.isdisjoint(everything)
    assert everything == set().union(*by_extra.values())


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found
