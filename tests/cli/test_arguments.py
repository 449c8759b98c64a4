"""What ``vibe-store train`` makes of its flags, of the preset, and of runs that exist."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vibe_store.cli.arguments import TrainPlan, plan_training
from vibe_store.errors import CheckpointsExistError, InvalidValueError, VibeStoreWarning
from vibe_store.runner import RunnerConfig
from vibe_store.runner.presets import get_preset

PRESET = get_preset("cartpole_dqn")


def plan(base: Path, *flags: str) -> TrainPlan:
    return plan_training(PRESET, ["--base-dir", str(base), *flags], prog="vibe-store train cartpole_dqn")


def begun(base: Path, *flags: str) -> TrainPlan:
    """A run that was begun with these flags, as training would have stored it."""
    began = plan(base, *flags)
    began.run.save_config(began.stored)
    return began


def test_without_flags_a_run_has_the_settings_of_the_preset(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    assert planned.config == PRESET.config
    assert planned.runner == dataclasses.replace(
        PRESET.runner, checkpoint_dir=str(planned.run.path / "checkpoints")
    )
    assert planned.run.path.parent == tmp_path
    assert planned.run.run_id.startswith("cartpole_dqn_")
    assert not planned.existing


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_booleans_take_a_word_in_any_case(tmp_path: Path, word: str) -> None:
    planned = plan(tmp_path, "--runner.resume", word, "--dqn.double", "false")
    assert planned.runner.resume is True
    assert planned.config.double is False


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--runner.resume", "maybe"], "neither true nor false"),
        (["--runner.resume"], "Missing value"),
        (["--runner.total-timesteps", "0"], "total_timesteps=0"),
        (["--runner.resume", "true", "--runner.overwrite", "true"], "contradict"),
        (["--base-dir", ""], "--base-dir is empty; give a folder or a URL"),
        (["--runner.checkpoint-dir", ""], "checkpoint_dir='' cannot be used: it must be a folder"),
        (["--runner.overwrite", "true"], "say what to start over by --run-id or --runner.checkpoint-dir"),
        (["--storage-options", '{"key": 1}'], "neither --base-dir nor --runner.checkpoint-dir is one"),
        (["--dqn.gamma", "2"], "gamma=2.0"),
        (["--dqn.learning-rat", "1"], "Unrecognized options: --dqn.learning-rat"),
    ],
)
def test_flags_that_cannot_be_used_end_with_2_and_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        plan(tmp_path, *flags)
    assert stop.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cartpole_dqn", "cartpole_ppo", "pendulum_sac"])
def test_every_field_is_a_flag_with_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset = get_preset(name)
    with pytest.raises(SystemExit) as stop:
        plan_training(preset, ["--help"], prog="vibe-store train")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for group, config in ((preset.algorithm, type(preset.config)), ("runner", RunnerConfig)):
        for field in dataclasses.fields(config):
            assert f"--{group}.{field.name.replace('_', '-')} " in text
    words = " ".join(text.replace("│", " ").split())
    assert "Width of each hidden layer" in words
    assert "Go on from the newest checkpoint" in words


def test_the_settings_are_stored_without_those_of_one_start_only(tmp_path: Path) -> None:
    config = begun(tmp_path, "--runner.resume", "true", "--dqn.learning-rate", "1e-3").stored
    assert config["preset"] == "cartpole_dqn"
    assert config["dqn"]["learning_rate"] == 1e-3
    assert config["runner"]["resume"] is False
    assert config["runner"]["checkpoint_dir"] is None


def test_a_resumed_run_has_the_settings_it_was_begun_with(tmp_path: Path) -> None:
    first = begun(tmp_path, "--dqn.learning-rate", "1e-3", "--dqn.hidden-sizes", "8", "16")
    again = plan(tmp_path, "--runner.resume", "true")
    assert again.run.path == first.run.path
    assert again.config == first.config
    assert again.runner == dataclasses.replace(first.runner, resume=True)
    assert (again.existing, again.changes) == (True, {})


def test_flags_come_on_top_of_the_settings_of_a_resumed_run_and_are_named(tmp_path: Path) -> None:
    begun(tmp_path, "--dqn.learning-rate", "1e-3", "--runner.total-timesteps", "500")
    again = plan(tmp_path, "--runner.resume", "true", "--runner.total-timesteps", "900")
    assert again.config.learning_rate == 1e-3
    assert again.runner.total_timesteps == 900
    assert again.changes == {"runner.total_timesteps": "runner.total_timesteps is 900 (was 500)"}
    assert again.stored["runner"]["total_timesteps"] == 900


def test_the_newest_run_of_the_preset_goes_on(tmp_path: Path) -> None:
    begun(tmp_path, "--run-id", "zz_older")
    newest = begun(tmp_path, "--run-id", "newest")
    other = begun(tmp_path, "--run-id", "of_another_preset")
    other.run.save_config({**other.stored, "preset": "another"})
    (tmp_path / "cartpole_dqn_20990101_000000").mkdir()
    assert plan(tmp_path, "--runner.resume", "true").run.path == newest.run.path


def test_a_run_can_be_named(tmp_path: Path) -> None:
    older = begun(tmp_path)
    begun(tmp_path)
    again = plan(tmp_path, "--runner.resume", "true", "--run-id", older.run.run_id)
    assert again.run.path == older.run.path
    assert again.stored["created"] == older.stored["created"]


def test_with_nothing_to_resume_a_new_run_begins(tmp_path: Path) -> None:
    assert not plan(tmp_path, "--runner.resume", "true").existing
    named = plan(tmp_path, "--runner.resume", "true", "--run-id", "mine")
    assert (named.existing, named.run.path) == (False, tmp_path / "mine")


def test_without_resume_every_run_is_a_new_one(tmp_path: Path) -> None:
    first, second = begun(tmp_path), begun(tmp_path)
    assert first.run.path != second.run.path
    assert not second.existing


def test_a_run_that_exists_is_not_begun_again_unasked(tmp_path: Path) -> None:
    begun(tmp_path, "--run-id", "mine")
    with pytest.raises(CheckpointsExistError, match=r"mine exists\. Add --runner\.resume true"):
        plan(tmp_path, "--run-id", "mine")


def test_a_run_that_is_overwritten_has_the_settings_of_the_preset(tmp_path: Path) -> None:
    first = begun(tmp_path, "--run-id", "mine", "--dqn.learning-rate", "1e-3")
    again = plan(tmp_path, "--run-id", "mine", "--runner.overwrite", "true")
    assert again.existing
    assert again.config == PRESET.config
    assert again.stored["created"] > first.stored["created"]


def test_a_run_of_another_preset_is_refused(tmp_path: Path) -> None:
    other = begun(tmp_path, "--run-id", "mine")
    other.run.save_config({**other.stored, "preset": "another"})
    with pytest.raises(InvalidValueError, match="is of the preset 'another', not of 'cartpole_dqn'"):
        plan(tmp_path, "--run-id", "mine", "--runner.resume", "true")


def test_checkpoints_elsewhere_stay_there_when_the_run_goes_on(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    first = begun(tmp_path / "runs", "--runner.checkpoint-dir", str(elsewhere))
    assert first.runner.checkpoint_dir == str(elsewhere)
    assert plan(tmp_path / "runs", "--runner.resume", "true").runner.checkpoint_dir == str(elsewhere)


def test_a_relative_place_is_stored_so_that_it_holds_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = begun(tmp_path / "runs", "--runner.checkpoint-dir", "ckpt").stored
    assert config["runner"]["checkpoint_dir"] == str(tmp_path / "ckpt")


def test_a_url_is_stored_as_it_is(tmp_path: Path) -> None:
    assert (
        plan(tmp_path, "--runner.checkpoint-dir", "gs://b/c").stored["runner"]["checkpoint_dir"] == "gs://b/c"
    )


def test_a_place_that_is_given_is_resumed_by_the_run_whose_checkpoints_are_there(tmp_path: Path) -> None:
    there = begun(tmp_path / "runs", "--runner.checkpoint-dir", str(tmp_path / "a"))
    begun(tmp_path / "runs", "--runner.checkpoint-dir", str(tmp_path / "b"))
    resume = ["--runner.resume", "true", "--runner.checkpoint-dir"]
    assert plan(tmp_path / "runs", *resume, str(tmp_path / "a")).run.path == there.run.path
    # On a machine that has never seen the run, the checkpoints are all there is: its folder is a new one.
    assert not plan(tmp_path / "runs", *resume, str(tmp_path / "c")).existing


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dqn": {"gamma": 7}}, r"config\.json cannot be used: gamma=7"),
        ({"dqn": {"gamma": "x"}}, r"config\.json cannot be used: "),
        ({"runner": 3}, r"config\.json cannot be used: 'runner' is no JSON object"),
    ],
)
def test_stored_settings_that_cannot_be_used_are_refused_with_their_place(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    first = begun(tmp_path, "--run-id", "mine")
    first.run.config_path.write_text(json.dumps({**first.stored, **change}))
    with pytest.raises(InvalidValueError, match=complaint):
        plan(tmp_path, "--run-id", "mine", "--runner.resume", "true")


def test_a_stored_setting_of_another_version_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.run.config_path.write_text(json.dumps({**first.stored, "dqn": {"gamma": 0.5, "dueling": True}}))
    with pytest.warns(VibeStoreWarning, match=r"passed over: dqn\.dueling"):
        again = plan(tmp_path, "--runner.resume", "true")
    assert again.config == dataclasses.replace(PRESET.config, gamma=0.5)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "is no JSON"),
        (b"{\xff", "is no JSON"),
        (b"[" * 200_000, "is nested too deeply"),
        (None, "is a folder"),
    ],
    ids=["half", "no-text", "deep", "folder"],
)
def test_a_broken_config_of_another_run_hinders_nobody(
    tmp_path: Path, vibe_store: Callable[..., Any], content: bytes | None, complaint: str
) -> None:
    first = begun(tmp_path)
    broken = tmp_path / "broken" / "config.json"
    broken.parent.mkdir()
    if content is None:
        broken.mkdir()
    else:
        broken.write_bytes(content)
    with pytest.warns(VibeStoreWarning, match=rf"broken.config\.json {complaint}.*passed over"):
        again = plan(tmp_path, "--runner.resume", "true")
    assert again.run.path == first.run.path
    assert vibe_store("ls", broken.parent).out == f"No steps in {broken.parent}.\n"
