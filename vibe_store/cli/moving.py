"""``vibe-store copy`` and ``prune``: checkpoints from one place to another, and away.

Neither imports JAX. The keys of what ``--json`` prints are stable:

- ``copy``: ``source``, ``target``, ``copied`` and ``skipped`` (the steps; null is a checkpoint without one),
  and ``size`` (the bytes that were copied).
- ``prune``: ``directory``, ``dry_run``, ``deleted`` and ``kept``, lists by step of objects with ``step`` and
  ``size`` (bytes).
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vibe_store.checkpoint.copying import CopyProgress, copy_checkpoints
from vibe_store.checkpoint.finding import located
from vibe_store.checkpoint.layout import read_best
from vibe_store.checkpoint.opening import open_directory
from vibe_store.checkpoint.pruning import prune_checkpoints
from vibe_store.checkpoint.step_index import latest_step
from vibe_store.cli.inspect import print_json, step_number
from vibe_store.cli.options import StorageOptions, parse_options
from vibe_store.cli.progress import readable_size
from vibe_store.errors import CheckpointNotFoundError, InvalidValueError
from vibe_store.interfaces import CheckpointInfo, RetentionPolicy
from vibe_store.registry import get_retention
from vibe_store.retention import keep_any, latest
from vibe_store.storage.redaction import without_credentials

__all__ = ["copy", "prune"]

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class _Copy:
    """Copy checkpoints, verified, whole ones only. Run it again to go on with what was interrupted.

    Credentials come from the environment, where boto3 and Google's own clients look for them, too.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A run's directory, a directory of checkpoints, or one checkpoint, or a URL."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The directory to copy into, or its URL; it is created. In a run's directory it is `checkpoints`."""
    steps: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP ...")] = ()
    """Which steps; all by default."""
    best: _Flag = False
    """Copy the step that `best` points to."""
    newest: _Flag = False
    """Copy the highest step."""
    source_options: StorageOptions = None
    """What the storage of SRC takes, as a JSON object; credentials are better left to the environment."""
    target_options: StorageOptions = None
    """What the storage of DST takes, as a JSON object."""
    json: _Flag = False
    """Print JSON."""


@dataclass(frozen=True)
class _Prune:
    """Delete checkpoints, but never the highest one, the one that `best` points to, or a pinned one.

    What writers that died left is removed too. A run that writes to a bucket is not disturbed.
    """

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A run's directory or a directory of checkpoints, or the URL of one of these."""
    keep: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """How many of the highest steps to keep."""
    retention: Annotated[str | None, tyro.conf.arg(metavar="POLICY")] = None
    """Keep what this retention policy keeps, too: its name, with options as `every_steps:interval=1000`."""
    keep_period: Annotated[int | None, tyro.conf.arg(metavar="P")] = None
    """Keep every step that is a multiple of this, too."""
    best: Annotated[str | None, tyro.conf.arg(metavar="METRIC")] = None
    """Keep the checkpoint that is best by this metric, too."""
    mode: Literal["min", "max"] | None = None
    """Whether the lowest or the highest METRIC is best."""
    dry_run: _Flag = False
    """Change nothing, and print what would be deleted."""
    dead_after_secs: float = 86_400.0
    """How old in a bucket an object of no checkpoint has to be to be removed; longer than any save takes."""
    storage_options: StorageOptions = None
    """What the storage takes, as a JSON object; credentials are better left to the environment."""
    json: _Flag = False
    """Print JSON."""


def copy(argv: Sequence[str]) -> int:
    """Copy checkpoints; return the exit status."""
    arguments = tyro.cli(_Copy, prog="vibe-store copy", args=argv)
    source_options = parse_options(arguments.source_options, "--source-options")
    target_options = parse_options(arguments.target_options, "--target-options")
    if bool(arguments.steps) + arguments.best + arguments.newest > 1:
        print("error: give one of --steps, --best and --newest.", file=sys.stderr)
        return 2
    steps = [number for word in arguments.steps if (number := step_number(word)) is not None] or None
    source, only = located(arguments.source, None, source_options)
    target = _target(arguments.target, target_options)
    if arguments.best or arguments.newest:
        steps = [_one_step(source, source_options, best=arguments.best)]
    if only is not None:
        if steps not in (None, [only]):
            raise InvalidValueError(
                f"{without_credentials(arguments.source)} is step {only} itself. Give the directory around "
                "it to copy other steps."
            )
        steps = [only]
    with _Display(quiet=arguments.json) as display:
        try:
            done = copy_checkpoints(
                source,
                target,
                steps=steps,
                storage_options=source_options,
                target_options=target_options,
                on_progress=display,
            )
        except KeyboardInterrupt:
            count = f"{display.copied} checkpoint{'s' * (display.copied != 1)}"
            print(f"Copied {count}, whole. Run the same command again to go on.", file=sys.stderr)
            raise
    shown = without_credentials(target)
    if arguments.json:
        places = {"source": without_credentials(source), "target": shown}
        print_json({**places, "copied": done.copied, "skipped": done.skipped, "size": done.size})
        return 0
    count = f"{len(done.copied)} checkpoint{'s' * (len(done.copied) != 1)}"
    there = f"; {len(done.skipped)} {_were(len(done.skipped))} there already" if done.skipped else ""
    print(f"Copied {count} ({readable_size(done.size)}) to {shown}{there}.")
    return 0


