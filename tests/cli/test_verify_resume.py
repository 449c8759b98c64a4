"""``vibe-store verify-resume``: a preset is trained, killed and resumed in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vibe_store.cli import verify_resume
from vibe_store.runner import ResumeReport

Run = Callable[..., Any]

SMALL = (
    *("--dqn.hidden-sizes", "4", "--dqn.buffer-size", "256", "--dqn.batch-size", "8"),
    *("--runner.eval-interval", "None", "--runner.num-envs", "4"),
)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary folders; compiled programs are shared by the processes."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return folder


@pytest.mark.proof
def test_a_preset_resumes_bit_for_bit_and_leaves_nothing_behind(vibe_store: Run, scratch: Path) -> None:
    ran = vibe_store("verify-resume", "cartpole_dqn", "--kill", "1", *SMALL)
    assert (ran.status, ran.err) == (0, "")
    first, straight, killed, last = ran.out.splitlines()
    assert first.startswith(
        "Training cartpole_dqn --runner.total-timesteps 20000 --runner.checkpoint-interval "
    )
    assert straight.startswith("Trained straight to step 20,000 in ")
    assert killed.startswith("Killed ")
    assert last.startswith("All ")
    assert last.endswith(" leaves of step 20,000 are equal bit for bit after 1 kill.")
    assert list(scratch.iterdir()) == []


@pytest.mark.proof
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_trainer_too_and_leaves_nothing_behind(signum: int, scratch: Path) -> None:
    command = [sys.executable, "-m", "vibe_store.cli", "verify-resume", "cartpole_dqn", *SMALL]
    before = signal.signal(signum, signal.SIG_DFL)  # what nohup, say, has ignored stays so in every child
    process = subprocess.Popen(
        [*command, "--runner.total-timesteps", "100000000"], env={**os.environ, "TMPDIR": str(scratch)}
    )
    signal.signal(signum, before)
    trainer = None
    with process:
        try:
            deadline = time.monotonic() + 60
            while not (logs := list(scratch.glob("*/straight/logs/metrics.jsonl"))):
                assert process.poll() is None
                assert time.monotonic() < deadline, "it did not train within 60 s"
                time.sleep(0.02)
            lock = logs[0].parents[1] / "checkpoints" / ".vibe_store" / "writer.lock"
            trainer = json.loads(lock.read_text())["pid"]
            process.send_signal(signum)
            assert process.wait(timeout=20) == 128 + signum
            with pytest.raises(ProcessLookupError):
                os.kill(trainer, 0)
        finally:
            process.kill()
            if trainer is not None:
                with suppress(ProcessLookupError):
                    os.kill(trainer, signal.SIGKILL)
    assert list(scratch.iterdir()) == []


def test_a_flag_that_the_preset_does_not_have_is_a_mistake(vibe_store: Run, scratch: Path) -> None:
    ran = vibe_store("verify-resume", "cartpole_dqn", "--dqn.bread", "1")
    assert (ran.status, ran.out) == (2, "")
    assert "--dqn.bread" in ran.err
    assert list(scratch.iterdir()) == []


def test_leaves_that_differ_are_listed_and_the_runs_kept(
    vibe_store: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = tuple(f"runner['x'][{index}]: 1 of 3 numbers differ" for index in range(25))
    report = ResumeReport(step=2_000, kills=(1_000,), leaves=30, differences=differences)
    monkeypatch.setattr(verify_resume, "check", lambda *_args, **_others: report)
    ran = vibe_store("verify-resume", "cartpole_dqn")
    (kept,) = scratch.iterdir()
    assert ran.status == 1
    lines = ran.out.splitlines()[1:]
    assert lines[:20] == list(differences[:20])
    assert lines[20:] == ["... and 5 more", f"25 of 30 leaves of step 2,000 differ: see {kept}"]


def test_flags_of_the_user_come_before_the_short_settings(
    vibe_store: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def record(command: Callable[[str], list[str]], directory: str, **_: Any) -> ResumeReport:
        assert Path(directory).parent == scratch
        commands.append(command(f"{directory}/straight"))
        return ResumeReport(step=1, kills=(1,), leaves=1, differences=())

    monkeypatch.setattr(verify_resume, "check", record)
    flags = ("--runner.total_timesteps=500", "--kill=2", "--runner.checkpoint-interval", "100")
    assert vibe_store("verify-resume", "cartpole_ppo", *flags).status == 0
    assert vibe_store("verify-resume", "cartpole_ppo", "--runner.total-timesteps", "2000").status == 0
    command, shorter = commands
    start = command.index("cartpole_ppo") + 1
    assert command[start : start + 5] == [
        *("--runner.total_timesteps=500", "--runner.checkpoint-interval", "100"),
        *("--runner.resume", "true"),
    ]
    assert command[-2:] == ["--run-id", "straight"]
    # It saves ten times, however short it is.
    assert shorter[start : start + 2] == ["--runner.checkpoint-interval", "200"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("cartpole",), "there is no preset 'cartpole'; presets are: "),
        (("cartpole_dqn", "--kill", "0"), "--kill is 1 or more; got 0."),
        (("cartpole_dqn", "--run-id", "x"), "verify-resume chooses --run-id itself; leave it out."),
        (
            ("cartpole_dqn", "--runner.checkpoint_dir=x"),
            "verify-resume chooses --runner.checkpoint-dir itself; leave it out.",
        ),
    ],
)
def test_a_mistake_in_the_arguments_is_a_sentence(
    arguments: tuple[str, ...], sentence: str, vibe_store: Run
) -> None:
    ran = vibe_store("verify-resume", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {sentence}")


def test_help_names_the_presets(vibe_store: Run) -> None:
    ran = vibe_store("verify-resume", "--help")
    assert ran.status == 0
    assert "cartpole_dqn" in ran.out
    assert vibe_store("verify-resume").status == 2
