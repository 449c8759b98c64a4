"""Runs mutants, which are implementations with one bug each, through the contract that is to catch them."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import Phase, settings

# Which of all that fails is the least matters to nobody here, and takes the longest to find out.
settings.register_profile("mutants", phases=[Phase.generate], database=None, derandomize=True)

Outcomes = dict[tuple[str, str], str | None]
"""What each test of each class said when it failed; None where it passed."""


def _mutants(module: Any) -> list[type[Any]]:
    return [each for each in vars(module).values() if isinstance(each, type) and "caught_by" in vars(each)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that asks for a ``mutant`` each class of its module that says which test catches it."""
    if "mutant" in metafunc.fixturenames:
        metafunc.parametrize("mutant", _mutants(metafunc.module), ids=lambda mutant: mutant.__name__)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of each mutant of the module, and of what is none: the test that is to catch it, all in one process."""
    mutants = _mutants(request.module)
    tests = {(mutant.__name__, mutant.caught_by) for mutant in mutants}
    tests |= {(mutant.unmutated.__name__, mutant.caught_by) for mutant in mutants}
    report = tmp_path_factory.mktemp("mutants") / "report.xml"
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=short",
        "--hypothesis-profile=mutants",
        "-o", "python_classes=*", f"--junitxml={report}", f"--basetemp={report.parent / 'temporary'}",
        *(f"{request.path}::{name}::{test}" for name, test in sorted(tests)),
    ]  # fmt: skip
    # Not in this folder, whose modules it would import instead of those that are installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=report.parent, env=environment
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest wrote it
        problem = next((child for child in case if child.tag in {"failure", "error", "skipped"}), None)
        name = case.attrib["classname"].rpartition(".")[2]
        text = None if problem is None else f"{problem.tag}: {problem.attrib['message']}\n{problem.text}"
        said[name, case.attrib["name"]] = text
    assert said.keys() == tests
    return said


@pytest.fixture
def assert_caught(outcomes: Outcomes) -> Callable[[type[Any]], None]:
    """A mutant fails by the test that it names, which says what was promised and where. Others pass it."""

    def check(mutant: type[Any]) -> None:
        test = getattr(mutant, mutant.caught_by.partition("[")[0])
        said = outcomes[mutant.__name__, mutant.caught_by]
        assert said is not None, f"{mutant.caught_by} does not catch it"
        assert said.startswith("failure: ")
        assert f"The promise: {test.promise}" in said
        assert test.places
        assert all(place in said for place in test.places)
        assert outcomes[mutant.unmutated.__name__, mutant.caught_by] is None

    return check
