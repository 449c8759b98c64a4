"""What a run of DQN does, saves and resumes to."""

import fcntl
import logging
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.classic_control.cartpole import CartPole

from vibe_store.algorithms.dqn import DQN
from vibe_store.checkpoint import load_checkpoint, load_metadata
from vibe_store.errors import (
    CheckpointsExistError,
    InvalidValueError,
    SaveFailedError,
    TemplateMismatchError,
    VibeStoreWarning,
    WriterLockedError,
)
from vibe_store.runner import Progress, TrainResult, train_dqn
from vibe_store.storage.url_path import UrlPath


def train(cartpole: tuple[Any, Any], small: SimpleNamespace, **changes: Any) -> TrainResult:
    others = {
        name: changes.pop(name)
        for name in ("checkpointer", "metrics", "on_progress", "on_best")
        if name in changes
    }
    dqn = changes.pop("dqn", small.dqn)
    return train_dqn(
        *cartpole, dqn_config=dqn, runner_config=small.replace(small.runner, **changes), **others
    )


def same_bits(one: TrainResult, other: TrainResult) -> bool:
    return bool(eqx.tree_equal((one.state, one.runner), (other.state, other.runner)))


@pytest.fixture(scope="module")
def straight(cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type) -> tuple[TrainResult, Any]:
    """A run that nothing interrupts, and its checkpointer."""
    memory = new_memory()
    return train(cartpole, small, checkpointer=memory), memory


def copy_up_to(memory: Any, step: int) -> Any:
    part = type(memory)()
    part.steps = {s: v for s, v in memory.steps.items() if s <= step}
    part.infos = {s: v for s, v in memory.infos.items() if s <= step}
    part.stored_metadata = dict(memory.stored_metadata)
    return part


def test_a_run_trains_to_its_end_and_learns_on_the_way(straight: tuple[TrainResult, Any]) -> None:
    result, _ = straight
    assert result.step == int(result.state.step) == 480
    assert int(result.state.updates) == 480 // 12 - 32 // 12
    assert result.resumed_from is None
    assert np.isfinite(result.history[-1]["loss"])


def test_saves_are_at_the_first_multiples_past_each_interval_and_at_the_end(
    straight: tuple[TrainResult, Any],
) -> None:
    result, memory = straight
    assert memory.all_steps() == [112, 208, 304, 400, 480] == list(result.saved_steps)


def test_only_a_save_at_an_evaluation_carries_its_return(straight: tuple[TrainResult, Any]) -> None:
    result, memory = straight
    evaluated = {line["step"]: line["eval_return"] for line in result.history if "eval_return" in line}
    assert set(evaluated) == {160, 320, 480}
    assert memory.info(400).metrics is None
    assert memory.info(480).metrics == {"eval_return": evaluated[480]}


def test_a_given_checkpointer_is_left_open(straight: tuple[TrainResult, Any]) -> None:
    assert not straight[1].closed


