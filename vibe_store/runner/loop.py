"""The training loop that the runners share: one compiled program, called in chunks, with saves in between."""

import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vibe_store.errors import InvalidValueError, SaveFailedError, SaveTimeoutError, VibeStoreWarning
from vibe_store.interfaces import Checkpointer, PyTree
from vibe_store.run_dir import Place
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.evaluate import Evaluation
from vibe_store.runner.points import due, first_multiple, next_point
from vibe_store.runner.signals import SignalWatch, TrainingInterrupted

__all__ = [
    "Callbacks",
    "Carry",
    "MetricsWriter",
    "Program",
    "Progress",
    "ReplayParts",
    "TrainResult",
    "Trainer",
]

_log = logging.getLogger("vibe_store")

_CHUNK_SECS = 0.5
_FIRST_CHUNK = 32
_POLL_SECS = 0.1


class Carry(NamedTuple):
    """The whole state of a run, every leaf a strongly typed array.

    Attributes:
        state: what the algorithm's ``init`` returned; ``state.step`` is the absolute environment step.
        runner: the rest.
    """

    state: PyTree
    runner: PyTree


@dataclass(frozen=True, kw_only=True)
class ReplayParts:
    """How a checkpoint leaves out what a run remembers only to learn from.

    Attributes:
        remove: the item ``runner`` without it.
        renew: the item ``runner`` with nothing remembered yet, from one without it.
    """

    remove: Callable[[PyTree], PyTree]
    renew: Callable[[PyTree], PyTree]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the loop needs of an algorithm on an environment; the functions are traced, so they must be pure.

    Attributes:
        stride: how many environment steps ``step`` takes, over all environments.
        init: a carry from a PRNG key.
        step: the carry after ``stride`` more environment steps.
        report: scalars by name to log, from a carry. Their names are what ``metrics`` will hold.
        evaluate: greedy episodes of a state, drawn from the run's PRNG key and the step.
        metadata: what is stored with each checkpoint: ``algorithm``, ``env`` and the configurations, as JSON.
        replay: how to leave out its replay buffer; None of an algorithm that has none.
    """

    stride: int
    init: Callable[[Array], Carry]
    step: Callable[[Carry], Carry]
    report: Callable[[Carry], dict[str, Array]]
    evaluate: Callable[[PyTree, Array, Array], Evaluation]
    metadata: Mapping[str, Any]
    replay: ReplayParts | None = None


class MetricsWriter(Protocol):
    """Where lines of metrics go; a :class:`~vibe_store.metrics.MetricsLogger`, say."""

    def write(self, metrics: Mapping[str, Any], /) -> None:
        """Append one line."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, after each chunk.

    Attributes:
        step: the absolute step.
        total: the step at which the run ends.
        steps_per_second: speed of the last chunk.
        recent_return: mean return of the last 100 or so finished episodes; None before the first.
        eval_return: the last evaluation's mean return; None before the first.
        checkpoint_step: the step that this run saved last, which may still be on its way; None before.
        committed_step: the step of this run that was committed last; None before.
        committed_bytes: the size of that checkpoint; None before.
        blocked_seconds: how long training stood still for the last save.
    """

    step: int
    total: int
    steps_per_second: float
    recent_return: float | None
    eval_return: float | None
    checkpoint_step: int | None
    committed_step: int | None
    committed_bytes: int | None
    blocked_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a finished run leaves behind.

    Attributes:
        state: the algorithm's final state.
        runner: the rest of the run's final state.
        step: the absolute step it ended at.
        resumed_from: the step it was restored at; None for a run that started anew.
        history: the lines of metrics of this call, oldest first, each with its ``"step"``.
        eval_return: the last evaluation's mean return; None where there was none.
        checkpoint_dir: where the checkpoints are, as configured.
        saved_steps: the steps that this call saved; not those whose save failed.
        compile_seconds: how long compilation took.
        train_seconds: how long the rest took, evaluations and saves included.
        blocked_seconds: how long training stood still for all saves together, the wait at the end apart.
    """

    state: PyTree
    runner: PyTree
    step: int
    resumed_from: int | None
    history: tuple[Mapping[str, Any], ...]
    eval_return: float | None
    checkpoint_dir: str | os.PathLike[str] | Place | None
    saved_steps: tuple[int, ...]
    compile_seconds: float
    train_seconds: float
    blocked_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Who is told what during a run.

    Attributes:
        metrics: gets a line of metrics at each log point and each evaluation.
        on_progress: is called after each chunk.
        on_best: is called with the step of each checkpoint that was saved with the best evaluation so far;
            and with the one before it, should such a save fail in the background.
    """

    metrics: MetricsWriter | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_best: Callable[[int], None] | None = None


class Trainer:
    """One run from a carry to its end.

    Args:
        program: the algorithm.
        config: the settings.
        carry: where to begin, at a multiple of ``program.stride``; its arrays are donated.
        key: the run's PRNG key.
        checkpointer: where to save; None saves nothing.
        resumed_from: the step that the carry was restored at.
        returns: the mean returns of the evaluations of the checkpoints that exist, by step.
        callbacks: who is told.
        signals: tells whether to stop.

    Raises:
        InvalidValueError: the run would outgrow what its counters can hold.
    """

    def __init__(
        self,
        program: Program,
        config: RunnerConfig,
        carry: Carry,
        key: Array,
        *,
        checkpointer: Checkpointer | None,
        resumed_from: int | None,
        returns: Mapping[int, float],
        callbacks: Callbacks,
        signals: SignalWatch,
    ) -> None:
        self._program = program
        self._config = config
        self._carry = carry
        self._key = key
        self._checkpointer = checkpointer
        self._resumed_from = resumed_from
        self._returns = dict(returns)
        self._callbacks = callbacks
        self._signals = signals
        self._step = resumed_from or 0
        self._end = first_multiple(config.total_timesteps, program.stride)
        if self._end + program.stride >= 2**31:
            raise InvalidValueError(
                f"total_timesteps={config.total_timesteps} cannot be used with {program.stride:,} steps at a "
                f"time: steps are counted in 32 bits, up to {2**31 - 1:,}."
            )
        if any(self._reaches_target(each) for each in returns.values()):
            self._end = min(self._end, self._step)
        self._saved_step = resumed_from
        self._saved_steps: list[int] = []
        self._history: list[Mapping[str, Any]] = []
        self._eval_return: float | None = None
        self._chunk = _FIRST_CHUNK
        self._speed = 0.0
        self._blocked = self._last_blocked = 0.0

    def run(self) -> TrainResult:
        """Train to the end.

        Raises:
            TrainingInterrupted: a signal came; what had been trained is saved, where there is a checkpointer
                and the deadline allowed it.
        """
        started = time.perf_counter()
        compile_seconds = 0.0
        if self._step < self._end:
            advance = self._compile()
            evaluate = jax.jit(self._program.evaluate)
            compile_seconds = time.perf_counter() - started
        while self._step < self._end and self._signals.received is None:
            report = self._advance(advance)
            evaluation = self._evaluate(evaluate)
            if evaluation is not None and self._reaches_target(evaluation["eval_return"]):
                self._end = self._step
            self._write_metrics(report, evaluation)
            if self._step == self._end or due(
                self._step, self._config.checkpoint_interval, self._program.stride
            ):
                self._save(evaluation, last=self._step == self._end)
            self._tell(report)
        if self._checkpointer is not None and self._signals.received is None:
            self._wait(self._checkpointer)
        if self._signals.received is not None:
            self._stop(self._signals.received)
        return TrainResult(
            state=self._carry.state,
            runner=self._carry.runner,
            step=self._step,
            resumed_from=self._resumed_from,
            history=tuple(self._history),
            eval_return=self._eval_return,
            checkpoint_dir=self._config.checkpoint_dir,
            saved_steps=tuple(self._saved_steps),
            compile_seconds=compile_seconds,
            train_seconds=time.perf_counter() - started - compile_seconds,
            blocked_seconds=self._blocked,
        )

    def _reaches_target(self, eval_return: float) -> bool:
        target = self._config.target_return
        return target is not None and eval_return >= target

    def _compile(self) -> Callable[[Carry, Array], tuple[Carry, dict[str, Array]]]:
        """Compile the one program that every chunk runs, whatever its length; it cannot compile again."""

        def advance(carry: Carry, n_steps: Array) -> tuple[Carry, dict[str, Array]]:
            carry = jax.lax.fori_loop(0, n_steps, lambda _, carry: self._program.step(carry), carry)
            return carry, self._program.report(carry)

        n_steps = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.jit(advance, donate_argnums=0).lower(self._carry, n_steps).compile()

    def _next_stop(self) -> int:
        intervals = [self._config.checkpoint_interval, self._config.log_interval]
        if self._config.eval_interval is not None:
            intervals.append(self._config.eval_interval)
        points = [next_point(self._step, interval, self._program.stride) for interval in intervals]
        return min(self._end, *points)

    def _advance(self, advance: Callable[..., tuple[Carry, dict[str, Array]]]) -> Mapping[str, Any]:
        """Run one chunk, and size the next by how long it took."""
        n_steps = min(self._chunk, (self._next_stop() - self._step) // self._program.stride)
        started = time.perf_counter()
        self._carry, scalars = advance(self._carry, np.int32(n_steps))
        report = _summary(jax.device_get(scalars))
        seconds = time.perf_counter() - started
        self._step += n_steps * self._program.stride
        self._speed = n_steps * self._program.stride / seconds
        # At most twice the last one: the steps before learning starts say little of those after.
        self._chunk = max(1, min(int(n_steps * _CHUNK_SECS / seconds), 2 * self._chunk))
        return report

    def _evaluate(self, evaluate: Callable[..., Evaluation]) -> Mapping[str, Any] | None:
        interval = self._config.eval_interval
        if interval is None or not (
            self._step == self._end or due(self._step, interval, self._program.stride)
        ):
            return None
        returns, lengths = jax.device_get(evaluate(self._carry.state, self._key, np.int32(self._step)))
        self._eval_return = float(np.mean(returns))
        line: dict[str, Any] = {
            "eval_return": self._eval_return,
            "eval_return_std": float(np.std(returns)),
            "eval_length": float(np.mean(lengths)),
        }
        if returns.ndim > 1:
            line["eval_return_by_seed"] = np.mean(returns, axis=-1).tolist()
        return line

    def _write_metrics(self, report: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> None:
        line: dict[str, Any] = {"step": self._step}
        if self._step == self._end or due(self._step, self._config.log_interval, self._program.stride):
            line |= {**report, "steps_per_second": self._speed}
        line |= evaluation or {}
        if len(line) > 1:
            self._history.append(line)
            if self._callbacks.metrics is not None:
                try:
                    self._callbacks.metrics.write(line)
                except OSError as error:
                    warnings.warn(f"{error} Training goes on.", VibeStoreWarning, stacklevel=2)

    def _save(self, evaluation: Mapping[str, Any] | None, *, last: bool) -> None:
        """Save this step, if it is not saved yet; the interval is decided here, not by the checkpointer."""
        if self._checkpointer is None or self._saved_step == self._step:
            return
        metrics = None if evaluation is None else {"eval_return": evaluation["eval_return"]}
        started = time.perf_counter()
        self._try_to_save(self._checkpointer, metrics, last=last)
        self._last_blocked = time.perf_counter() - started
        self._blocked += self._last_blocked
        if evaluation is not None and self._saved_step == self._step:
            before = self._best_step()
            self._returns[self._step] = evaluation["eval_return"]
            self._tell_best(before)

    def _try_to_save(
        self, checkpointer: Checkpointer, metrics: Mapping[str, float] | None, *, last: bool
    ) -> None:
        """Save this step; where a save fails, say so and let training go on, unless this was the last one."""
        try:
            self._save_now(checkpointer, metrics)
        except (SaveFailedError, SaveTimeoutError) as error:
            if isinstance(error, SaveFailedError) and error.step != self._step:
                self._take_back(checkpointer, error.step)
                warnings.warn(f"{error} Training goes on.", VibeStoreWarning, stacklevel=3)
                self._try_to_save(checkpointer, metrics, last=last)
            elif last:
                raise
            else:
                skipped = f"Step {self._step:,} is not saved, and training goes on."
                warnings.warn(f"{error} {skipped}", VibeStoreWarning, stacklevel=3)

    def _save_now(self, checkpointer: Checkpointer, metrics: Mapping[str, float] | None) -> None:
        runner = self._carry.runner
        if self._program.replay is not None and not self._config.save_replay_buffer:
            runner = self._program.replay.remove(runner)

        def save() -> None:
            checkpointer.save(
                self._step,
                self._carry.state,
                items={"runner": runner},
                metrics=metrics,
                metadata=self._program.metadata,
                force=True,
            )

        committed = checkpointer.last_committed
        if committed is not None and self._saved_steps and committed.step == self._saved_steps[-1]:
            save()  # which waits for no save before it, and so needs no thread that could be left behind
        else:
            self._within_deadline(save)
        self._saved_step = self._step
        self._saved_steps.append(self._step)

    def _wait(self, checkpointer: Checkpointer) -> None:
        try:
            self._within_deadline(checkpointer.wait)
        except SaveFailedError as error:
            self._take_back(checkpointer, error.step)
            raise

    def _within_deadline(self, work: Callable[[], object]) -> None:
        """Do what may block, in a thread that is left behind once a signal's deadline has passed."""
        outcome: Future[object] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
                outcome.set_exception(error)

        threading.Thread(target=run, name="vibe-store-save", daemon=True).start()
        deadline = self._config.preemption_deadline_secs
        while wait([outcome], _POLL_SECS).not_done:
            signum = self._signals.received
            if signum is not None and self._signals.seconds_since() >= deadline:
                reason = f"that took longer than preemption_deadline_secs={deadline:g}."
                raise self._interrupted(signum, _not_saved(reason), saved=False, overdue=True)
        outcome.result()

    def _take_back(self, checkpointer: Checkpointer, step: int) -> None:
        """Count a step as not saved, as its save failed after all."""
        committed = checkpointer.last_committed
        if step not in self._saved_steps or (committed is not None and committed.step == step):
            return  # what failed is what came after it, deleting others say
        before = self._best_step()
        self._saved_steps.remove(step)
        self._returns.pop(step, None)
        if self._saved_step == step:
            self._saved_step = self._saved_steps[-1] if self._saved_steps else self._resumed_from
        self._tell_best(before)

    def _best_step(self) -> int | None:
        known = {step: value for step, value in self._returns.items() if not np.isnan(value)}
        return max(known, key=lambda step: known[step], default=None)

    def _tell_best(self, before: int | None) -> None:
        """Tell which saved step is the best, if that is another one than before."""
        best = self._best_step()
        if best is not None and best != before and self._callbacks.on_best is not None:
            self._callbacks.on_best(best)

    def _tell(self, report: Mapping[str, Any]) -> None:
        if self._callbacks.on_progress is None:
            return
        committed = None if self._checkpointer is None else self._checkpointer.last_committed
        if committed is not None and committed.step not in self._saved_steps:
            committed = None  # by whoever had this checkpointer before
        self._callbacks.on_progress(
            Progress(
                step=self._step,
                total=self._end,
                steps_per_second=self._speed,
                recent_return=report["return"] if report["episodes"] else None,
                eval_return=self._eval_return,
                checkpoint_step=self._saved_steps[-1] if self._saved_steps else None,
                committed_step=None if committed is None else committed.step,
                committed_bytes=None if committed is None else committed.size,
                blocked_seconds=self._last_blocked,
            )
        )

    def _stop(self, signum: int) -> None:
        """Save what there is, within the deadline, and end the run."""
        if self._checkpointer is None:
            raise self._interrupted(signum, ". Nothing is saved, since checkpoint_dir is None.", saved=False)
        if self._step == 0:
            raise self._interrupted(signum, ". There was nothing to save yet.", saved=False)
        try:
            self._save(None, last=True)
            self._wait(self._checkpointer)
        except Exception as error:
            raise self._interrupted(signum, _not_saved(str(error)), saved=False) from error
        rest = (
            ", its end, which is saved: the run is complete."
            if self._step == self._end
            else ", which is saved. Run it again with resume=True to go on from there."
        )
        raise self._interrupted(signum, rest, saved=True)

    def _interrupted(
        self, signum: int, rest: str, *, saved: bool, overdue: bool = False
    ) -> TrainingInterrupted:
        name = "Ctrl-C" if signum == 2 else "SIGTERM"
        message = f"{name} stopped training at step {self._step:,} of {self._end:,}{rest}"
        _log.warning("%s", message)
        return TrainingInterrupted(message, signum=signum, step=self._step, saved=saved, overdue=overdue)


def _not_saved(reason: str) -> str:
    return (
        f", which is not saved: {reason} Run it again with resume=True to go on from the newest checkpoint."
    )


def _summary(scalars: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return numbers by name: of many seeds the means of those that are known, and each one's return."""
    if scalars["return"].ndim == 0:
        return {name: value.item() for name, value in scalars.items()}
    line: dict[str, Any] = {}
    for name, values in scalars.items():
        known = values[np.isfinite(values)]
        line[name] = float(np.mean(known)) if known.size else float("nan")
    line["return_by_seed"] = scalars["return"].tolist()
    return line
