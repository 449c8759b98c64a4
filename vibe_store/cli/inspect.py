"""``vibe-store ls``, ``show``, ``verify`` and ``plugins``: what is there, as text or, with ``--json``, JSON.

None of them imports JAX. The keys of the JSON are stable; numbers that JSON lacks are the strings ``"NaN"``,
``"Infinity"`` and ``"-Infinity"``, and times are ISO 8601 with time zone.

- ``ls``: ``directory``, and ``checkpoints``, a list by step of objects with ``step``, ``status``
  (``"committed"``; ``"damaged"`` where its manifest cannot be read; ``"newer"`` where only a newer vibe_store
  can read it; ``"unverified"`` where no manifest names the files; ``"set-aside"`` where a resumed run found
  that it does not verify), ``best``, and, null where the checkpoint is not committed, ``created``, ``size``
  (bytes), ``serializer``, ``items`` (names), ``metrics`` and ``pinned``.
- ``show``: ``directory``, ``step``, ``created``, ``format``, ``size``, ``versions``, ``metrics``,
  ``metadata``, and ``items``, an object by name of objects with ``serializer``, ``distribution`` (where that
  came from: an object with ``name`` and ``version``, or null), ``files`` (``name``, ``key``, ``size``,
  ``checksum``) and ``leaves`` (``path``, ``kind``, ``dtype``, ``shape``, ``impl``, ``value``).
- ``verify``: ``directory``, ``checked`` (the steps; null is a checkpoint without one), ``ok``, and
  ``faults``, a list of objects with ``step``, ``file`` and ``problem``.
- ``plugins``: see :func:`vibe_store.cli.plugins.plugins_json`, and with a name
  :func:`~vibe_store.cli.plugins.describe_plugins`.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from vibe_store.checkpoint.finding import located
from vibe_store.checkpoint.looking import list_checkpoints, load_manifest, verify_checkpoint
from vibe_store.checkpoint.manifest import Manifest
from vibe_store.checkpoint.opening import locate
from vibe_store.checkpoint.reading import load_metadata_of
from vibe_store.cli.options import StorageOptions, parse_options
from vibe_store.cli.plugins import describe_plugins, list_plugins
from vibe_store.cli.progress import readable_size
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from vibe_store.interfaces import Leaf, Verify
from vibe_store.storage.redaction import without_credentials

__all__ = ["ls", "plain_metrics", "plain_number", "plugins", "print_json", "show", "step_number", "verify"]

_Directory = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
_Step = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[STEP]")]
_Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class _Ls:
    """List the checkpoints of a directory, by step."""

    directory: _Directory
    """A run's directory, a directory of checkpoints, or one checkpoint, or the URL of one of these."""
    storage_options: StorageOptions = None
    """What the storage takes, as a JSON object; credentials are better left to the environment."""
    json: _Json = False
    """Print JSON."""


@dataclass(frozen=True)
class _Show:
    """Show what one checkpoint holds: its items, their files and leaves, its metrics and metadata."""

    directory: _Directory
    """A run's directory, a directory of checkpoints, or one checkpoint, or the URL of one of these."""
    step: _Step = None
    """Which checkpoint; the newest by default."""
    storage_options: StorageOptions = None
    """What the storage takes, as a JSON object; credentials are better left to the environment."""
    json: _Json = False
    """Print JSON."""


@dataclass(frozen=True)
class _Verify:
    """Read every byte of checkpoints and compare it with what was written; exit with 1 if any differs."""

    directory: _Directory
    """A run's directory, a directory of checkpoints, or one checkpoint, or the URL of one of these."""
    step: _Step = None
    """Which checkpoint; all of them by default."""
    level: Verify = "full"
    """How closely: every byte, or only whether each file has its size (sizes), or is there (off)."""
    storage_options: StorageOptions = None
    """What the storage takes, as a JSON object; credentials are better left to the environment."""
    json: _Json = False
    """Print JSON."""


@dataclass(frozen=True)
class _Plugins:
    """List the storages, serializers and retention policies that are built in or installed as plugins.

    With a name, import what it names, and show its options and its help.
    """

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """Which one: a URL scheme, or the name of a serializer or of a retention policy."""
    json: _Json = False
    """Print JSON."""


