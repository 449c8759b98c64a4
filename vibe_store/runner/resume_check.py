"""``verify_resume``: a trainer is killed and resumed, and has to end in the same bits as one that was not.

It is told how to start the trainer, as a command, and looks only at the checkpoints that this commits.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vibe_store.errors import InvalidValueError, TrainerFailedError

__all__ = ["ResumeReport", "differing_leaves", "verify_resume"]

_POLL_SECS = 0.02
_SHOWN_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeReport:
    """What :func:`verify_resume` found.

    Attributes:
        step: the step of the last checkpoint of the run that was not killed, which was compared.
        kills: for each kill the newest step that was committed by then; -1 where there was none.
        leaves: how many leaves that checkpoint has, over all its items.
        differences: a sentence on each leaf that differs, beginning with its item and path; empty where all
            leaves are equal, bit for bit.
    """

    step: int
    kills: tuple[int, ...]
    leaves: int
    differences: tuple[str, ...]


def verify_resume(
    command: Callable[[str], Sequence[str]],
    directory: str | os.PathLike[str],
    *,
    kills: int = 3,
    on_event: Callable[[str], None] | None = None,
) -> ResumeReport:
    """Train straight, train again with kills, and compare every leaf of the last checkpoint of both.

    Each run is a process of its own, ended by SIGKILL at random moments that are spread over the whole run,
    and started again by the same command.

    Args:
        command: returns the command that trains into a folder, given its path. The process goes on from the
            newest checkpoint there, if there is one; commits its checkpoints in that folder, or in
            ``checkpoints`` below it; and ends with status 0 once it has trained to its end.
        directory: a folder for both runs, ``straight`` and ``killed``, and for what they print.
        kills: how often to kill.
        on_event: is called with a sentence on each thing that happened.

    Raises:
        InvalidValueError: the run is too short to be killed, or ``directory`` already has such runs.
        TrainerFailedError: the trainer failed, committed no checkpoint, or began anew instead of resuming.
    """
    if not isinstance(kills, int) or isinstance(kills, bool) or kills < 1:
        raise InvalidValueError(f"kills={kills!r} cannot be used: it must be a whole number, at least 1.")
    tell = on_event or (lambda _: None)
    straight, killed = (Path(directory) / name for name in ("straight", "killed"))
    for folder in (straight, killed):
        if folder.exists():
            raise InvalidValueError(f"{folder} exists. Give a folder in which nothing was trained yet.")
    pace = _train_straight(command, straight)
    tell(f"Trained straight to step {pace.end:,} in {pace.seconds:.1f} s.")
    happened = _train_with_kills(command, killed, pace, kills, tell)
    end = max(_committed(killed))
    leaves, differences = differing_leaves(_place(straight), _place(killed), pace.end)
    if end != pace.end:
        differences.insert(0, f"the killed run ended at step {end:,} instead of {pace.end:,}")
    return ResumeReport(step=pace.end, kills=tuple(happened), leaves=leaves, differences=tuple(differences))


def differing_leaves(
    one: str | os.PathLike[str], other: str | os.PathLike[str], step: int
) -> tuple[int, list[str]]:
    """Compare a step of two directories of checkpoints, bit for bit.

    Returns:
        How many leaves the first has, and a sentence on each leaf that differs.
    """
    first, second = _leaves(one, step), _leaves(other, step)
    differences = [
        f"{path}: {difference}"
        for path in [*first, *(path for path in second if path not in first)]
        if (difference := _difference(first.get(path), second.get(path))) is not None
    ]
    return len(first), differences


@dataclass(frozen=True, slots=True)
class _Pace:
    """How a run that nobody disturbs goes.

    Attributes:
        end: its last step.
        last_target: the last step to kill after: two gaps between checkpoints before the end, or 0.
        start_secs: how long it took until its first checkpoint.
        gap_secs: how long it took from one checkpoint to the next, about.
        seconds: how long it took in all.
    """

    end: int
    last_target: int
    start_secs: float
    gap_secs: float
    seconds: float


def _train_straight(command: Callable[[str], Sequence[str]], folder: Path) -> _Pace:
    began, start_secs, first = time.monotonic(), 0.0, -1
    with _life(command, folder) as process:
        while process.poll() is None:
            if first < 0 and (found := _committed(folder)):
                start_secs, first = time.monotonic() - began, min(found)
            time.sleep(_POLL_SECS)
        _check_end(process, folder)
    seconds, steps = time.monotonic() - began, sorted(_committed(folder))
    if not steps:
        raise TrainerFailedError(f"The trainer committed no checkpoint in {folder}.")
    if len(steps) == 1:
        raise InvalidValueError(
            f"The run saved only its step {steps[0]:,}, so there is nothing to resume from. Let it save more "
            "often, or train for longer."
        )
    end, before = steps[-1], steps[-2]
    n_gaps = max((end - max(first, 0)) / (end - before), 1.0)
    last_target = max(end - 2 * (end - before), 0)
    return _Pace(end, last_target, start_secs or seconds, (seconds - start_secs) / n_gaps, seconds)


def _train_with_kills(
    command: Callable[[str], Sequence[str]],
    folder: Path,
    pace: _Pace,
    kills: int,
    tell: Callable[[str], None],
) -> list[int]:
    """Train to the end; return the newest committed step at each kill."""
    random = np.random.default_rng()
    happened: list[int] = []
    before: Mapping[int, datetime] = {}
    for part in range(kills):
        target = int((part + random.uniform()) / kills * pace.last_target)
        newest = max(before, default=-1)
        wait_secs = random.uniform(0, pace.gap_secs if newest < target else pace.start_secs)
        with _life(command, folder) as process:
            if not _is_alive_after(process, folder, before, target, wait_secs):
                _check_end(process, folder)
                break
            _kill(process)
        before = _progress(folder, before)
        happened.append(max(before, default=-1))
        tell(f"Killed {'before any step was' if not before else f'with step {happened[-1]:,}'} committed.")
    else:
        with _life(command, folder) as process:
            while process.poll() is None:
                _progress(folder, before)
                time.sleep(_POLL_SECS)
            _check_end(process, folder)
    _progress(folder, before)
    if not happened:
        raise InvalidValueError(
            "The run was at its end before it could be killed. Train for longer, or save more often."
        )
    if len(happened) < kills:
        tell(f"The run was at its end after {len(happened)} of {kills} kills.")
    return happened


def _is_alive_after(
    process: "subprocess.Popen[bytes]",
    folder: Path,
    before: Mapping[int, datetime],
    step: int,
    wait_secs: float,
) -> bool:
    """Wait for a committed step and a while longer; say whether the process still runs."""
    while process.poll() is None and max(_progress(folder, before), default=-1) < step:
        time.sleep(_POLL_SECS)
    try:
        process.wait(wait_secs)
    except subprocess.TimeoutExpired:
        return True
    return False


@contextmanager
def _life(command: Callable[[str], Sequence[str]], folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """Start the trainer in a process group of its own, of which nothing is left afterwards."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(folder).open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - the command is the caller's own
            list(command(str(folder))),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _check_end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    if process.returncode != 0:
        lines = _log(folder).read_text("utf-8", "replace").splitlines()[-_SHOWN_LINES:]
        said = "\n".join(["Its last lines:", *lines]) if lines else "It printed nothing."
        raise TrainerFailedError(f"The trainer ended with status {process.returncode}. {said}")


