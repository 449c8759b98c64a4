"""``vibe-store train``: short runs in this process, from the first to the resumed."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from vibe_store import RunDir, open_storage
from vibe_store.checkpoint import list_checkpoints
from vibe_store.metrics import read_metrics
from vibe_store.run_dir import find_runs
from vibe_store.storage.memory import MemoryStorage

pytestmark = pytest.mark.usefixtures("compiled_once")

Run = Callable[..., Any]

TINY = (
    *("--dqn.hidden-sizes", "4", "--dqn.buffer-size", "64", "--dqn.batch-size", "8"),
    *("--dqn.learning-starts", "16", "--runner.num-envs", "4", "--runner.eval-interval", "None"),
    *("--runner.checkpoint-interval", "32", "--runner.log-interval", "16", "--runner.total-timesteps", "64"),
)


@pytest.fixture
def train(vibe_store: Run, tmp_path: Path) -> Run:
    def run(*flags: str) -> Any:
        return vibe_store("train", "cartpole_dqn", "--base-dir", tmp_path / "runs", *flags)

    return run


def logged_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def saved_steps(directory: Path) -> list[int]:
    return [entry.step for entry in list_checkpoints(directory)]


EARLIER_LINE = '{"step": 5}\n'


def began_earlier(run: Path) -> Path:
    """A run that logged one line, and has no checkpoint yet."""
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "metrics.jsonl").write_text(EARLIER_LINE)
    (run / "config.json").write_text('{"preset": "cartpole_dqn"}')
    return run


def test_no_preset_is_a_mistake(vibe_store: Run) -> None:
    ran = vibe_store("train")
    assert (ran.status, ran.out) == (2, "")
    assert "presets: " in ran.err


def test_help_without_a_preset_names_the_presets(vibe_store: Run) -> None:
    ran = vibe_store("train", "--help")
    assert ran.status == 0
    assert "cartpole_dqn" in ran.out


def test_an_unknown_preset_is_answered_with_those_that_exist(vibe_store: Run) -> None:
    ran = vibe_store("train", "cartpole")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith("error: there is no preset 'cartpole'; presets are: ")
    assert "cartpole_dqn" in ran.err


def test_flags_before_the_preset_are_told_from_a_wrong_preset(vibe_store: Run) -> None:
    ran = vibe_store("train", "--runner.resume", "true", "cartpole_dqn")
    assert ran.status == 2
    assert ran.err.startswith("error: the preset comes before the flags; presets are: ")


def test_a_run_is_trained_resumed_and_extended(train: Run, tmp_path: Path) -> None:
    ran = train(*TINY, "--run-id", "mine")
    run = tmp_path / "runs" / "mine"
    assert ran.status == 0
    assert f"Run: {run} (checkpoints in {run}/checkpoints)\nStarting at step 0.\n" in ran.out
    assert "step 64 of 64 (100 %)" in ran.out
    assert "Done: 64 steps in " in ran.out
    assert saved_steps(run / "checkpoints") == [32, 64]
    assert logged_steps(run) == [16, 32, 48, 64]
    assert json.loads((run / "config.json").read_text())["dqn"]["hidden_sizes"] == [4]

    # As if it had been killed after its first checkpoint, in the middle of a line.
    for file in (run / "checkpoints" / "step_64").iterdir():
        file.unlink()
    with (run / "logs" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 80, "lo')
    ran = train("--runner.resume", "true", "--runner.total-timesteps", "96")
    assert ran.status == 0
    assert "Going on from step 32.\n" in ran.out
    assert "saved at 32" not in ran.out, "this run has saved nothing yet"
    assert "Changed since this run was started: runner.total_timesteps is 96 (was 64).\n" in ran.out
    assert "Done: 64 steps in " in ran.out
    assert saved_steps(run / "checkpoints") == [32, 64, 96]
    assert logged_steps(run) == [16, 32, 48, 64, 80, 96]
    assert json.loads((run / "config.json").read_text())["runner"]["total_timesteps"] == 96

    ran = train("--runner.resume", "true")
    assert ran.status == 0
    assert "Step 96 is the end of this run: there was nothing left to train.\n" in ran.out

    before = (run / "config.json").read_bytes()
    ran = train("--runner.resume", "true", "--dqn.hidden-sizes", "5")
    assert ran.status == 1
    assert ran.err.startswith("error: ")
    assert "hidden_sizes=[5] (was [4])" in ran.err
    assert "hidden_sizes" not in ran.out
    assert (run / "config.json").read_bytes() == before, (
        "settings that do not fit would spoil the next resume"
    )


def test_a_run_is_not_begun_anew_in_a_place_where_its_checkpoints_are_not(train: Run, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    assert train(*TINY, "--run-id", "mine").status == 0
    before = {path: path.read_bytes() for path in (run / "config.json", run / "logs" / "metrics.jsonl")}
    typo = ("--run-id", "mine", "--runner.checkpoint-dir", str(tmp_path / "typo"))
    ran = train("--runner.resume", "true", *typo)
    assert (ran.status, ran.out) == (1, "")
    assert f"cannot go on in {tmp_path}/typo, where there is no checkpoint" in ran.err
    assert f"it has step 64 in {run}/checkpoints." in ran.err
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "typo").exists()


@pytest.fixture(params=["memory", "s3", pytest.param("gcs", marks=pytest.mark.proof)])
def runs_url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of no run yet, which opens with what is in the environment."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/runs"
    bucket = request.getfixturevalue(request.param)
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.server)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.storage_options["key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.storage_options["secret"])
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.server)
    return f"{bucket.url}/{uuid.uuid4().hex}/runs"


def test_a_whole_run_in_a_bucket_is_trained_resumed_and_looked_at(
    vibe_store: Run, runs_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate = ("--runner.eval-interval", "32", "--runner.eval-episodes", "1")
    ran = vibe_store("train", "cartpole_dqn", *TINY, *evaluate, "--base-dir", runs_url)
    assert (ran.status, ran.err) == (0, "")
    (run,) = find_runs(runs_url)
    assert f"Run: {run.path} (checkpoints in {run.checkpoints})\nStarting at step 0.\n" in ran.out
    assert f"Checkpoints: {run.checkpoints} (vibe-store ls {run.checkpoints})\n" in ran.out
    assert [step for step, _ in run.list_checkpoints()] == [32, 64]
    assert [line["step"] for line in read_metrics(run.log_path())] == [16, 32, 48, 64]

    # As if it had been killed after its first checkpoint; a run of another preset began after it.
    storage = open_storage(str(run.checkpoints))
    storage.delete(["step_64/manifest.json"])
    RunDir(base_dir=runs_url, run_id="other").save_config({"preset": "other", "created": "9999"})
    ran = vibe_store("train", "cartpole_dqn", "--base-dir", runs_url, "--runner.resume", "true")
    assert (ran.status, ran.err) == (0, "")
    assert f"Run: {run.path} (" in ran.out
    assert "Going on from step 32.\n" in ran.out
    assert [line["step"] for line in read_metrics(run.log_path())] == [16, 32, 48, 64]

    (further,) = [line for line in ran.out.splitlines() if line.startswith("Train further: vibe-store ")]
    ran = vibe_store(*shlex.split(further)[3:])
    assert (ran.status, ran.err) == (0, "")
    assert "Going on from step 64.\n" in ran.out
    assert [step for step, _ in run.list_checkpoints()] == [32, 64, 96, 128]
    assert [line["step"] for line in read_metrics(run.log_path())][-1] == 128
    assert run.best_checkpoint is not None

    for place in (run.path, run.checkpoints, f"{run.path}/"):
        listed = json.loads(vibe_store("ls", str(place), "--json").out)
        assert listed["directory"] == str(run.checkpoints)
        assert [entry["step"] for entry in listed["checkpoints"]] == [32, 64, 96, 128]
    assert vibe_store("verify", str(run.path)).status == 0
    assert json.loads(vibe_store("show", str(run.path), "64", "--json").out)["step"] == 64
    best = json.loads(vibe_store("show", str(run.checkpoints / "best"), "--json").out)
    assert f"step_{best['step']}" == run.best_checkpoint.name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["--base-dir", "--runner.checkpoint-dir"])
def test_a_url_that_lost_a_slash_is_a_mistake(
    train: Run, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = train(*TINY, place, "s3:/bucket/runs")
    assert ran.status == 1
    assert "lost a slash" in ran.err
    assert not (tmp_path / "s3:").exists()


def test_a_run_saves_and_is_resumed_by_the_serializer_and_the_policy_that_are_named(
    train: Run, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "runs" / "mine" / "checkpoints"
    names = ("--runner.serializer", "orbax:compress=true", "--runner.retention", "every_steps:interval=64")
    assert train(*TINY, *names, "--run-id", "mine").status == 0
    assert {entry.info.serializer for entry in list_checkpoints(checkpoints)} == {"orbax"}
    assert saved_steps(checkpoints) == [64]
    ran = train("--runner.resume", "true", "--runner.total-timesteps", "128")
    assert ran.status == 0
    assert "Going on from step 64.\n" in ran.out
    assert saved_steps(checkpoints) == [64, 128]
    ran = train("--runner.resume", "true", "--runner.serializer", "eqx", "--runner.total-timesteps", "160")
    assert "Going on from step 128.\n" in ran.out
    assert [entry.info.serializer for entry in list_checkpoints(checkpoints)] == ["orbax", "orbax", "eqx"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--runner.serializer", "npz"), "There is no serializer 'npz'"),
        (("--runner.retention", "latest:keep=1"), "'latest' takes max_to_keep; 'keep' is none of them"),
        (
            ("--tensorboard", "true", "--base-dir", "memory://x"),
            "to local folders only, and memory://x is a URL",
        ),
        (("--dqn.network", "cnn"), "network='cnn'"),
        (("--runner.num-envs", "256", "--dqn.buffer-size", "128"), "128 transitions cannot take 256 at"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_there(
    train: Run, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    ran = train(*TINY, *flags)
    assert (ran.status, ran.out) == (1, "")
    assert said in ran.err
    assert not list(tmp_path.iterdir())


def test_minibatches_that_do_not_divide_a_rollout_are_told_before_anything_is_there(
    vibe_store: Run, tmp_path: Path
) -> None:
    ran = vibe_store("train", "cartpole_ppo", "--ppo.n-minibatches", "3", "--base-dir", tmp_path)
    assert (ran.status, ran.out) == (1, "")
    assert "n_minibatches=3 cannot be used" in ran.err
    assert not list(tmp_path.iterdir())


def test_tensorboard_without_its_package_is_told_before_anything_is_there(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    ran = train(*TINY, "--tensorboard", "true")
    assert (ran.status, ran.out) == (1, "")
    assert 'pip install "vibe-store[tensorboard]"' in ran.err
    assert not list(tmp_path.iterdir())


def test_storage_options_open_the_places_that_are_urls_and_are_stored_nowhere(
    train: Run, vibe_store: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    class Guarded(MemoryStorage):
        def __init__(self, url: str, *, token: str) -> None:
            opened.append({"token": token})
            super().__init__(url.replace("guarded", "memory"))

    monkeypatch.setattr("vibe_store.storage.memory.MemoryStorage", Guarded)
    place = f"memory://{uuid.uuid4().hex}"
    options = ("--storage-options", '{"token": "geheim"}')
    ran = train(*TINY, "--runner.checkpoint-dir", place, "--run-id", "mine", *options)
    assert (ran.status, ran.err) == (0, "")
    assert {"token": "geheim"} in opened
    again = next(line for line in ran.out.splitlines() if line.startswith("Train further: "))
    assert "--storage-options ... " in again
    ran = train("--runner.resume", "true", "--runner.total-timesteps", "96", *options)
    assert "Going on from step 64.\n" in ran.out
    assert "geheim" not in ran.out + ran.err
    assert "geheim" not in "".join(file.read_text() for file in tmp_path.glob("runs/mine/**/*.json*"))
    ran = train("--runner.resume", "true")
    assert ran.status == 1
    assert "token" in ran.err

    listed = vibe_store("ls", tmp_path / "runs" / "mine")
    assert listed.status == 1
    assert f"keeps its checkpoints in {place}: give that place." in listed.err


def test_a_resumed_run_names_each_changed_setting_once(train: Run, tmp_path: Path) -> None:
    changes = ("--dqn.gamma", "0.5", "--runner.seed", "7", "--runner.max-checkpoints", "3")
    resume = ("--runner.resume", "true", "--run-id", "mine")
    began_earlier(tmp_path / "runs" / "mine")
    ran = train(*TINY, *resume, "--runner.total-timesteps", "32")
    assert "dqn.batch_size is 8" in ran.out, "with no checkpoint there is nothing else that would say so"
    ran = train(*resume, *changes)
    assert (ran.status, ran.err) == (
        0,
        "Resuming from step 32 with changed settings: gamma=0.5 (was 0.99); seed=7 (was 0).\n",
    )
    assert "Changed since this run was started: runner.max_checkpoints is 3 (was 5).\n" in ran.out


def test_an_evaluation_marks_the_best_checkpoint_where_the_checkpoints_are(
    train: Run, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    evaluate = (
        "--runner.eval-interval",
        "32",
        "--runner.eval-episodes",
        "1",
        "--runner.total-timesteps",
        "32",
    )
    ran = train(*TINY, *evaluate, "--runner.checkpoint-dir", str(elsewhere))
    assert ran.status == 0
    assert "Final evaluation: mean return " in ran.out
    (run,) = (tmp_path / "runs").iterdir()
    assert [(entry.step, entry.best) for entry in list_checkpoints(elsewhere)] == [(32, True)]
    assert logged_steps(run) == [16, 32]
    # The same place again, without resuming: refused, and nothing is lost.
    ran = train(*TINY, "--runner.checkpoint-dir", str(elsewhere))
    assert ran.status == 1
    assert "already holds the steps [32]" in ran.err


def test_a_signal_ends_the_run_with_how_to_go_on(train: Run, tmp_path: Path) -> None:
    run = began_earlier(tmp_path / "runs" / "mine")
    stored_while_it_trained = []

    def stop_once_it_trains() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not stored_while_it_trained:
            time.sleep(0.02)
            stored_while_it_trained.extend({"dqn"} & json.loads((run / "config.json").read_text()).keys())
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_once_it_trains)
    stopper.start()
    endless = ("--runner.total-timesteps", "10000000", "--runner.log-interval", "1000")
    ran = train(*TINY, *endless, "--run-id", "mine", "--runner.resume", "true")
    stopper.join()
    assert ran.status == 143
    step = saved_steps(run / "checkpoints")[-1]
    assert f"SIGTERM stopped training at step {step:,} of 10,000,000, which is saved." in ran.err
    command = f"vibe-store train cartpole_dqn --runner.resume true --run-id mine --base-dir {tmp_path}/runs"
    assert f"Go on with: {command}\n" in ran.out
    assert stored_while_it_trained, "a run that is killed must resume with the settings it had"
    assert 5 not in logged_steps(run), "it had no checkpoint, so it logs every step again"


@pytest.mark.parametrize("stdout", ["a reader that has gone", "/dev/full"])
def test_standard_output_that_fails_does_not_end_training(stdout: str, tmp_path: Path) -> None:
    if stdout == "/dev/full":
        output = os.open(stdout, os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "vibe_store.cli", "train", "cartpole_dqn", *TINY, "--base-dir", tmp_path],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )
    os.close(output)
    assert ran.returncode == 0
    assert ran.stderr.startswith("warning: Standard output cannot be written to any more (")
    assert ran.stderr.count("\n") == 1
    (run,) = tmp_path.iterdir()
    assert saved_steps(run / "checkpoints") == [32, 64]


HANGING = """
from vibe_store.hookspecs import Provider, hookimpl
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Fault, FaultyStorage

