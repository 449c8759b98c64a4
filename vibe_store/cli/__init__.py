"""The ``vibe-store`` command: picks a subcommand, and says in one sentence what went wrong."""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TextIO

from vibe_store.cli.output import silence
from vibe_store.errors import VibeStoreError, VibeStoreWarning

__all__ = ["main"]


@dataclass(frozen=True, slots=True)
class _Command:
    """A subcommand: its function takes the arguments after its name and returns the exit status."""

    function: str
    summary: str
    extras: str = "cli"


_COMMANDS = {
    "train": _Command(
        "vibe_store.cli.train:train", "Train an agent, or go on with a run that was stopped.", extras="cli,rl"
    ),
    "eval": _Command(
        "vibe_store.cli.evaluate:evaluate", "Play episodes with the policy of a checkpoint.", extras="cli,rl"
    ),
    "curves": _Command(
        "vibe_store.cli.curves:curves", "Draw the learning curves of runs.", extras="cli,plot"
    ),
    "verify-resume": _Command(
        "vibe_store.cli.verify_resume:verify_resume",
        "Kill and resume a preset, and compare it with itself undisturbed.",
        extras="cli,rl",
    ),
    "ls": _Command("vibe_store.cli.inspect:ls", "List the checkpoints of a directory or run."),
    "show": _Command("vibe_store.cli.inspect:show", "Show what one checkpoint holds, leaf by leaf."),
    "verify": _Command("vibe_store.cli.inspect:verify", "Read checkpoints whole and name every fault."),
    "copy": _Command("vibe_store.cli.moving:copy", "Copy checkpoints to another directory or bucket."),
    "prune": _Command("vibe_store.cli.moving:prune", "Delete the checkpoints that are not worth keeping."),
    "plugins": _Command(
        "vibe_store.cli.inspect:plugins", "List the plugins and what they provide, or describe one."
    ),
}

_OPTIONAL = {"optax", "rich", "tyro"}
"""Packages that come with an extra."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; those of the process by default.

    Returns:
        The exit status: 0; 2 where the command line is wrong by itself; 1 where what it asks for failed, or
        ``verify`` found a fault; 130 after Ctrl-C and 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what a terminal cannot show
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = _dispatch(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader (`head`, say) has gone. Rich ends with the same status when it meets the same.
            silence(sys.stdout)
            return 1
        except KeyboardInterrupt:
            return _fail("interrupted.", 130)
        except (VibeStoreError, OSError) as error:
            if os.environ.get("VIBE_STORE_TRACEBACK") == "1":
                raise
            return _fail(_sentence(error), 1)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in _OPTIONAL or os.environ.get("VIBE_STORE_TRACEBACK") == "1":
                raise
            extras = _COMMANDS[arguments[0]].extras
            return _fail(f'{missing} is not installed: run `pip install "vibe-store[{extras}]"`.', 1)
    return status


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else None
    if name in {"-h", "--help"}:
        print(_usage())
        return 0
    if name == "--version":
        print(f"vibe-store {version('vibe-store')}")
        return 0
    if name is None:
        print(_usage(), file=sys.stderr)
        return 2
    if name not in _COMMANDS:
        return _fail(f"there is no command {name!r}; there are {', '.join(_COMMANDS)}.", 2)
    module, _, function = _COMMANDS[name].function.partition(":")
    status: int = getattr(importlib.import_module(module), function)(arguments[1:])
    return status


def _usage() -> str:
    rows = "\n".join(f"  {name:<15}{command.summary}" for name, command in _COMMANDS.items())
    return (
        "usage: vibe-store COMMAND ...\n\n"
        f"{rows}\n\n"
        "`vibe-store COMMAND --help` shows what a command takes, `vibe-store --version` the version.\n"
        "With VIBE_STORE_TRACEBACK=1 in the environment an error shows where it was raised."
    )


def _fail(sentence: str, status: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename is not None else ""
        # A storage notes what it was doing, and at which URL.
        return ". ".join([f"{error.strerror}{place}", *getattr(error, "__notes__", [])])
    return str(error) or f"{type(error).__name__} without a message."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, VibeStoreWarning):
        text = f"warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    stream = file or sys.stderr
    try:
        stream.write(text)
    except OSError:  # nobody reads it; what warns must go on all the same
        silence(stream)
