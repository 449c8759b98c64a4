"""The README's Python runs as it stands, and its commands are those that the checks run."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import list_checkpoints

_ROOT = Path(__file__).parents[1]
_README = _ROOT / "README.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(language: str) -> list[tuple[int, str]]:
    """Return the line before each block's first one, and the block."""
    text = _README.read_text("utf-8")
    return [(text[: m.start(2)].count("\n"), m[2]) for m in _BLOCK.finditer(text) if m[1] == language]


def _shell_lines() -> list[str]:
    return [line for _, block in _blocks("bash") for line in block.splitlines()]


def test_the_python_blocks_run_in_order_in_one_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    blocks = [block for block in _blocks("python") if not _needs_a_bucket(block[1])]
    assert len(blocks) >= 4
    for line, block in blocks:
        _run(line, block, namespace)


def test_the_python_blocks_about_buckets_run_after_the_first_one(
    s3: Any, gcs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.storage_options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.storage_options["secret"])
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.server)
    namespace: dict[str, object] = {"__name__": "readme"}
    first, *others = _blocks("python")
    blocks = [block for block in others if _needs_a_bucket(block[1])]
    assert blocks
    for line, block in (first, *blocks):
        _run(line, block, namespace)
    assert [found.step for found in list_checkpoints(gcs.open("run"))] == [1000]


def _needs_a_bucket(block: str) -> bool:
    return "://bucket" in block


def _run(line: int, block: str, namespace: dict[str, object]) -> None:
    # The padding makes a traceback show the README's own line numbers.
    exec(compile("\n" * line + block, str(_README), "exec"), namespace)  # noqa: S102 - it is our README


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    commands = [line for line in _shell_lines() if "tox -e test" in line]
    assert len(commands) == 1
    assert commands[0] in (_ROOT / ".ci" / "run").read_text("utf-8")


def test_every_extra_that_the_readme_installs_exists() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {
        extra
        for extras in re.findall(r"(?:vibe-store|'\.)\[([a-z0-9,]+)\]", _README.read_text("utf-8"))
        for extra in extras.split(",")
    }
    assert named
    assert named <= set(project["optional-dependencies"])


def test_every_subcommand_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from vibe_store.cli import main

    named = {name for line in _shell_lines() for name in re.findall(r"\bvibe-store ([a-z]+)", line)}
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert named >= {"train", "ls", "show", "verify", "plugins"}
    assert {name for name in named if not re.search(rf"^  {name} ", usage, re.MULTILINE)} == set()


def test_every_link_to_a_file_leads_to_one() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", _README.read_text("utf-8"))
    assert links
    assert [link for link in links if not (_ROOT / link).exists()] == []
