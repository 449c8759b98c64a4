"""``vibe-store train``: one training run in a folder of its own, which can be stopped and gone on with."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

from vibe_store.checkpoint.layout import write_best
from vibe_store.checkpoint.opening import open_directory
from vibe_store.checkpoint.writer import become_writer
from vibe_store.cli.arguments import TrainPlan, plan_training, storing_settings
from vibe_store.cli.output import LastingOutput, silence
from vibe_store.cli.progress import ProgressDisplay
from vibe_store.errors import VibeStoreWarning
from vibe_store.metrics import MetricsLogger, TensorBoardLogger
from vibe_store.run_dir import Place
from vibe_store.runner.loop import MetricsWriter, TrainResult
from vibe_store.runner.presets import get_preset, preset_names
from vibe_store.runner.resume import opened
from vibe_store.runner.signals import TrainingInterrupted
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath

__all__ = ["train"]

_SAID_BY_RESTORE = ("runner.num_envs", "runner.num_seeds", "runner.seed")
"""Flags that restoring compares with the checkpoint, as it does the algorithm's: it says what changed."""


def train(argv: Sequence[str]) -> int:
    """Train the preset that ``argv`` begins with; return the exit status."""
    names = ", ".join(preset_names())
    usage = (
        "usage: vibe-store train PRESET [flags]\n\n"
        f"presets: {names}\n\n`vibe-store train PRESET --help` shows the flags."
    )
    if not argv:
        print(usage, file=sys.stderr)
        return 2
    name, *flags = argv
    if name in {"-h", "--help"}:
        print(usage)
        return 0
    if name not in preset_names():
        wrong = (
            "the preset comes before the flags" if name.startswith("-") else f"there is no preset {name!r}"
        )
        print(f"error: {wrong}; presets are: {names}.", file=sys.stderr)
        return 2
    plan = plan_training(get_preset(name), flags, prog=f"vibe-store train {name}")
    output = cast("IO[str]", LastingOutput(sys.stdout))
    console = Console(file=output, markup=False, highlight=False, emoji=False, soft_wrap=True)
    try:
        with _log_shown():
            result = _run(plan, console)
    except TrainingInterrupted as stop:
        # By now the run was restored with these settings, or they are those of a new one.
        plan.run.save_config(plan.stored)
        console.print(f"Go on with: {_resume_command(plan)}")
        if stop.overdue:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + stop.signum)
        return 128 + stop.signum
    plan.run.save_config(plan.stored)
    _say_result(console, plan, result)
    return 0


def _run(plan: TrainPlan, console: Console) -> TrainResult:
    env, env_params = plan.preset.make_env()
    with _written_by_us_alone(plan.directory), opened(plan.runner, None) as (checkpointer, resumed_from):
        _say_start(console, plan, resumed_from)
        if plan.runner.overwrite or not plan.existing:
            plan.run.save_config(plan.stored)
        with (
            _metrics(plan, resumed_from or 0) as metrics,
            ProgressDisplay(console, interval=plan.runner.log_interval) as display,
        ):
            return plan.preset.train(
                env,
                env_params,
                plan.config,
                plan.runner,
                checkpointer=checkpointer,
                metrics=metrics,
                on_progress=storing_settings(plan, display) if plan.existing else display,
                on_best=lambda step: _mark_best(plan.directory, step),
            )


class _Writers:
    """Gives each line of metrics to each of several writers."""

    def __init__(self, writers: Sequence[MetricsWriter]) -> None:
        self._writers = writers

    def write(self, metrics: Mapping[str, Any], /) -> None:
        for writer in self._writers:
            writer.write(metrics)


@contextmanager
def _metrics(plan: TrainPlan, resume_step: int) -> Iterator[MetricsWriter]:
    with ExitStack() as stack:
        writers: list[MetricsWriter] = [
            stack.enter_context(MetricsLogger(plan.run.log_path(), resume_step=resume_step))
        ]
        if plan.tensorboard:
            folder = plan.run.logs / "tensorboard"
            writers.append(stack.enter_context(TensorBoardLogger(folder, resume_step=resume_step)))
        yield _Writers(writers)


def _mark_best(directory: Place, step: int) -> None:
    try:
        write_best(open_directory(directory, None), step)
    except OSError as error:
        warnings.warn(
            f"`best` could not be made to point to step {step}: {error} Training goes on.",
            VibeStoreWarning,
            stacklevel=2,
        )


@contextmanager
def _written_by_us_alone(directory: Place) -> Iterator[None]:
    """Hold the writer's lock from the start: a second process must stop before it touches the run's logs."""
    lease = become_writer(open_directory(directory, None), "manager")
    try:
        yield
    finally:
        lease.release()


@contextmanager
def _log_shown() -> Iterator[None]:
    """Print the library's log, from warnings up, above the progress line."""
    log, handler = logging.getLogger("vibe_store"), _PrintingHandler(logging.WARNING)
    propagated, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagated


class _PrintingHandler(logging.Handler):
    """Prints to what is standard error at that moment: the progress line redirects it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(record.getMessage(), file=sys.stderr)
        except OSError:  # nobody reads it; training goes on all the same
            silence(sys.stderr)


def _say_start(console: Console, plan: TrainPlan, resumed_from: int | None) -> None:
    run, directory = without_credentials(str(plan.run.path)), without_credentials(str(plan.directory))
    console.print(f"Run: {run} (checkpoints in {directory})")
    if resumed_from is not None:
        console.print(f"Going on from step {resumed_from:,}.")
    elif plan.runner.resume:
        console.print(f"There is no checkpoint of {plan.preset.name} to go on from: starting at step 0.")
    else:
        console.print("Starting at step 0.")
    changes = [
        phrase
        for flag, phrase in plan.changes.items()
        if resumed_from is None
        or not (flag in _SAID_BY_RESTORE or flag.startswith(f"{plan.preset.algorithm}."))
    ]
    if changes:
        console.print(f"Changed since this run was started: {'; '.join(changes)}.")


def _say_result(console: Console, plan: TrainPlan, result: TrainResult) -> None:
    if result.resumed_from == result.step:
        console.print(f"Step {result.step:,} is the end of this run: there was nothing left to train.")
    else:
        steps = result.step - (result.resumed_from or 0)
        console.print(
            f"Done: {steps:,} steps in {result.train_seconds:.1f} s "
            f"({steps / result.train_seconds:,.0f} steps/s; compiled in {result.compile_seconds:.1f} s, "
            f"blocked by checkpoints for {1000 * result.blocked_seconds:.0f} ms)."
        )
    if result.eval_return is not None:
        episodes = plan.runner.eval_episodes
        console.print(f"Final evaluation: mean return {result.eval_return:.1f} over {episodes} episodes.")
    further = f"{_resume_command(plan)} --runner.total-timesteps {2 * plan.runner.total_timesteps}"
    directory = without_credentials(str(plan.directory))
    console.print(f"Checkpoints: {directory} (vibe-store ls {shlex.quote(directory)})")
    console.print(f"Load the last: load_checkpoint({directory!r}, like=..., step={result.step})")
    console.print(f"Train further: {further}")


def _resume_command(plan: TrainPlan) -> str:
    words = ["vibe-store", "train", plan.preset.name, "--runner.resume", "true", "--run-id", plan.run.run_id]
    base = plan.run.path.parent
    if base != Path("runs").absolute():
        words += ["--base-dir", without_credentials(str(base))]
    if any(isinstance(place, UrlPath) and place.storage_options for place in (base, plan.directory)):
        words += ["--storage-options", "..."]
    if plan.tensorboard:
        words += ["--tensorboard", "true"]
    return shlex.join(words)