def ls(argv: Sequence[str]) -> int:
    """List checkpoints; return the exit status."""
    arguments = tyro.cli(_Ls, prog="vibe-store ls", args=argv)
    options = parse_options(arguments.storage_options, "--storage-options")
    directory, only = located(arguments.directory, None, options)
    listed = list_checkpoints(directory, storage_options=options)
    found = [entry for entry in listed if only is None or entry.step == only]
    if arguments.json:
        rows = []
        for entry in found:
            info = entry.info
            rows.append(
                {
                    "step": entry.step,
                    "status": entry.status,
                    "best": entry.best,
                    "created": info and info.created.isoformat(),
                    "size": info and info.size,
                    "serializer": info and info.serializer,
                    "items": info and list(info.items),
                    "metrics": info and plain_metrics(info.metrics),
                    "pinned": info and info.pinned,
                }
            )
        print_json({"directory": without_credentials(directory), "checkpoints": rows})
        return 0
    if not found:
        print(f"No steps in {without_credentials(directory)}.{_itself(directory, options)}")
        return 0
    table = _table("STEP", "CREATED", "SIZE", "ITEMS", "METRICS", "", right={"STEP", "SIZE"})
    for entry in found:
        info = entry.info
        marks: list[str] = [entry.status] if entry.status != "committed" else []
        marks += ["best"] if entry.best else []
        marks += ["pinned"] if info and info.pinned else []
        table.add_row(
            str(entry.step),
            f"{info.created.astimezone():%Y-%m-%d %H:%M:%S}" if info else "-",
            readable_size(info.size) if info else "-",
            ", ".join(info.items) if info else "-",
            _visible(_metrics_text(info.metrics)) if info else "-",
            ", ".join(marks),
        )
    _console().print(table)
    return 0


def show(argv: Sequence[str]) -> int:
    """Show one checkpoint; return the exit status."""
    arguments = tyro.cli(_Show, prog="vibe-store show", args=argv)
    options = parse_options(arguments.storage_options, "--storage-options")
    directory, step = located(arguments.directory, step_number(arguments.step), options)
    manifest = _manifest(directory, step, options)
    storage, step = locate(directory, manifest.step, options)
    metadata = load_metadata_of(storage, step)
    if arguments.json:
        print_json(
            {
                "directory": without_credentials(directory),
                "step": manifest.step,
                "created": manifest.created.isoformat(),
                "format": manifest.format,
                "size": manifest.size,
                "versions": dict(manifest.versions),
                "metrics": plain_metrics(manifest.metrics),
                "metadata": metadata,
                "items": {
                    name: {
                        "serializer": item.serializer,
                        "distribution": None if item.distribution is None else asdict(item.distribution),
                        "files": [
                            {"name": file_name, "key": file.key, "size": file.size, "checksum": file.checksum}
                            for file_name, file in item.files.items()
                        ],
                        "leaves": [_leaf_json(leaf) for leaf in item.leaves],
                    }
                    for name, item in manifest.items.items()
                },
            }
        )
        return 0
    console = _console()
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    facts = {
        "directory": without_credentials(directory),
        "step": "-" if manifest.step is None else str(manifest.step),
        "created": f"{manifest.created.astimezone():%Y-%m-%d %H:%M:%S %z}",
        "size": readable_size(manifest.size),
        "metrics": _metrics_text(manifest.metrics),
        "metadata": "-" if metadata is None else json.dumps(metadata),
        "written by": f"{versions} (format {manifest.format})",
    }
    for fact, value in facts.items():
        console.print(f"{fact:<10}  {_visible(value)}")
    for name, item in manifest.items.items():
        origin = "" if item.distribution is None else f" of {item.distribution}"
        console.print(f"\nitem {name}, written by the serializer {item.serializer}{origin}")
        files = _table("FILE", "SIZE", "XXH3-128", right={"SIZE"})
        for file in item.files.values():
            files.add_row(file.key, readable_size(file.size), file.checksum)
        leaves = _table("LEAF", "KIND", "DTYPE", "SHAPE", "VALUE")
        for leaf in item.leaves:
            leaves.add_row(*map(_visible, _leaf_row(leaf)))
        console.print(files)
        console.print(leaves)
    return 0


def verify(argv: Sequence[str]) -> int:
    """Verify checkpoints; return the exit status, 1 where there is a fault."""
    arguments = tyro.cli(_Verify, prog="vibe-store verify", args=argv)
    options = parse_options(arguments.storage_options, "--storage-options")
    directory, step = located(arguments.directory, step_number(arguments.step), options)
    faults = verify_checkpoint(directory, step=step, level=arguments.level, storage_options=options)
    checked = _checked_steps(directory, step, options)
    if arguments.json:
        rows = [{"step": fault.step, "file": fault.file, "problem": fault.problem} for fault in faults]
        print_json(
            {
                "directory": without_credentials(directory),
                "checked": checked,
                "ok": not faults,
                "faults": rows,
            }
        )
        return 1 if faults else 0
    for fault in faults:
        print(f"{'checkpoint' if fault.step is None else f'step {fault.step}'}: {fault.problem}")
    bad, where = len({fault.step for fault in faults}), without_credentials(directory)
    if faults:
        print(f"{bad} of {len(checked)} checkpoints in {where} {'is' if bad == 1 else 'are'} damaged.")
    else:
        good = {
            "full": "all as they were saved",
            "sizes": "every file has its size",
            "off": "no file is missing",
        }
        print(f"{len(checked)} checkpoint{'s' * (len(checked) != 1)} in {where}: {good[arguments.level]}.")
    return 1 if faults else 0


