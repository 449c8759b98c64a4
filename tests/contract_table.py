"""Prints one table: which promises each storage, serializer, policy and checkpointer of ours keeps.

    python tests/contract_table.py                              # ours, and those of the packages in plugins/
    python tests/contract_table.py .../tests/test_contract.py   # those of one package

A row is a promise, which is a test of a contract of ``vibe_store.testing``; a column is a class that
subclasses the contract. The status is 1 where a promise is not kept, or a file cannot be imported (as its
package is not installed, say). It needs ``pip install "vibe-store[all]"`` and what the tests need.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console
from rich.table import Table

_ROOT = Path(__file__).parents[1]
_OURS = (
    "tests/storage/test_contract.py",
    "tests/serializers/test_contract.py",
    "tests/test_retention_contract.py",
    "tests/checkpoint/test_checkpointer_contract.py",
)

Outcome = Literal["passed", "skipped", "failed"]
_SHOWN: dict[Outcome | None, str] = {
    "passed": "[green]✓[/]",
    "skipped": "[yellow]-[/]",
    "failed": "[bold red]✗[/]",
    None: "",
}
_WORSE: list[Outcome] = ["passed", "skipped", "failed"]


@dataclass(eq=False)
class Results:
    """A plugin of pytest that runs the tests of contracts only, and remembers what came of them.

    Attributes:
        cells: the outcome for each contract, promise and subject; of several tests the worst.
        subjects: the subjects of each contract.
        places: the contract, promise and subject of each test, by its id.
        said: why tests were skipped, and which files could not be imported.
        broken: whether a file could not be imported.
    """

    cells: dict[tuple[type, str, str], Outcome] = field(default_factory=dict)
    subjects: dict[type, list[str]] = field(default_factory=dict)
    places: dict[str, tuple[type, str, str]] = field(default_factory=dict)
    said: dict[str, None] = field(default_factory=dict)
    broken: bool = False

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the tests of contracts."""
        kept = []
        for item in items:
            name, subject = getattr(item, "originalname", ""), getattr(item, "cls", None) or object
            contract = next(
                (each for each in subject.__mro__ if hasattr(vars(each).get(name), "promise")), None
            )
            if contract is not None:
                kept.append(item)
                column = subject.__name__.removeprefix("Test")
                self.places[item.nodeid] = contract, name, column
                if column not in self.subjects.setdefault(contract, []):
                    self.subjects[contract].append(column)
        items[:] = kept

    def pytest_exception_interact(self, node: Any, report: Any) -> None:
        """Note a file that could not be imported."""
        if isinstance(report, pytest.CollectReport):
            self.broken = True
            self.said[f"{node.path} could not be imported: {_last_line(str(report.longrepr))}"] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what came of a test."""
        outcome: Outcome = report.outcome
        if report.when != "call" and outcome == "passed":
            return
        place = self.places[report.nodeid]
        self.cells[place] = max(outcome, self.cells.get(place, "passed"), key=_WORSE.index)
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            contract, name, subject = place
            said = report.longrepr[2].removeprefix("Skipped: ")
            self.said[f"- {subject}, {_promise(contract, name)!r}: {said}"] = None

    def table(self) -> Table:
        """The table of all of it."""
        width = max(map(len, self.subjects.values()), default=0)
        table = Table(show_header=False, title="Which promises are kept: ✓ yes, ✗ no, - not tried")
        table.add_column(min_width=60)
        for _ in range(width):
            table.add_column(justify="center")
        for contract, subjects in self.subjects.items():
            table.add_section()
            table.add_row(f"[bold]{contract.__name__}[/]", *(f"[bold]{subject}[/]" for subject in subjects))
            for name, promise in _promises(contract):
                row = (self.cells.get((contract, name, subject)) for subject in subjects)
                table.add_row(promise, *(_SHOWN[outcome] for outcome in row))
        return table


def _promises(contract: type) -> Iterator[tuple[str, str]]:
    for name, test in vars(contract).items():
        if hasattr(test, "promise"):
            yield name, _promise(contract, name)


def _promise(contract: type, name: str) -> str:
    return str(vars(contract)[name].promise).replace("``", "").partition(". ")[0].removesuffix(".")


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].removeprefix("E").strip()


def main(paths: list[str]) -> int:
    """Run the contracts in these files, or in all of ours; print the table; return the status."""
    plugins = sorted(_ROOT.glob("plugins/*/tests/test_contract.py"))
    files = paths or [*(str(_ROOT / path) for path in _OURS), *map(str, plugins)]
    results = Results()
    arguments = ["-q", "--no-header", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    with contextlib.redirect_stdout(sys.stderr):  # where it shows how far it is, and what failed
        pytest.main(
            [f"--rootdir={_ROOT}", f"--config-file={_ROOT / 'pyproject.toml'}", *arguments, *files], [results]
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(results.table())
    for line in results.said:
        console.print(line, markup=False, highlight=False)
    failed = [place for place, outcome in results.cells.items() if outcome == "failed"]
    console.print(f"{len(results.cells)} promises tried, {len(failed)} not kept.", highlight=False)
    return 1 if failed or results.broken or not results.cells else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
