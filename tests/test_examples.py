"""The scripts in examples/ run as they stand, and go on where they were when run again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vibe_store import MetricsLogger, RunDir

pytestmark = pytest.mark.proof

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(EXAMPLES / name)],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout


def test_a_training_loop_by_hand_saves_resumes_and_finds_its_best(tmp_path: Path) -> None:
    said = run("training_loop.py", tmp_path)
    found = re.search(r"run (line_fit_\S+), from step 0\nbest error \S+, slope (\S+)\n", said)
    assert found is not None, said
    assert float(found[2]) == pytest.approx(3, abs=0.3)
    again = run("training_loop.py", tmp_path, RUN_ID=found[1])
    assert "from step 1000" in again


def test_a_training_loop_by_hand_that_resumes_remembers_its_best(tmp_path: Path) -> None:
    found = re.search(r"run (line_fit_\S+), ", run("training_loop.py", tmp_path))
    assert found is not None
    folder = RunDir(base_dir=tmp_path / "runs", run_id=found[1])
    # As if nothing had been as good as step 600, and the run had been killed right after it.
    for step in (800, 1000):
        shutil.rmtree(folder.checkpoint_dir(step))
    with MetricsLogger(folder.log_path(), resume_step=400) as metrics:
        metrics.write({"step": 600, "error": 0.0})
    folder.mark_best(600)
    assert "from step 600" in run("training_loop.py", tmp_path, RUN_ID=found[1])
    assert folder.best_checkpoint == folder.checkpoints / "step_600"


def test_an_environment_of_ones_own_is_learned(tmp_path: Path) -> None:
    said = run("custom_environment.py", tmp_path)
    assert "step 4000" in said
    assert said.endswith("goes right\n")


def test_an_agent_of_ones_own_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run("custom_agent.py", tmp_path)
    assert "from round 0" in first
    again = run("custom_agent.py", tmp_path)
    assert "from round 60" in again
    assert first.splitlines()[-1] == again.splitlines()[-1]


def test_a_state_moves_from_one_device_to_four_and_back(tmp_path: Path) -> None:
    assert run("other_devices.py", tmp_path) == "on 4 devices\nback on 1 device\n"


def test_each_example_is_run_by_a_test() -> None:
    tested = {*re.findall(r'"(\w+\.py)"', Path(__file__).read_text("utf-8")), "train.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
