"""Opening the checkpoints of a run, and restoring one: what was saved must fit what is to be trained."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from vibe_store.errors import (
    CheckpointNotFoundError,
    CheckpointsExistError,
    CorruptCheckpointError,
    InvalidValueError,
    NewerFormatError,
    TemplateMismatchError,
)
from vibe_store.interfaces import Checkpointer
from vibe_store.run_dir import Place
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.loop import Carry, Program
from vibe_store.runner.signals import TrainingInterrupted
from vibe_store.runner.warning import warn_caller

__all__ = ["opened", "restore", "returns_so_far"]

_log = logging.getLogger("vibe_store")


@contextmanager
def opened(
    config: RunnerConfig, given: Checkpointer | None
) -> Iterator[tuple[Checkpointer | None, int | None]]:
    """Give the checkpointer of a run and the step to resume from, and close what was opened here.

    Args:
        config: says where the checkpoints are and whether to resume.
        given: a checkpointer to use instead; it stays open.

    Raises:
        CheckpointsExistError: there are checkpoints, and neither ``resume`` nor ``overwrite`` is set.
    """
    if given is not None:
        latest = given.latest_step()
        if latest is not None and not config.resume:
            raise CheckpointsExistError(
                f"The checkpointer that was given already holds step {latest}. Set resume=True to go on from "
                "there, or open it on an empty directory (or with overwrite=True) to start anew."
            )
        yield given, latest
    elif config.checkpoint_dir is None:
        if config.resume:
            warn_caller(
                "Nothing is being saved and there is nothing to resume from, because "
                "RunnerConfig.checkpoint_dir is None: set it to a directory."
            )
        yield None, None
    else:
        checkpointer, resuming = _open(config, config.checkpoint_dir)
        with _closing(checkpointer):
            yield checkpointer, checkpointer.latest_step() if resuming else None


def restore(checkpointer: Checkpointer, step: int, program: Program, key: jax.Array) -> Carry:
    """Restore one step; where it was saved without its replay buffer, warn, and begin an empty one.

    Raises:
        InvalidValueError: it is a checkpoint of another algorithm or environment; or its step is not one at
            which this run ever stops.
        TemplateMismatchError: its leaves are others than the program's: each is named, and so is each
            configuration field that has another value than when it was saved.
    """
    saved = checkpointer.metadata(step) or {}
    for name in ("algorithm", "env"):
        if name in saved and saved[name] != program.metadata[name]:
            raise InvalidValueError(
                f"The checkpoint of step {step} is of {name} {saved[name]!r}, so a run of {name} "
                f"{program.metadata[name]!r} cannot resume from it. Use another checkpoint_dir."
            )
    changes = _changes(saved, program.metadata)
    like = jax.eval_shape(program.init, key)
    replay = program.replay
    if saved.get("runner_config", {}).get("save_replay_buffer", True):
        replay = None
    runner = like.runner if replay is None else replay.remove(like.runner)
    try:
        state, items = checkpointer.restore(step, like.state, items={"runner": runner})
    except TemplateMismatchError as error:
        if not changes:
            raise
        raise TemplateMismatchError(
            f"{error}\nChanged since step {step} was saved: {'; '.join(changes)}. Set them back to resume.",
            differences=error.differences,
            paths=error.paths,
        ) from error
    if step % program.stride:
        n_envs, stride = program.metadata["run"]["num_envs"], program.stride
        raise InvalidValueError(
            f"Step {step:,} cannot be resumed from: with num_envs={n_envs}, and {stride // n_envs} steps of "
            f"each at a time (rollout_length of PPO), a run stops at multiples of {stride:,} only. Changed "
            f"since it was saved: {'; '.join(changes) or 'nothing'}. Set them back, or to values whose "
            f"product divides {step:,}."
        )
    if changes:
        _log.warning("Resuming from step %d with changed settings: %s.", step, "; ".join(changes))
    runner = items["runner"]
    if replay is not None:
        warn_caller(
            f"The checkpoint of step {step} holds no replay buffer (save_replay_buffer=False), so this "
            "resume is not exact: before it learns again, the run fills a new one with "
            f"learning_starts={program.metadata['algorithm_config']['learning_starts']} steps of its policy."
        )
        runner = replay.renew(runner)
    return Carry(state, runner)


def returns_so_far(checkpointer: Checkpointer) -> dict[int, float]:
    """Return the mean return of the best checkpoint that exists, by its step.

    A checkpointer that ranks none is asked for every one, which in a bucket takes requests for each.
    """
    best = checkpointer.best_step()
    returns = {}
    for step in checkpointer.all_steps() if best is None else [best]:
        try:
            metrics = checkpointer.info(step).metrics or {}
        except (CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError) as error:
            _log.warning("Step %d is not ranked: %s", step, error)
            continue
        if "eval_return" in metrics:
            returns[step] = metrics["eval_return"]
    return returns


def _open(config: RunnerConfig, directory: str | os.PathLike[str] | Place) -> tuple[Checkpointer, bool]:
    from vibe_store.checkpoint import initialize_checkpoint_dir

    manager, resuming = initialize_checkpoint_dir(
        directory,
        max_to_keep=config.max_checkpoints,
        keep_period=config.keep_period,
        save_interval_steps=1,
        async_timeout_secs=config.async_timeout_secs,
        best_fn=lambda metrics: metrics["eval_return"],
        best_mode="max",
        serializer=config.serializer,
        retention=config.retention,
        resume=config.resume,
        overwrite=config.overwrite,
    )
    manager.become_writer()  # so that a second process is refused now, not when it saves
    return manager, resuming


@contextmanager
def _closing(checkpointer: Checkpointer) -> Iterator[None]:
    """Close it at the end, except after a signal whose last save is overdue: closing would wait for that."""
    try:
        yield
    except TrainingInterrupted as stop:
        if stop.saved:
            checkpointer.close()
        raise
    except BaseException as error:
        checkpointer.__exit__(type(error), error, error.__traceback__)
        raise
    checkpointer.close()


def _changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Name each configuration field that matters to training and has another value than when saved."""
    changes = []
    for group in ("algorithm_config", "run"):
        before, now = saved.get(group, {}), present[group]
        changes += [
            f"{name}={now.get(name)!r} (was {before.get(name)!r})"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
    return changes
