"""``vibe-store curves``: runs become curves, and seeds a band around their mean."""

import json
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vibe_store.cli.curves import mean_curve
from vibe_store.metrics import MetricsLogger
from vibe_store.run_dir import RunDir

Run = Callable[..., Any]

pytest.importorskip("matplotlib", reason='needs pip install "vibe-store[plot]"')

shown = pytest.mark.filterwarnings("always::vibe_store.errors.VibeStoreWarning")


def log(
    base: Any, name: str, lines: Sequence[dict[str, Any]], *, preset: str | None = "cartpole_dqn"
) -> RunDir:
    run = RunDir(base_dir=base, run_id=name)
    if preset is not None:
        run.save_config({"preset": preset})
    with MetricsLogger(run.log_path()) as logger:
        for line in lines:
            logger.write(line)
    return run


def evaluations(*values: float, interval: int = 10) -> list[dict[str, Any]]:
    return [{"step": interval * (i + 1), "eval_return": value} for i, value in enumerate(values)]


@pytest.fixture
def curves(vibe_store: Run, tmp_path: Path) -> Run:
    """Draw into ``curves.png``; return the curves of ``--json``, by name."""

    def run(*arguments: Any) -> dict[str, Any]:
        ran = vibe_store("curves", *arguments, "--out", tmp_path / "curves.png", "--json")
        assert (ran.status, ran.err) == (0, "")
        return {curve["name"]: curve for curve in json.loads(ran.out)["curves"]}

    return run


def test_a_picture_is_drawn_and_each_curve_told(vibe_store: Run, tmp_path: Path) -> None:
    log(tmp_path / "runs", "a", evaluations(1.0, 3.0))
    log(tmp_path / "runs", "b", evaluations(2.0, 5.0))
    out = tmp_path / "curves.png"
    ran = vibe_store("curves", tmp_path / "runs", "--out", out)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"cartpole_dqn (2 runs, 2 seeds): eval_return 4 at step 20\nDrawn in {out}.\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_preset_are_one_curve(curves: Run, tmp_path: Path) -> None:
    base = tmp_path / "runs"
    log(base, "a", evaluations(1.0, 3.0))
    log(base, "b", evaluations(2.0, 5.0))
    log(base, "c", evaluations(7.0, 9.0), preset="pendulum_sac")
    drawn = curves(base)
    assert drawn.keys() == {"cartpole_dqn", "pendulum_sac"}
    assert drawn["cartpole_dqn"]["runs"] == ["a", "b"]
    assert (drawn["cartpole_dqn"]["steps"], drawn["cartpole_dqn"]["mean"]) == ([10, 20], [1.5, 4.0])
    assert drawn["pendulum_sac"]["low"] == drawn["pendulum_sac"]["high"] == [None, None]


def test_runs_are_named_one_by_one_and_count_once(curves: Run, tmp_path: Path) -> None:
    base = tmp_path / "runs"
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 9.0)):
        log(base, name, evaluations(value))
    drawn = curves(base / "a", base / "b", base / "b")
    assert drawn["cartpole_dqn"]["runs"] == ["a", "b"]


def test_the_seeds_of_one_run_count_each(curves: Run, tmp_path: Path) -> None:
    lines = [{"step": 10, "eval_return": 2.0, "eval_return_by_seed": [1.0, 2.0, 3.0]}]
    log(tmp_path / "runs", "many", lines)
    log(tmp_path / "runs", "one", evaluations(6.0))
    (curve,) = curves(tmp_path / "runs").values()
    assert (curve["seeds"], curve["mean"]) == (4, [3.0])


def test_the_band_is_the_interval_of_student() -> None:
    values = [3.0, 5.0, 10.0]
    curve = mean_curve("x", [{1: value} for value in values])
    # 4.303 is the 97.5 % point of Student's t with 2 degrees of freedom, from a printed table.
    half = 4.303 * np.std(values, ddof=1) / np.sqrt(3)
    assert curve.mean == [6.0]
    np.testing.assert_allclose([*curve.low, *curve.high], [6 - half, 6 + half], atol=2e-3)


