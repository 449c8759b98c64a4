"""Runs of DQN that draw by priority, with observations and rewards scaled."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.errors import TemplateMismatchError
from vibe_store.runner import TrainResult, select_seed, train_dqn

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def train(cartpole: tuple[Any, Any], small: SimpleNamespace) -> Any:
    config = small.replace(
        small.dqn,
        prioritized=True,
        importance_steps=400,
        normalize_observations=True,
        normalize_rewards=True,
    )

    def run(checkpointer: Any = None, dqn: Any = config, **changes: Any) -> TrainResult:
        settings = small.replace(small.runner, **{"eval_interval": None, **changes})
        return train_dqn(*cartpole, dqn_config=dqn, runner_config=settings, checkpointer=checkpointer)

    return run


@pytest.fixture(scope="module", params=[1, 3])
def straight(request: pytest.FixtureRequest, train: Any, new_memory: type) -> tuple[TrainResult, Any, int]:
    """A run that nothing interrupts, alone or of three seeds, and its checkpointer."""
    memory = new_memory()
    return train(memory, num_seeds=request.param), memory, request.param


def same_bits(one: TrainResult, other: TrainResult) -> bool:
    return bool(eqx.tree_equal((one.state, one.runner), (other.state, other.runner)))


def test_priorities_follow_the_errors_and_new_transitions_get_the_largest(
    straight: tuple[TrainResult, Any, int],
) -> None:
    result, _, seeds = straight
    replay = result.runner.replay if seeds == 1 else select_seed(result.runner.replay, 1)
    priorities = np.asarray(replay.priorities)
    assert priorities.shape == (6, 16)
    assert (priorities > 0).all()
    assert len(np.unique(priorities)) > 20
    assert priorities.max() <= float(replay.largest)
    np.testing.assert_array_equal(np.asarray(result.state.updates), np.full(result.state.updates.shape, 38))


@pytest.mark.parametrize("cut", [112, 304])
def test_a_resumed_run_ends_in_the_same_bits(
    cut: int, straight: tuple[TrainResult, Any, int], train: Any, new_memory: type
) -> None:
    result, memory, seeds = straight
    part = new_memory()
    part.steps = {step: saved for step, saved in memory.steps.items() if step <= cut}
    part.infos, part.stored_metadata = memory.infos, memory.stored_metadata
    resumed = train(part, resume=True, num_seeds=seeds)
    assert resumed.resumed_from == cut
    assert same_bits(resumed, result)


def test_every_leaf_of_a_run_is_strongly_typed(straight: tuple[TrainResult, Any, int]) -> None:
    for leaf in jax.tree.leaves((straight[0].state, straight[0].runner)):
        assert jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.weak_type


def test_what_is_learned_is_not_what_uniform_replay_learns(train: Any, small: SimpleNamespace) -> None:
    prioritized, uniform = train(), train(dqn=small.dqn)
    assert not eqx.tree_equal(prioritized.state.params, uniform.state.params)


def test_a_run_of_uniform_replay_does_not_resume_with_priorities(
    train: Any, small: SimpleNamespace, memory: Any
) -> None:
    train(memory, dqn=small.dqn, total_timesteps=112)
    with pytest.raises(TemplateMismatchError, match=r"prioritized=True \(was False\)"):
        train(memory, resume=True)
