"""``vibe-store verify-resume``: a preset, killed and resumed, is compared with itself undisturbed."""

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vibe_store.cli.arguments import parse_runner
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.presets import Preset, get_preset, preset_names
from vibe_store.runner.resume_check import verify_resume as check

__all__ = ["verify_resume"]

_STEPS = 20_000
_SHOWN = 20
_OURS = ("--run-id", "--base-dir", "--runner.resume", "--runner.overwrite", "--runner.checkpoint-dir")


def verify_resume(argv: Sequence[str]) -> int:
    """Check that the preset which ``argv`` begins with resumes bit for bit; return the exit status."""
    names = ", ".join(preset_names())
    usage = (
        "usage: vibe-store verify-resume PRESET [--kill N] [flags of the preset]\n\n"
        "Trains the preset straight, trains it again with N kills at random moments (3 by default)\n"
        "and as many resumes, and compares every leaf of the last checkpoints. Exits with 0 if all\n"
        "are equal bit for bit, with 1 if any differs. Without --runner.total-timesteps it trains\n"
        f"for {_STEPS:,} steps at the most.\n\n"
        f"presets: {names}\n\n`vibe-store train PRESET --help` shows the flags of a preset."
    )
    if not argv:
        print(usage, file=sys.stderr)
        return 2
    name, *flags = argv
    if {"-h", "--help"} & set(argv):
        print(usage)
        return 0
    if name not in preset_names():
        print(f"error: there is no preset {name!r}; presets are: {names}.", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog=f"vibe-store verify-resume {name}", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--kill", type=int, default=3, metavar="N")
    own, flags = parser.parse_known_args(flags)
    if own.kill < 1:
        print(f"error: --kill is 1 or more; got {own.kill}.", file=sys.stderr)
        return 2
    taken = sorted(_names(flags) & set(_OURS))
    if taken:
        print(f"error: verify-resume chooses {', '.join(taken)} itself; leave it out.", file=sys.stderr)
        return 2
    preset = get_preset(name)
    given = parse_runner(preset, flags, prog=f"vibe-store verify-resume {name}")
    return _verify(name, [*_short(preset, given, _names(flags)), *flags], own.kill)


def _verify(preset: str, flags: Sequence[str], kills: int) -> int:
    def command(directory: str) -> list[str]:
        run = Path(directory)
        place = ["--runner.resume", "true", "--base-dir", str(run.parent), "--run-id", run.name]
        return [sys.executable, "-m", "vibe_store.cli", "train", preset, *flags, *place]

    print(f"Training {shlex.join([preset, *flags])}", flush=True)
    equal = True
    with _unwinding_at_signals():
        directory = tempfile.mkdtemp(prefix="vibe-store-verify-resume-")
        try:
            report = check(command, directory, kills=kills, on_event=lambda text: print(text, flush=True))
            equal = not report.differences
        finally:
            if equal:
                shutil.rmtree(directory)
    if equal:
        times = f"{len(report.kills)} kill{'s' * (len(report.kills) != 1)}"
        print(f"All {report.leaves} leaves of step {report.step:,} are equal bit for bit after {times}.")
        return 0
    for difference in report.differences[:_SHOWN]:
        print(difference)
    if len(report.differences) > _SHOWN:
        print(f"... and {len(report.differences) - _SHOWN} more")
    print(
        f"{len(report.differences)} of {report.leaves} leaves of step {report.step:,} differ: see {directory}"
    )
    return 1


@contextmanager
def _unwinding_at_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does: after the trainer, and what it wrote, is gone.

    A signal that the process was told to ignore, by nohup say, stays ignored.
    """

    def unwind(signum: int, frame: FrameType | None) -> None:
        del frame
        for each in previous:  # a second one would disturb the clearing up
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    handled = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    previous = {each: signal.signal(each, unwind) for each in handled}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def _short(preset: Preset, given: RunnerConfig, names: set[str]) -> list[str]:
    """Return the flags that make a run short and save ten times; what the user gave is left to them."""
    total, interval = "--runner.total-timesteps", "--runner.checkpoint-interval"
    steps = given.total_timesteps if total in names else min(preset.runner.total_timesteps, _STEPS)
    defaults = {total: steps, interval: min(preset.runner.checkpoint_interval, max(1, steps // 10))}
    return [word for flag, value in defaults.items() if flag not in names for word in (flag, str(value))]


def _names(flags: Sequence[str]) -> set[str]:
    """Return the names of flags, as help writes them; `_` and `-` are the same."""
    return {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
