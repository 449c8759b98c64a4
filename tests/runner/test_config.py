"""What RunnerConfig refuses, and the presets."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.runner import RunnerConfig
from vibe_store.runner.presets import get_preset, preset_names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_timesteps", 0),
        ("num_envs", 0),
        ("num_envs", 2.0),
        ("seed", -1),
        ("checkpoint_interval", 0),
        ("max_checkpoints", 0),
        ("keep_period", 0),
        ("eval_interval", 0),
        ("eval_episodes", 0),
        ("log_interval", True),
        ("async_timeout_secs", 0),
        ("preemption_deadline_secs", 0.0),
        ("total_timesteps", 2**31),
    ],
)
def test_a_bad_setting_is_refused_by_name_and_value(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}={value} cannot be used"):
        RunnerConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("serializer", ""), ("serializer", None), ("retention", "")])
def test_a_name_that_is_none_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}={value!r} cannot be used: it must be a name"):
        RunnerConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("target_return", "500", "a number"),
        ("target_return", np.float32(475), "a number, a float of Python, or None"),
        ("preemption_deadline_secs", "5", "a number"),
        ("resume", "false", "True or False"),
        ("save_replay_buffer", "no", "True or False"),
        ("checkpoint_dir", "", "a folder"),
    ],
)
def test_a_setting_of_another_kind_is_refused(field: str, value: Any, wanted: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}=.* cannot be used: it must be {wanted}"):
        RunnerConfig(**{field: value})


@pytest.mark.parametrize(("seed", "num_seeds"), [(2**32, 1), (2**32 - 1, 2), (2**63, 1)])
def test_a_seed_that_would_wrap_is_refused(seed: int, num_seeds: int) -> None:
    assert RunnerConfig(seed=2**32 - num_seeds, num_seeds=num_seeds)
    with pytest.raises(InvalidValueError, match=f"^seed={seed} cannot be used with num_seeds={num_seeds}"):
        RunnerConfig(seed=seed, num_seeds=num_seeds)


def test_resume_and_overwrite_contradict_each_other() -> None:
    with pytest.raises(InvalidValueError, match="resume=True and overwrite=True contradict"):
        RunnerConfig(resume=True, overwrite=True)


def test_the_checkpoint_fields_have_the_documented_defaults() -> None:
    config = RunnerConfig()
    assert (config.checkpoint_dir, config.checkpoint_interval, config.max_checkpoints) == (None, 5_000, 5)
    assert (config.keep_period, config.resume, config.overwrite) == (None, False, False)


def test_a_path_is_taken_as_the_directory() -> None:
    assert RunnerConfig(checkpoint_dir=Path("a/b")).checkpoint_dir == "a/b"


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_makes_its_environment(name: str) -> None:
    preset = get_preset(name)
    env, _ = preset.make_env()
    assert env.name == preset.env_id
    assert name.endswith(f"_{preset.algorithm}")


def test_an_unknown_preset_is_answered_with_those_that_exist() -> None:
    with pytest.raises(InvalidValueError, match=r"no preset 'cartpole'\. Presets: .*cartpole_dqn"):
        get_preset("cartpole")


def test_without_gymnax_a_preset_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "vibe-store\[rl\]"'):
        get_preset("cartpole_dqn").make_env()
