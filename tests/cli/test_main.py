"""The command as a whole: what it says of itself, what an error looks like, and what it imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vibe_store.cli import main

Run = Callable[..., Any]


def test_help_names_every_command(vibe_store: Run) -> None:
    ran = vibe_store("--help")
    assert (ran.status, ran.err) == (0, "")
    for command in ("train", "eval", "curves", "verify-resume", "ls", "show", "verify", "plugins"):
        assert f"\n  {command} " in ran.out


def test_no_command_is_a_mistake(vibe_store: Run) -> None:
    ran = vibe_store()
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("usage: vibe-store COMMAND")


def test_an_unknown_command_is_answered_with_those_that_exist(vibe_store: Run) -> None:
    ran = vibe_store("lst")
    assert ran.status == 2
    assert (
        ran.err == "error: there is no command 'lst'; there are train, eval, curves, verify-resume, "
        "ls, show, verify, copy, prune, plugins.\n"
    )


def test_an_error_is_one_sentence_and_no_traceback(vibe_store: Run, tmp_path: Path) -> None:
    ran = vibe_store("ls", tmp_path / "nowhere")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == f"error: There is no directory {tmp_path / 'nowhere'}.\n"


def test_a_url_that_lost_a_slash_is_told_from_a_missing_directory(vibe_store: Run) -> None:
    ran = vibe_store("ls", "s3:/bucket/run")
    assert (ran.status, ran.out) == (1, "")
    assert "lost a slash" in ran.err


def test_an_error_of_the_system_is_one_sentence_too(vibe_store: Run, tmp_path: Path) -> None:
    name = "x" * 300
    ran = vibe_store("ls", tmp_path / name)
    assert ran.status == 1
    assert ran.err == f"error: File name too long: {tmp_path / name}\n"


def test_a_path_that_the_encoding_of_the_output_lacks_is_shown_all_the_same(run_path: Path) -> None:
    folder = run_path.rename(run_path.with_name("r\u00fcn"))
    command = [sys.executable, "-m", "vibe_store.cli", "ls", folder / "logs"]
    (folder / "logs").mkdir()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"No steps in {folder.parent}/r\\xfcn/logs.\n"


def test_an_error_of_a_server_names_its_url(vibe_store: Run) -> None:
    pytest.importorskip("aiohttp")
    ran = vibe_store("ls", "http://localhost:1/x")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: Connect call failed")
    assert "in 'http://localhost:1/x" in ran.err


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIBE_STORE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        main(["ls", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("command", "missing", "extras"),
    [
        ("ls", "tyro", "cli"),
        ("ls", "rich", "cli"),
        ("train", "tyro", "cli,rl"),
    ],
)
def test_a_missing_package_is_answered_with_what_to_install(
    vibe_store: Run, monkeypatch: pytest.MonkeyPatch, command: str, missing: str, extras: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(("vibe_store.cli.", missing))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    ran = vibe_store(command, "--help")
    assert ran.status == 1
    assert ran.err == f'error: {missing} is not installed: run `pip install "vibe-store[{extras}]"`.\n'


def test_a_missing_package_of_another_kind_is_a_bug_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vibe_store.cli.inspect", raising=False)
    monkeypatch.setitem(sys.modules, "vibe_store.checkpoint.looking", None)
    with pytest.raises(ModuleNotFoundError, match=r"vibe_store\.checkpoint\.looking"):
        main(["ls", "--help"])


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"]])
def test_a_reader_that_goes_away_ends_the_command_quietly(run_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "vibe_store.cli", *arguments, run_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as err:
        assert (process.wait(), err.read()) == (1, b"")


def test_looking_at_checkpoints_and_moving_them_imports_no_jax(run_path: Path) -> None:
    program = (
        "import sys\n"
        "from vibe_store.cli import main\n"
        "for command in (['ls'], ['show'], ['verify'], ['show', '--json'], ['plugins']):\n"
        "    path = [] if command == ['plugins'] else [sys.argv[1]]\n"
        "    assert main(command + path) == 0\n"
        "assert main(['copy', sys.argv[1], sys.argv[1] + '-copy']) == 0\n"
        "assert main(['prune', sys.argv[1] + '-copy', '--keep', '1']) == 0\n"
        "heavy = {'jax', 'equinox', 'gymnax', 'fsspec', 'optax'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", program, run_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_command_alone_imports_no_parser_and_no_terminal_library() -> None:
    program = (
        "import sys\n"
        "from vibe_store.cli import main\n"
        "main(['--help'])\n"
        "heavy = {'jax', 'tyro', 'rich', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