def test_steps_that_differ_are_joined_and_nothing_is_made_up_beyond_the_ends() -> None:
    curve = mean_curve("x", [{0: 0.0, 20: 2.0}, {10: 5.0, 30: 9.0}])
    assert curve.steps == [0, 10, 20, 30]
    assert curve.mean == [0.0, 3.0, 4.5, 9.0]
    assert np.isnan(curve.low).tolist() == [True, False, False, True]


def test_another_metric_is_drawn_by_name(curves: Run, tmp_path: Path) -> None:
    lines = [{"step": 10, "loss": float("nan")}, {"step": 20, "loss": 0.5}, {"step": 30, "loss": None}]
    log(tmp_path / "runs", "a", lines)
    (curve,) = curves(tmp_path / "runs", "--metric", "loss").values()
    assert (curve["steps"], curve["mean"]) == ([20], [0.5])


def test_a_run_that_no_preset_made_is_a_curve_of_its_own(curves: Run, tmp_path: Path) -> None:
    log(tmp_path / "runs", "line_fit", evaluations(1.0), preset=None)
    assert curves(tmp_path / "runs" / "line_fit").keys() == {"line_fit"}


def test_runs_may_be_in_a_bucket(curves: Run) -> None:
    base = f"memory://{uuid.uuid4().hex}/runs"
    run = log(base, "a", evaluations(1.0))
    log(base, "b", evaluations(3.0))
    assert curves(base)["cartpole_dqn"]["mean"] == [2.0]
    assert curves(str(run.path))["cartpole_dqn"]["mean"] == [1.0]


@shown
def test_a_run_that_lacks_the_metric_is_passed_over_with_a_warning(vibe_store: Run, tmp_path: Path) -> None:
    log(tmp_path / "runs", "a", evaluations(1.0))
    log(tmp_path / "runs", "b", [{"step": 10, "loss": 1.0}])
    ran = vibe_store("curves", tmp_path / "runs", "--out", tmp_path / "x.svg")
    assert ran.status == 0
    assert ran.err == f"warning: {tmp_path}/runs/b has not measured 'eval_return'; it has loss.\n"
    assert "(1 run, 1 seed)" in ran.out


@shown
def test_a_run_without_a_log_is_passed_over_where_it_was_not_named(vibe_store: Run, tmp_path: Path) -> None:
    base = tmp_path / "runs"
    log(base, "a", evaluations(1.0))
    RunDir(base_dir=base, run_id="b").save_config({"preset": "cartpole_dqn"})
    ran = vibe_store("curves", base, "--out", tmp_path / "x.svg")
    assert ran.status == 0
    assert ran.err == f"warning: {base}/b has no metrics log, logs/metrics.jsonl, and is passed over.\n"
    assert "(1 run, 1 seed)" in ran.out
    assert vibe_store("curves", base / "b", "--out", tmp_path / "x.svg").status == 1


@shown
def test_a_metric_that_no_run_has_is_an_error(vibe_store: Run, tmp_path: Path) -> None:
    log(tmp_path / "runs", "a", evaluations(1.0))
    ran = vibe_store("curves", tmp_path / "runs", "--out", tmp_path / "x.png", "--metric", "lo")
    assert ran.status == 1
    assert "error: None of these runs measured 'lo'.\n" in ran.err
    assert not (tmp_path / "x.png").exists()


def test_a_directory_without_runs_is_an_error_and_stays_as_it_was(vibe_store: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = vibe_store("curves", tmp_path / "empty", "--out", tmp_path / "x.png")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {tmp_path}/empty is no run that has a metrics log")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_picture_of_an_unknown_kind_is_an_error(vibe_store: Run, tmp_path: Path) -> None:
    ran = vibe_store("curves", tmp_path, "--out", tmp_path / "curves.txt")
    assert (ran.status, ran.out) == (1, "")
    assert "has no ending that says what picture to write. Endings are: " in ran.err


def test_no_directory_is_a_mistake(vibe_store: Run, tmp_path: Path) -> None:
    ran = vibe_store("curves", "--out", tmp_path / "x.png")
    assert ran.status == 2


def test_a_missing_package_is_answered_with_what_to_install(
    vibe_store: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = vibe_store("curves", tmp_path, "--out", tmp_path / "x.png")
    assert (ran.status, ran.out) == (1, "")
    assert 'pip install "vibe-store[plot]"' in ran.err
