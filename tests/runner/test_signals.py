"""Ctrl-C and SIGTERM in the middle of a run."""

import logging
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import pytest

from vibe_store.errors import SaveTimeoutError
from vibe_store.runner import Progress, TrainingInterrupted, train_dqn
from vibe_store.runner.signals import SignalWatch


def at_step(step: int, signum: int) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.step >= step:
            os.kill(os.getpid(), signum)

    return on_progress


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_the_run_resumes_to_the_same_bits(
    signum: int,
    code: int,
    cartpole: tuple[Any, Any],
    small: SimpleNamespace,
    memory: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = signal.getsignal(signum)
    with caplog.at_level(logging.WARNING, "vibe_store"), pytest.raises(TrainingInterrupted) as caught:
        train_dqn(
            *cartpole,
            dqn_config=small.dqn,
            runner_config=small.runner,
            checkpointer=memory,
            on_progress=at_step(150, signum),
        )
    assert signal.getsignal(signum) is before
    assert caught.value.code == code
    assert caught.value.saved
    step = caught.value.step
    assert memory.latest_step() == step >= 150
    assert step not in (208, 304, 400, 480)
    assert f"at step {step} of 480, which is saved. Run it again with resume=True" in caplog.text
    assert str(caught.value) in caplog.text

    result = train_dqn(
        *cartpole,
        dqn_config=small.dqn,
        runner_config=small.replace(small.runner, resume=True),
        checkpointer=memory,
    )
    straight = train_dqn(*cartpole, dqn_config=small.dqn, runner_config=small.runner)
    assert result.resumed_from == step
    assert eqx.tree_equal((result.state, result.runner), (straight.state, straight.runner))


def test_a_last_save_that_takes_too_long_is_given_up_and_said(
    cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type
) -> None:
    released = threading.Event()

    class Slow(new_memory):
        def wait(self) -> None:
            released.wait(60)

    with pytest.raises(TrainingInterrupted, match=r"not saved: .* preemption_deadline_secs=0\.2") as caught:
        train_dqn(
            *cartpole,
            dqn_config=small.dqn,
            runner_config=small.replace(small.runner, preemption_deadline_secs=0.2),
            checkpointer=Slow(),
            on_progress=at_step(1, signal.SIGTERM),
        )
    released.set()
    assert caught.value.overdue
    assert not caught.value.saved


@pytest.mark.parametrize("blocking", ["save", "wait"])
def test_a_signal_while_the_checkpointer_blocks_is_answered_within_its_deadline(
    blocking: str, cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type
) -> None:
    released = threading.Event()

    class Blocking(new_memory):
        def save(self, *args: Any, **kwargs: Any) -> bool:
            return self.hold("save") or super().save(*args, **kwargs)

        def wait(self) -> None:
            self.hold("wait")

        def hold(self, name: str) -> bool:
            if name == blocking:
                os.kill(os.getpid(), signal.SIGTERM)
                released.wait(20)
            return False

    with pytest.raises(TrainingInterrupted, match=r"not saved: .* preemption_deadline_secs=0\.2") as caught:
        train_dqn(
            *cartpole,
            dqn_config=small.dqn,
            runner_config=small.replace(small.runner, preemption_deadline_secs=0.2),
            checkpointer=Blocking(),
        )
    assert not released.is_set()
    released.set()
    assert caught.value.overdue
    assert not caught.value.saved


def test_a_signal_during_the_last_wait_ends_a_complete_run_with_its_status(
    cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type
) -> None:
    class Signalled(new_memory):
        def wait(self) -> None:
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match=r"480 of 480, .* is saved: the run is complete") as caught:
        train_dqn(*cartpole, dqn_config=small.dqn, runner_config=small.runner, checkpointer=Signalled())
    assert caught.value.code == 143
    assert caught.value.saved


@pytest.mark.filterwarnings("default")
def test_a_step_that_is_passed_over_at_a_signal_is_not_said_to_be_saved(
    cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type
) -> None:
    class Busy(new_memory):
        def save(self, *_: Any, **__: Any) -> bool:
            raise SaveTimeoutError("The save before takes too long.")

    with pytest.raises(
        TrainingInterrupted, match=r"not saved: The save before takes too long\. Run"
    ) as caught:
        train_dqn(
            *cartpole,
            dqn_config=small.dqn,
            runner_config=small.runner,
            checkpointer=Busy(),
            on_progress=at_step(1, signal.SIGTERM),
        )
    assert not caught.value.saved


def test_without_a_directory_a_signal_says_that_nothing_is_saved(
    cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    with pytest.raises(TrainingInterrupted, match="Nothing is saved, since checkpoint_dir is None"):
        train_dqn(
            *cartpole,
            dqn_config=small.dqn,
            runner_config=small.runner,
            on_progress=at_step(1, signal.SIGINT),
        )


def test_no_broad_except_swallows_it() -> None:
    assert not issubclass(TrainingInterrupted, Exception)


def test_a_second_signal_meets_the_default_action() -> None:
    with SignalWatch() as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    seen: list[Any] = []

    def enter() -> None:
        with SignalWatch():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
