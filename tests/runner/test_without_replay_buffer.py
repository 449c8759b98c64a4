"""Checkpoints that leave the replay buffer out, and what resumes from them."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.errors import VibeStoreWarning
from vibe_store.runner import TrainResult, train_dqn, train_ppo

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def train(cartpole: tuple[Any, Any], small: SimpleNamespace) -> Any:
    def run(checkpointer: Any = None, dqn: Any = small.dqn, **changes: Any) -> TrainResult:
        settings = small.replace(
            small.runner, **{"save_replay_buffer": False, "eval_interval": None, **changes}
        )
        return train_dqn(*cartpole, dqn_config=dqn, runner_config=settings, checkpointer=checkpointer)

    return run


@pytest.fixture(scope="module")
def straight(train: Any, new_memory: type) -> tuple[TrainResult, Any]:
    """A run that nothing interrupts, and its checkpointer."""
    memory = new_memory()
    return train(memory), memory


def copy_up_to(memory: Any, step: int) -> Any:
    part = type(memory)()
    part.steps = {s: v for s, v in memory.steps.items() if s <= step}
    part.infos, part.stored_metadata = dict(memory.infos), dict(memory.stored_metadata)
    return part


def same_bits(one: Any, other: Any) -> bool:
    return bool(eqx.tree_equal(one, other))


def test_a_checkpoint_holds_everything_but_the_buffer(straight: tuple[TrainResult, Any]) -> None:
    result, memory = straight
    whole = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(result.runner)}
    saved = memory.steps[480]["runner"].keys()
    assert saved < whole
    assert {path.partition("[")[0].split(".")[1] for path in whole - saved} == {"replay"}


def test_leaving_it_out_changes_no_bit_of_the_training(straight: tuple[TrainResult, Any], train: Any) -> None:
    stored = train(save_replay_buffer=True)
    assert same_bits((stored.state, stored.runner), (straight[0].state, straight[0].runner))


def test_a_resume_warns_once_where_it_was_called_that_it_is_not_exact(
    straight: tuple[TrainResult, Any], cartpole: tuple[Any, Any], small: SimpleNamespace
) -> None:
    settings = small.replace(small.runner, total_timesteps=224, eval_interval=None, resume=True)
    memory = copy_up_to(straight[1], 208)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_dqn(*cartpole, dqn_config=small.dqn, runner_config=settings, checkpointer=memory)
    assert [w.category for w in caught] == [VibeStoreWarning]
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        "The checkpoint of step 208 holds no replay buffer (save_replay_buffer=False), so this resume is not "
        "exact: before it learns again, the run fills a new one with learning_starts=48 steps of its policy."
    )


@pytest.mark.parametrize("stored", [False, True])
def test_a_resumed_run_refills_before_it_learns_again(
    stored: bool, straight: tuple[TrainResult, Any], train: Any
) -> None:
    before = straight[1].steps[208]["state"]
    with pytest.warns(VibeStoreWarning, match="this resume is not exact"):
        refilling = train(copy_up_to(straight[1], 208), resume=True, total_timesteps=240)
    assert int(refilling.runner.replay.filled) == 2
    assert int(refilling.state.updates) == before[".updates"] == 208 // 12 - 32 // 12
    np.testing.assert_array_equal(refilling.state.params.layers[0].weight, before[".params.layers[0].weight"])
    assert int(refilling.state.step) == 240

    # From the third row of 16 on, there are 48 transitions. Whether checkpoints are to hold the buffer from
    # now on is another question than whether the one that is resumed from does.
    memory = copy_up_to(straight[1], 208)
    with pytest.warns(VibeStoreWarning, match="this resume is not exact"):
        resumed = train(memory, resume=True, save_replay_buffer=stored)
    assert int(resumed.state.updates) == 208 // 12 - 32 // 12 + 480 // 12 - 240 // 12
    assert int(resumed.runner.replay.filled) == 6
    assert (".replay.filled" in memory.steps[480]["runner"]) == stored


def test_a_checkpoint_with_the_buffer_resumes_exactly_when_the_next_ones_leave_it_out(
    straight: tuple[TrainResult, Any], train: Any, memory: Any
) -> None:
    train(memory, save_replay_buffer=True, total_timesteps=208)
    resumed = train(memory, resume=True)
    assert same_bits((resumed.state, resumed.runner), (straight[0].state, straight[0].runner))
    assert ".replay.filled" not in memory.steps[480]["runner"]


def test_a_buffer_too_small_for_all_of_them_is_filled_whole(
    train: Any, memory: Any, small: SimpleNamespace
) -> None:
    dqn = small.replace(small.dqn, buffer_size=32, learning_starts=160)
    first = train(memory, dqn=dqn, total_timesteps=208)
    assert int(first.state.updates) == 208 // 12 - 144 // 12
    with pytest.warns(VibeStoreWarning, match="this resume is not exact"):
        resumed = train(memory, dqn=dqn, resume=True, total_timesteps=272)
    assert int(resumed.state.updates) - int(first.state.updates) == 272 // 12 - 224 // 12


def test_many_seeds_refill_each_its_own(train: Any, memory: Any) -> None:
    first = train(memory, num_seeds=2, total_timesteps=208)
    with pytest.warns(VibeStoreWarning, match="this resume is not exact"):
        resumed = train(memory, num_seeds=2, resume=True, total_timesteps=304)
    assert resumed.runner.replay.storage.obs.shape == first.runner.replay.storage.obs.shape
    np.testing.assert_array_equal(resumed.runner.replay.filled, [6, 6])
    np.testing.assert_array_equal(resumed.state.updates, [15 + 304 // 12 - 240 // 12] * 2)
    one, other = np.asarray(resumed.runner.replay.storage.obs)
    assert not np.array_equal(one, other)


def test_it_makes_the_files_of_a_checkpoint_smaller(
    train: Any, small: SimpleNamespace, tmp_path: Path
) -> None:
    dqn = small.replace(small.dqn, buffer_size=2_000)
    sizes = []
    for stored in (True, False):
        directory = str(tmp_path / str(stored))
        train(dqn=dqn, total_timesteps=16, checkpoint_dir=directory, save_replay_buffer=stored)
        sizes.append((Path(directory) / "step_16" / "runner.eqx").stat().st_size)
    assert sizes[0] - sizes[1] > 2_000 * (2 * 4 * 4 + 4 + 4 + 1)


def test_ppo_has_no_buffer_and_resumes_exactly(
    cartpole: tuple[Any, Any], small: SimpleNamespace, memory: Any
) -> None:
    config = PPOConfig(hidden_sizes=(8,), rollout_length=5, n_epochs=1)

    def run(**changes: Any) -> TrainResult:
        settings = small.replace(
            small.runner, num_envs=8, save_replay_buffer=False, eval_interval=None, **changes
        )
        return train_ppo(*cartpole, ppo_config=config, runner_config=settings, checkpointer=memory)

    first = run(total_timesteps=80)
    # A warning would be an error here.
    again = run(total_timesteps=80, resume=True)
    assert same_bits((again.state, again.runner), (first.state, first.runner))