def prune(argv: Sequence[str]) -> int:
    """Delete checkpoints; return the exit status."""
    arguments = tyro.cli(_Prune, prog="vibe-store prune", args=argv)
    options = parse_options(arguments.storage_options, "--storage-options")
    if (arguments.best is None) != (arguments.mode is None):
        print(
            "error: --best METRIC and --mode go together: say whether the lowest (min) or the highest (max) "
            "is best.",
            file=sys.stderr,
        )
        return 2
    if arguments.keep is None and arguments.retention is None:
        print("error: give --keep N or --retention POLICY, or both.", file=sys.stderr)
        return 2
    for name, number in (("--keep", arguments.keep), ("--keep-period", arguments.keep_period)):
        if number is not None and number < 1:
            print(f"error: {name} is 1 or more; got {number}.", file=sys.stderr)
            return 2
    directory, step = located(arguments.directory, None, options)
    shown = without_credentials(directory)
    if step is not None:
        raise InvalidValueError(
            f"{without_credentials(arguments.directory)} is one checkpoint. Give the directory around it, "
            f"{shown}."
        )
    done = prune_checkpoints(
        directory,
        _policy(arguments.keep, arguments.retention),
        keep_period=arguments.keep_period,
        best_metric=arguments.best,
        best_mode=arguments.mode,
        dry_run=arguments.dry_run,
        dead_after_secs=arguments.dead_after_secs,
        storage_options=options,
    )
    if arguments.json:
        rows = {"deleted": _rows(done.deleted), "kept": _rows(done.kept)}
        print_json({"directory": shown, "dry_run": arguments.dry_run, **rows})
        return 0
    goes = "would delete" if arguments.dry_run else "deleted"
    for word, infos in ((goes, done.deleted), ("keep", done.kept)):
        for info in infos:
            print(f"{word} step {info.step} ({readable_size(info.size)})")
    freed, total = sum(info.size for info in done.deleted), len(done.deleted) + len(done.kept)
    what = f"{len(done.deleted)} of {total} checkpoints in {shown} ({readable_size(freed)})"
    print(f"Would delete {what}; nothing was changed." if arguments.dry_run else f"Deleted {what}.")
    return 0


class _Display:
    """Shows a copy that is under way: a bar on a terminal, and a line for each step that is there.

    Attributes:
        copied: how many steps are.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.copied = 0
        self._console = Console(markup=False, highlight=False, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("looking ...", total=None)
        self._stack = ExitStack()

    def __call__(self, progress: CopyProgress) -> None:
        name = "checkpoint" if progress.step is None else f"step {progress.step}"
        if progress.copied > self.copied:
            self.copied = progress.copied
            self._console.print(f"{name} copied ({progress.copied} of {progress.steps})", soft_wrap=True)
        self._bar.update(self._task, description=name, completed=progress.bytes_read, total=progress.size)

    def __enter__(self) -> "_Display":
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()


def _target(directory: str, options: Mapping[str, Any] | None) -> str:
    """Return the directory of checkpoints to copy into, which need not exist."""
    if "://" not in directory and not Path(directory).exists():
        return directory
    found, step = located(directory, None, options)
    if step is None:
        return found
    raise InvalidValueError(
        f"{without_credentials(directory)} is the folder of one step, and each step makes its own. Give the "
        f"directory around it, {without_credentials(found)}."
    )


def _one_step(directory: str, options: Mapping[str, Any] | None, *, best: bool) -> int:
    storage = open_directory(directory, options)
    step = read_best(storage) if best else latest_step(storage)
    if step is None:
        what = "no `best`" if best else "no committed step"
        raise CheckpointNotFoundError(f"There is {what} in {without_credentials(directory)}.")
    return step


def _policy(keep: int | None, retention: str | None) -> RetentionPolicy:
    """Return the policy that keeps the highest steps and what a named policy keeps, where these are given."""
    policies = [] if keep is None else [latest(keep)]
    policies += [] if retention is None else [get_retention(retention)]
    return keep_any(*policies)


def _rows(infos: Sequence[CheckpointInfo]) -> list[dict[str, int | None]]:
    return [{"step": info.step, "size": info.size} for info in infos]


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