@pytest.mark.parametrize("cut", [112, 304])
def test_a_resumed_run_ends_in_the_same_bits(
    cut: int, straight: tuple[TrainResult, Any], cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    result, memory = straight
    resumed = train(cartpole, small, checkpointer=copy_up_to(memory, cut), resume=True)
    assert resumed.resumed_from == cut
    assert same_bits(resumed, result)
    assert resumed.eval_return == result.eval_return


def test_a_run_whose_end_is_moved_ends_in_the_same_bits(
    straight: tuple[TrainResult, Any], cartpole: tuple[Any, Any], small: SimpleNamespace, memory: Any
) -> None:
    train(cartpole, small, checkpointer=memory, total_timesteps=230)
    assert memory.latest_step() == 240
    resumed = train(cartpole, small, checkpointer=memory, resume=True)
    assert resumed.resumed_from == 240
    assert same_bits(resumed, straight[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_interval": None, "log_interval": 480, "checkpoint_interval": 480},
        {"eval_interval": 48, "log_interval": 16, "eval_episodes": 3},
    ],
)
def test_how_often_a_run_is_looked_at_changes_no_bit(
    changes: dict[str, Any],
    straight: tuple[TrainResult, Any],
    cartpole: tuple[Any, Any],
    small: SimpleNamespace,
) -> None:
    assert same_bits(train(cartpole, small, **changes), straight[0])


def test_another_seed_ends_elsewhere(
    straight: tuple[TrainResult, Any], cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    assert not same_bits(train(cartpole, small, seed=1), straight[0])


def test_resuming_a_finished_run_returns_it_and_trains_nothing(
    straight: tuple[TrainResult, Any], cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    result, memory = straight
    again = train(cartpole, small, checkpointer=memory, resume=True)
    assert (again.resumed_from, again.step, again.saved_steps, again.history) == (480, 480, (), ())
    assert same_bits(again, result)


class CountingCartPole(CartPole):
    """Counts how often its step is traced."""

    traced = 0

    def step_env(self, *args: Any, **kwargs: Any) -> Any:
        type(self).traced += 1
        return super().step_env(*args, **kwargs)


def test_no_chunk_length_and_no_restored_state_compiles_anything_again(
    small: SimpleNamespace, memory: Any
) -> None:
    env = CountingCartPole()
    lengths: list[int] = []

    def traced(**changes: Any) -> int:
        before = CountingCartPole.traced
        train((env, env.default_params), small, checkpointer=memory, eval_interval=None, **changes)
        return CountingCartPole.traced - before

    once = traced(total_timesteps=16)
    many = traced(resume=True, log_interval=112, on_progress=lambda p: lengths.append(p.step))
    assert len({b - a for a, b in pairwise(lengths)}) > 1
    # One environment class caches its trace under jit, so a second run traces no more than the first.
    assert many <= once


def test_a_time_limit_is_stored_as_no_end_with_the_last_observation(
    cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    env, params = cartpole
    short = params.replace(max_steps_in_episode=5)
    result = train((env, short), small, total_timesteps=96, eval_interval=None)

    replay = result.runner.replay.storage
    assert not replay.terminated.any()
    obs, next_obs = np.asarray(replay.obs), np.asarray(replay.next_obs)
    for row in range(5):
        continues = (next_obs[row] == obs[row + 1]).all()
        assert continues == (row != 4)
    assert (np.abs(obs[5]) <= 0.05).all()
    assert (np.abs(next_obs[4]) > 0.05).any(axis=1).all()
    assert result.history[-1]["length"] == 5


def test_metrics_progress_and_the_best_checkpoint_are_told(
    cartpole: tuple[Any, Any], small: SimpleNamespace, memory: Any, straight: tuple[TrainResult, Any]
) -> None:
    lines: list[Mapping[str, Any]] = []
    told: list[Progress] = []
    best: list[int] = []
    writer = SimpleNamespace(write=lines.append)
    result = train(
        cartpole,
        small,
        checkpointer=memory,
        checkpoint_interval=160,
        metrics=writer,
        on_progress=told.append,
        on_best=best.append,
    )
    assert tuple(lines) == result.history
    logged = [line["step"] for line in lines if "loss" in line]
    assert logged == [64, 112, 160, 208, 256, 304, 352, 400, 464, 480]
    assert told[-1].step == told[-1].total == told[-1].checkpoint_step == 480
    assert told[-1].eval_return == result.eval_return
    assert all(p.steps_per_second > 0 for p in told)
    returns = {line["step"]: line["eval_return"] for line in lines if "eval_return" in line}
    assert best[0] == 160
    assert best[-1] == max(returns, key=lambda step: returns[step])
    assert same_bits(result, straight[0])


def test_training_goes_on_where_a_line_of_metrics_cannot_be_written(
    cartpole: tuple[Any, Any], small: SimpleNamespace, straight: tuple[TrainResult, Any]
) -> None:
    def write(line: Mapping[str, Any]) -> None:
        if line["step"] == 112:
            raise OSError(28, "The lines wait.")

    with pytest.warns(VibeStoreWarning, match=r"The lines wait\. Training goes on\.") as warned:
        result = train(cartpole, small, metrics=SimpleNamespace(write=write))
    assert len(warned) == 1
    assert same_bits(result, straight[0])


def test_the_checkpoints_of_a_run_can_be_in_a_bucket(
    cartpole: tuple[Any, Any], small: SimpleNamespace, s3: Any, straight: tuple[TrainResult, Any]
) -> None:
    place = UrlPath(f"{s3.url}/{uuid.uuid4().hex}", s3.storage_options)
    train(cartpole, small, checkpoint_dir=place, total_timesteps=304)
    result = train(cartpole, small, checkpoint_dir=place, resume=True)
    assert result.resumed_from == 304
    assert same_bits(result, straight[0])
    saved = load_metadata(place, step=480)
    assert saved is not None
    assert saved["runner_config"]["total_timesteps"] == 480
    assert s3.server not in repr(saved), "the options of the storage are nobody else's"


def test_a_resumed_run_knows_the_best_return_before_it(
    cartpole: tuple[Any, Any], small: SimpleNamespace, straight: tuple[TrainResult, Any]
) -> None:
    part = copy_up_to(straight[1], 400)
    part.infos[304] = part.infos[304].__class__(
        step=304, created=part.infos[304].created, size=1, serializer="memory", metrics={"eval_return": 1e9}
    )
    best: list[int] = []
    train(cartpole, small, checkpointer=part, resume=True, on_best=best.append)
    assert best == []


def test_a_resumed_run_knows_the_best_return_where_the_checkpointer_ranks_nothing(
    cartpole: tuple[Any, Any], small: SimpleNamespace, straight: tuple[TrainResult, Any]
) -> None:
    part = copy_up_to(straight[1], 400)
    part.infos[304] = replace(part.infos[304], metrics={"eval_return": 1e9})
    part.best_step = lambda: None
    best: list[int] = []
    train(cartpole, small, checkpointer=part, resume=True, on_best=best.append)
    assert best == []


def test_a_save_that_fails_in_the_background_is_told_and_training_goes_on(
    cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type, straight: tuple[TrainResult, Any]
) -> None:
    class FullDisk(new_memory):
        def save(self, step: int, *args: Any, **kwargs: Any) -> bool:
            if step == 208 and 112 in self.steps:
                del self.steps[112]
                raise SaveFailedError("Saving step 112 failed: no space left.", step=112)
            return super().save(step, *args, **kwargs)

    memory = FullDisk()
    with pytest.warns(VibeStoreWarning, match="Saving step 112 failed: no space left. Training goes on."):
        result = train(cartpole, small, checkpointer=memory)
    assert memory.all_steps() == [208, 304, 400, 480]
    assert same_bits(result, straight[0])


def test_a_save_that_fails_in_the_background_counts_neither_as_saved_nor_as_the_best(
    cartpole: tuple[Any, Any], small: SimpleNamespace, new_memory: type, straight: tuple[TrainResult, Any]
) -> None:
    class FullDisk(new_memory):
        def save(self, step: int, *args: Any, **kwargs: Any) -> bool:
            if self.steps.pop(160, None):
                raise SaveFailedError("Saving step 160 failed: no space left.", step=160)
            return super().save(step, *args, **kwargs)

    memory, best = FullDisk(), []
    vars(memory).update(vars(copy_up_to(straight[1], 112)))
    memory.infos[112] = replace(memory.infos[112], metrics={"eval_return": -1.0})
    with pytest.warns(VibeStoreWarning, match="Saving step 160 failed"):
        result = train(
            cartpole, small, checkpointer=memory, checkpoint_interval=160, resume=True, on_best=best.append
        )
    assert result.saved_steps == (320, 480)
    assert best[:3] == [160, 112, 320]


def test_a_save_that_was_not_begun_is_told_and_training_goes_on_unless_it_was_the_last(
    cartpole: tuple[Any, Any], small: SimpleNamespace, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, refused = memory.save, [208]

    def save_or_refuse(step: int, *args: Any, **options: Any) -> bool:
        if step in refused:
            raise SaveFailedError(f"The save of step {step} was not begun.", step=step)
        return bool(save(step, *args, **options))

    monkeypatch.setattr(memory, "save", save_or_refuse)
    with pytest.warns(VibeStoreWarning, match="Step 208 is not saved, and training goes on"):
        result = train(cartpole, small, checkpointer=memory)
    assert list(result.saved_steps) == memory.all_steps() == [112, 304, 400, 480]
    refused.append(560)
    with pytest.raises(SaveFailedError, match="step 560 was not begun"):
        train(cartpole, small, checkpointer=memory, resume=True, total_timesteps=560)


def test_resume_without_a_directory_warns_once_and_trains(
    cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(cartpole, small, resume=True, total_timesteps=16)
    assert [w.category for w in caught] == [VibeStoreWarning]
    assert "Nothing is being saved" in str(caught[0].message)
    assert "RunnerConfig.checkpoint_dir" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert result.step == 16


def test_a_given_checkpointer_that_holds_steps_needs_resume(
    cartpole: tuple[Any, Any], small: SimpleNamespace, straight: tuple[TrainResult, Any]
) -> None:
    with pytest.raises(CheckpointsExistError, match=r"already holds step 480\. Set resume=True"):
        train(cartpole, small, checkpointer=straight[1])


@pytest.mark.parametrize(
    ("changes", "field", "path"),
    [
        ({"hidden_sizes": (9,)}, r"hidden_sizes=\[9\] \(was \[8\]\)", ".params.layers[0].weight"),
        ({"num_envs": 8}, r"num_envs=8 \(was 16\)", ".obs"),
        ({"buffer_size": 200}, r"buffer_size=200 \(was 96\)", ".replay.storage.obs"),
    ],
)
def test_a_resume_that_does_not_fit_names_the_leaves_and_the_field_behind_them(
    changes: dict[str, Any],
    field: str,
    path: str,
    cartpole: tuple[Any, Any],
    small: SimpleNamespace,
    straight: tuple[TrainResult, Any],
) -> None:
    runner = {name: value for name, value in changes.items() if name == "num_envs"}
    dqn = small.replace(small.dqn, **{name: v for name, v in changes.items() if name != "num_envs"})
    with pytest.raises(TemplateMismatchError, match=field) as caught:
        train(cartpole, small, checkpointer=straight[1], resume=True, dqn=dqn, **runner)
    assert path in caught.value.paths
    assert path in str(caught.value)


def test_a_resume_in_another_environment_is_refused(
    small: SimpleNamespace, straight: tuple[TrainResult, Any]
) -> None:
    import gymnax

    with pytest.raises(InvalidValueError, match=r"is of env 'CartPole-v1'.*'Acrobot-v1' cannot resume"):
        train(gymnax.make("Acrobot-v1"), small, checkpointer=straight[1], resume=True)


def test_a_resume_with_another_learning_rate_says_so(
    cartpole: tuple[Any, Any],
    small: SimpleNamespace,
    straight: tuple[TrainResult, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    dqn = small.replace(small.dqn, learning_rate=0.125)
    with caplog.at_level(logging.WARNING, "vibe_store"):
        train(cartpole, small, checkpointer=straight[1], resume=True, dqn=dqn)
    assert "learning_rate=0.125 (was 0.00025)" in caplog.text


def test_continuous_actions_are_refused_before_anything_is_compiled(small: SimpleNamespace) -> None:
    import gymnax

    with pytest.raises(InvalidValueError, match="Pendulum-v1 is Box of shape"):
        train(gymnax.make("Pendulum-v1"), small)


def test_a_directory_is_saved_to_resumed_from_and_loaded_for_inference(
    cartpole: tuple[Any, Any], small: SimpleNamespace, straight: tuple[TrainResult, Any], tmp_path: Path
) -> None:
    directory = str(tmp_path / "run")
    train(cartpole, small, checkpoint_dir=directory, total_timesteps=320)
    with pytest.raises(CheckpointsExistError):
        train(cartpole, small, checkpoint_dir=directory)
    result = train(cartpole, small, checkpoint_dir=directory, resume=True)
    assert result.resumed_from == 320
    assert same_bits(result, straight[0])

    skeleton = DQN.init(jax.random.PRNGKey(99), obs_shape=(4,), n_actions=2, config=small.dqn)
    state = load_checkpoint(directory, like=skeleton, step=480)
    assert eqx.tree_equal(state, result.state)
    action, _ = DQN.act(state, jnp.ones(4), config=small.dqn, explore=False)
    assert action.shape == ()


def test_a_directory_that_another_process_writes_to_is_refused_before_anything_is_trained(
    cartpole: tuple[Any, Any], small: SimpleNamespace, tmp_path: Path
) -> None:
    lock, told = tmp_path / ".vibe_store" / "writer.lock", []
    lock.parent.mkdir()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(WriterLockedError):
            train(cartpole, small, checkpoint_dir=str(tmp_path), on_progress=told.append)
    assert told == []


def test_every_leaf_of_a_run_is_strongly_typed(straight: tuple[TrainResult, Any]) -> None:
    for leaf in jax.tree.leaves((straight[0].state, straight[0].runner)):
        assert isinstance(leaf, jax.Array)
        assert jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.weak_type


def test_a_run_stops_at_the_first_evaluation_that_reaches_the_target(
    cartpole: tuple[Any, Any], small: SimpleNamespace, memory: Any, straight: tuple[TrainResult, Any]
) -> None:
    returns = {line["step"]: line["eval_return"] for line in straight[0].history if "eval_return" in line}
    first = returns[160]
    result = train(cartpole, small, checkpointer=memory, target_return=first)
    assert result.step == 160
    assert result.eval_return == first
    assert memory.all_steps() == [112, 160]
    assert memory.info(160).metrics == {"eval_return": first}
    again = train(cartpole, small, checkpointer=memory, target_return=first, resume=True)
    assert (again.step, again.history) == (160, ())
    further = train(cartpole, small, checkpointer=memory, target_return=1e9, resume=True)
    assert same_bits(further, straight[0])
