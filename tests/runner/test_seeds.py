"""Several seeds at once: one state, one checkpoint, and each seed as if it had been alone."""

from types import SimpleNamespace
from typing import Any

import equinox as eqx
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.errors import InvalidValueError, TemplateMismatchError
from vibe_store.runner import TrainResult, select_seed, train_dqn, train_ppo

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def train(cartpole: tuple[Any, Any], small: SimpleNamespace) -> Any:
    def run(checkpointer: Any = None, **changes: Any) -> TrainResult:
        settings = small.replace(small.runner, **{"num_seeds": 3, **changes})
        return train_dqn(*cartpole, dqn_config=small.dqn, runner_config=settings, checkpointer=checkpointer)

    return run


@pytest.fixture(scope="module")
def straight(train: Any, new_memory: type) -> tuple[TrainResult, Any]:
    memory = new_memory()
    return train(memory), memory


def same_bits(one: TrainResult, other: TrainResult) -> bool:
    return bool(eqx.tree_equal((one.state, one.runner), (other.state, other.runner)))


def test_every_array_has_the_seeds_in_front(straight: tuple[TrainResult, Any]) -> None:
    result, _ = straight
    assert {leaf.shape[0] for leaf in jax.tree.leaves((result.state, result.runner))} == {3}
    np.testing.assert_array_equal(result.state.step, [480, 480, 480])
    np.testing.assert_array_equal(result.state.updates, [480 // 12 - 32 // 12] * 3)


@pytest.mark.parametrize("index", [0, 2])
def test_each_seed_is_the_run_that_it_is_alone(
    index: int, train: Any, straight: tuple[TrainResult, Any], small: SimpleNamespace
) -> None:
    alone = train(num_seeds=1, seed=small.runner.seed + index)
    mine = select_seed((straight[0].state, straight[0].runner), index)
    assert jax.tree.structure(mine) == jax.tree.structure((alone.state, alone.runner))
    # Many at once may be summed in another order than one, so the same numbers differ in their last bits.
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves((alone.state, alone.runner)), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            assert eqx.tree_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_resumed_batch_ends_in_the_same_bits(
    train: Any, straight: tuple[TrainResult, Any], new_memory: type
) -> None:
    part = new_memory()
    part.steps = {step: saved for step, saved in straight[1].steps.items() if step <= 208}
    part.infos, part.stored_metadata = straight[1].infos, straight[1].stored_metadata
    resumed = train(part, resume=True)
    assert resumed.resumed_from == 208
    assert same_bits(resumed, straight[0])


def test_metrics_are_means_over_the_seeds_with_each_return_beside(
    straight: tuple[TrainResult, Any],
) -> None:
    last = straight[0].history[-1]
    assert len(last["eval_return_by_seed"]) == 3
    assert last["eval_return"] == pytest.approx(np.mean(last["eval_return_by_seed"]))
    assert last["return"] == pytest.approx(np.mean(last["return_by_seed"]))
    assert last["eval_return"] == straight[0].eval_return
    assert straight[1].info(480).metrics == {"eval_return": last["eval_return"]}


def test_another_number_of_seeds_does_not_resume(train: Any, straight: tuple[TrainResult, Any]) -> None:
    with pytest.raises(TemplateMismatchError, match=r"num_seeds=2 \(was 3\)"):
        train(straight[1], resume=True, num_seeds=2)


def test_ppo_runs_many_seeds_too(cartpole: tuple[Any, Any], small: SimpleNamespace, memory: Any) -> None:
    config = PPOConfig(hidden_sizes=(8,), rollout_length=5, n_epochs=2)

    def run(**changes: Any) -> TrainResult:
        settings = small.replace(small.runner, num_seeds=2, num_envs=8, **changes)
        return train_ppo(*cartpole, ppo_config=config, runner_config=settings, checkpointer=memory)

    run(total_timesteps=200)
    resumed = run(resume=True)
    assert resumed.resumed_from == 200
    assert not np.array_equal(*resumed.state.params.critic.layers[0].weight)


def test_there_is_no_seed_beyond_the_last(straight: tuple[TrainResult, Any]) -> None:
    with pytest.raises(InvalidValueError, match="There are 3 seeds, counted from 0, so there is none"):
        select_seed(straight[0].state, 3)


def test_a_single_run_has_no_seeds_to_select() -> None:
    env, params = gymnax.make("CartPole-v1")
    obs, _ = env.reset(jax.random.key(0), params)
    with pytest.raises(InvalidValueError, match="no state of many seeds"):
        select_seed({"obs": obs, "step": jnp.zeros(())}, 0)