class Hanging(FaultyStorage):
    def __init__(self, url):
        hang = Fault(lambda call: call.method == "put", "delay", seconds=600)
        super().__init__(LocalStorage(url.partition("://")[2]), hang)

@hookimpl
def vibe_store_storage():
    return [Provider("hanging", "hanging:Hanging")]
"""


def test_a_last_save_that_hangs_does_not_hold_the_process_beyond_its_deadline(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin" / "hanging-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[vibe_store]\nhanging = hanging\n")
    (plugin.parent / "hanging.py").write_text(HANGING)
    flags = (
        *(*TINY, "--runner.total-timesteps", "10000000", "--runner.checkpoint-interval", "10000000"),
        *("--runner.checkpoint-dir", f"hanging://{tmp_path}/elsewhere", "--base-dir", tmp_path),
        *("--run-id", "mine", "--runner.log-interval", "1000", "--runner.preemption-deadline-secs", "0.5"),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "vibe_store.cli", "train", "cartpole_dqn", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(plugin.parent), str(Path(__file__).parents[2])]),
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
    )
    with process:
        try:
            log, deadline = tmp_path / "mine" / "logs" / "metrics.jsonl", time.monotonic() + 60
            while process.poll() is None and not (log.exists() and log.read_text()):
                assert time.monotonic() < deadline, "it did not train within 60 s"
                time.sleep(0.02)
            process.terminate()
            out, err = process.communicate(timeout=15)
        finally:
            process.kill()
    assert process.returncode == 143, err
    assert "which is not saved: that took longer than preemption_deadline_secs=0.5." in err
    assert "Go on with: vibe-store train cartpole_dqn --runner.resume true --run-id mine" in out
    assert saved_steps(tmp_path / "elsewhere") == []


def test_a_run_that_another_process_writes_to_is_left_alone(train: Run, tmp_path: Path) -> None:
    run = began_earlier(tmp_path / "runs" / "mine")
    holder = (
        "import sys; from vibe_store.checkpoint.writer import become_writer\n"
        "from vibe_store.registry import open_storage\n"
        "lease = become_writer(open_storage(sys.argv[1]), 'manager'); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", holder, run / "checkpoints"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        ran = train("--runner.resume", "true")
        process.communicate(b"\n")
    assert ran.status == 1
    assert "is being written to by process" in ran.err
    assert logged_steps(run) == [5]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``example("cartpole_dqn", ...)`` runs ``examples/train.py`` in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train.py"), run_name="__main__")

    return run


def test_the_example_trains_and_resumes(example: Run, tmp_path: Path, capsys: Any) -> None:
    for total, start in (("32", "0"), ("64", "32")):
        flags = [*TINY, "--base-dir", str(tmp_path), "--run-id", "mine", "--runner.total-timesteps", total]
        example("cartpole_dqn", "--runner.resume", "true", *flags)
        out = capsys.readouterr().out
        assert out.startswith(f"run {tmp_path}/mine, from step {start}\n")
        assert f"done: step {total}, " in out
    assert logged_steps(tmp_path / "mine") == [16, 32, 48, 64]
    assert saved_steps(tmp_path / "mine" / "checkpoints") == [32, 64]


def test_the_example_takes_the_flags_of_the_command_and_fails_in_a_sentence(
    example: Run, tmp_path: Path
) -> None:
    place = ("--base-dir", str(tmp_path), "--run-id", "mine")
    names = ("--runner.serializer", "orbax", "--runner.retention", "every_steps:interval=64")
    example("cartpole_dqn", *TINY, *place, *names)
    listed = list_checkpoints(tmp_path / "mine" / "checkpoints")
    assert [(entry.step, entry.info.serializer) for entry in listed if entry.info] == [(64, "orbax")]
    before = (tmp_path / "mine" / "config.json").read_bytes()
    with pytest.raises(SystemExit, match=r"^error: (.|\n)*hidden_sizes=\[5\] \(was \[4\]\)"):
        example("cartpole_dqn", *place, "--runner.resume", "true", "--dqn.hidden-sizes", "5")
    assert (tmp_path / "mine" / "config.json").read_bytes() == before
    with pytest.raises(SystemExit, match=r"^error: There is no preset 'nope'"):
        example("nope")


def test_curves_for_tensorboard_are_written_beside_the_log(train: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason='needs pip install "vibe-store[tensorboard]"')
    ran = train(*TINY, "--run-id", "curves", "--tensorboard", "true")
    assert ran.status == 0
    (events,) = (tmp_path / "runs" / "curves" / "logs" / "tensorboard").iterdir()
    assert b"steps_per_second" in events.read_bytes()
    (further,) = [line for line in ran.out.splitlines() if line.startswith("Train further: ")]
    assert " --tensorboard true " in further, "it is not stored with the run's settings"