def plugins(argv: Sequence[str]) -> int:
    """List what plugins provide, importing none of it, or describe one; return the exit status."""
    arguments = tyro.cli(_Plugins, prog="vibe-store plugins", args=argv)
    if arguments.name is None:
        print(list_plugins(as_json=arguments.json))
        return 0
    text, whole = describe_plugins(arguments.name, as_json=arguments.json)
    print(text)
    return 0 if whole else 1


def step_number(word: str | None) -> int | None:
    """Read a step; the parser of the arguments would fill a box with all the types that it tried."""
    if word is None:
        return None
    try:
        step = int(word)
    except ValueError:
        step = -1
    if step >= 0:
        return step
    print(f"error: a step is a whole number, 0 or more; {word!r} is none.", file=sys.stderr)
    raise SystemExit(2)


def _manifest(directory: str, step: int | None, options: Mapping[str, Any] | None) -> Manifest:
    """Return the manifest of a step; without one, of the directory itself, else of its newest step."""
    try:
        return load_manifest(directory, step=step, storage_options=options)
    except CheckpointNotFoundError as error:
        listed = list_checkpoints(directory, storage_options=options)
        committed = [entry.step for entry in listed if entry.status == "committed"]
        if step is None and committed:
            return load_manifest(directory, step=max(committed), storage_options=options)
        if step is None:
            raise CheckpointNotFoundError(
                f"There is no committed checkpoint in {without_credentials(directory)}."
            ) from error
        steps = ", ".join(map(str, committed)) or "none"
        raise CheckpointNotFoundError(
            f"There is no committed checkpoint of step {step} in {without_credentials(directory)}; "
            f"committed are: {steps}."
        ) from error


def _itself(directory: str, options: Mapping[str, Any] | None) -> str:
    """Return a sentence where the directory is a checkpoint without a step."""
    try:
        load_manifest(directory, storage_options=options)
    except CheckpointNotFoundError:
        return ""
    return f" It is itself a checkpoint: see `vibe-store show {shlex.quote(without_credentials(directory))}`."


def _checked_steps(directory: str, step: int | None, options: Mapping[str, Any] | None) -> list[int | None]:
    """Return what ``verify_checkpoint`` looks at, given the same arguments."""
    if step is not None:
        return [step]
    looked_at = [
        entry.step
        for entry in list_checkpoints(directory, storage_options=options)
        if entry.status in {"committed", "damaged", "newer"}
    ]
    try:
        load_manifest(directory, storage_options=options)
    except CheckpointNotFoundError:
        return [*looked_at]
    except (CorruptCheckpointError, NewerFormatError):
        pass
    return [None, *looked_at]


def _console() -> Console:
    # A table that goes into a pipe or a file is never cut to the width of a terminal.
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def _table(*names: str, right: frozenset[str] | set[str] = frozenset()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def print_json(value: Any) -> None:
    """Print JSON, indented."""
    print(json.dumps(value, indent=2, allow_nan=False))


def plain_metrics(metrics: Mapping[str, float] | None) -> dict[str, float | str] | None:
    """Return metrics as JSON can hold them; what it lacks as text."""
    return None if metrics is None else {name: plain_number(value) for name, value in metrics.items()}


def plain_number(value: float) -> float | str:
    """Return a number as JSON can hold it; what it lacks as text."""
    return value if math.isfinite(value) else _NON_FINITE[str(value)]


_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _metrics_text(metrics: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in metrics.items()) if metrics else "-"


def _visible(text: str) -> str:
    """Return a text of a checkpoint for a terminal, which must not take any of it for a command."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _leaf_json(leaf: Leaf) -> dict[str, Any]:
    return {
        "path": leaf.path,
        "kind": leaf.kind,
        "dtype": leaf.dtype,
        "shape": None if leaf.shape is None else list(leaf.shape),
        "impl": leaf.impl,
        "value": leaf.value,
    }


def _leaf_row(leaf: Leaf) -> tuple[str, ...]:
    shape = "" if leaf.shape is None else str(leaf.shape)
    kind = f"key ({leaf.impl})" if leaf.impl else leaf.kind
    return leaf.path or "(the tree itself)", kind, leaf.dtype or "", shape, leaf.value or ""
