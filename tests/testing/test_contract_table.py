"""The command that prints which promises are kept by whom."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_TESTS = Path(__file__).parents[1]


@pytest.mark.proof
def test_the_table_shows_what_is_kept_what_is_not_and_what_could_not_be_tried(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason='needs pip install "vibe-store[cli]"')
    (tmp_path / "test_greedy.py").write_text(
        textwrap.dedent("""
            import pytest

            from vibe_store.testing import RetentionContract


            class TestGreedy(RetentionContract):
                @pytest.fixture
                def policy(self):
                    return lambda checkpoints: frozenset(info.step for info in checkpoints[::2])


            class TestAbsent(RetentionContract):
                @pytest.fixture
                def policy(self):
                    pytest.skip("it is not there")


            def test_of_something_else():
                raise AssertionError
        """)
    )
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    done = subprocess.run(
        [
            sys.executable,
            _TESTS / "contract_table.py",
            tmp_path / "test_greedy.py",
            tmp_path / "test_broken.py",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = {row.split("│")[1].strip(): row.split("│")[2:4] for row in done.stdout.splitlines() if "│" in row}
    shown = {text: [cell.strip() for cell in cells] for text, cells in rows.items()}
    assert shown["RetentionContract"] == ["Greedy", "Absent"]
    assert shown["Shown nothing, a policy returns an empty frozenset"] == ["✓", "-"]
    assert shown["Of the checkpoints that it has left, a policy deletes none"] == ["✗", "-"]
    said = " ".join(done.stdout.split())
    assert "- Absent, 'Shown nothing, a policy returns an empty frozenset': it is not there" in said
    assert (
        "test_broken.py could not be imported: ModuleNotFoundError: No module named 'no_such_package'" in said
    )
    assert "8 promises tried, 1 not kept." in said
    assert done.returncode == 1
