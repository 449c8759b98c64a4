"""The pages in docs/: their Python runs as it stands, and what they name exists."""

import re
from pathlib import Path
from typing import Any

import pytest

from vibe_store.cli import main

_ROOT = Path(__file__).parents[1]
_PAGES = sorted((_ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

each_page = pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)


def _blocks(page: Path, language: str) -> list[str]:
    return [match[2] for match in _BLOCK.finditer(page.read_text("utf-8")) if match[1] == language]


@each_page
def test_the_python_blocks_of_a_page_run_in_order(
    page: Path, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.storage_options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.storage_options["secret"])
    blocks = _blocks(page, "python")
    assert blocks
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102 - it is our page


@each_page
def test_every_command_of_a_page_takes_the_options_that_it_is_given(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = [line for block in _blocks(page, "bash") for line in block.splitlines() if "vibe-store" in line]
    assert lines
    for line in lines:
        _, command, *arguments = line.split()
        preset = arguments[:1] if command == "train" else []
        try:
            status: object = main([command, *preset, "--help"])
        except SystemExit as stop:
            status = stop.code
        assert not status, line
        usage = capsys.readouterr().out
        assert [word for word in arguments if word.startswith("--") and f"{word} " not in usage] == []


@each_page
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_links_to_every_page() -> None:
    readme = (_ROOT / "README.md").read_text("utf-8")
    assert _PAGES
    assert [page.name for page in _PAGES if f"](docs/{page.name})" not in readme] == []