def _place(folder: Path) -> Path:
    """Return where a run has its checkpoints."""
    below = folder / "checkpoints"
    return below if below.is_dir() else folder


def _committed(folder: Path) -> dict[int, datetime]:
    """Return the committed steps of a run, and when each was committed."""
    from vibe_store.checkpoint import list_checkpoints

    if not folder.is_dir():
        return {}
    return {
        entry.step: entry.info.created for entry in list_checkpoints(_place(folder)) if entry.info is not None
    }


def _progress(folder: Path, before: Mapping[int, datetime]) -> Mapping[int, datetime]:
    """Return the committed steps; refuse a run that threw away or wrote again what it was to resume from."""
    now = _committed(folder)
    again = [step for step, created in before.items() if now.get(step, created) != created]
    if again or max(now, default=-1) < max(before, default=-1):
        raise TrainerFailedError(
            f"The trainer did not go on from step {max(before):,}, which was committed when it was killed, "
            f"but began anew in {folder}. The command must resume where there are checkpoints."
        )
    return now


def _leaves(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """Return every leaf of a checkpoint, by item and path."""
    from vibe_store.checkpoint import CheckpointManager, load_manifest

    names = [name for name in load_manifest(directory, step=step).items if name != "state"]
    with CheckpointManager(directory) as manager:
        state, items = manager.restore(step, items=dict.fromkeys(names))
    return {
        f"{name}{jax.tree_util.keystr(path)}": leaf
        for name, tree in {"state": state, **items}.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _difference(one: Any, other: Any) -> str | None:
    """Return how two leaves differ, as a clause; None where they are the same."""
    if other is None:
        return "is missing from the killed run"
    if one is None:
        return "is in the killed run alone"
    mine, others = _host(one), _host(other)
    if not (isinstance(mine, np.ndarray) and isinstance(others, np.ndarray)):
        same = type(mine) is type(others) and repr(mine) == repr(others)
        return None if same else f"{mine!r} became {others!r}"
    if (mine.shape, mine.dtype) != (others.shape, others.dtype):
        return f"{mine.dtype}{list(mine.shape)} became {others.dtype}{list(others.shape)}"
    if mine.tobytes() == others.tobytes():
        return None
    n_differing = int(np.any(_bytes(mine) != _bytes(others), axis=-1).sum())
    return f"{n_differing:,} of {mine.size:,} numbers differ"


def _host(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _bytes(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    return np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, array.itemsize)
