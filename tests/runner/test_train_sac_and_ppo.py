"""What runs of SAC and PPO do, save and resume to; test_train_dqn.py holds what no algorithm changes."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.environments.classic_control.pendulum import Pendulum

from vibe_store.algorithms.ppo import PPO, PPOConfig
from vibe_store.algorithms.sac import SAC, SACConfig
from vibe_store.checkpoint import load_checkpoint
from vibe_store.errors import InvalidValueError, TemplateMismatchError
from vibe_store.runner import RunnerConfig, TrainResult, train_dqn, train_ppo, train_sac

SAC_CONFIG = SACConfig(hidden_sizes=(8,), buffer_size=96, batch_size=8, learning_starts=48, train_interval=12)
PPO_CONFIG = PPOConfig(hidden_sizes=(8,), rollout_length=5, n_epochs=2, n_minibatches=4, anneal_steps=400)
RUNNER = RunnerConfig(
    total_timesteps=320,
    num_envs=8,
    checkpoint_interval=100,
    eval_interval=160,
    eval_episodes=2,
    log_interval=50,
)

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module")
def pendulum() -> tuple[Any, Any]:
    env, params = gymnax.make("Pendulum-v1")
    return env, params.replace(max_steps_in_episode=30)


@pytest.fixture(scope="module")
def trainers(pendulum: tuple[Any, Any], cartpole: tuple[Any, Any]) -> dict[str, Callable[..., TrainResult]]:
    """Runs by name, each of which takes changes of the settings and a checkpointer."""

    def trainer(train: Callable[..., TrainResult], env: tuple[Any, Any], **config: Any) -> Any:
        def run(checkpointer: Any = None, **changes: Any) -> TrainResult:
            settings = SimpleNamespace(**{**vars(RUNNER), **changes})
            return train(
                *env, **config, runner_config=RunnerConfig(**vars(settings)), checkpointer=checkpointer
            )

        return run

    return {
        "sac": trainer(train_sac, pendulum, sac_config=SAC_CONFIG),
        "sac normalized": trainer(
            train_sac,
            pendulum,
            sac_config=replace(SAC_CONFIG, normalize_observations=True, normalize_rewards=True),
        ),
        "ppo": trainer(train_ppo, cartpole, ppo_config=PPO_CONFIG),
        "ppo continuous": trainer(train_ppo, pendulum, ppo_config=PPO_CONFIG),
        "ppo normalized": trainer(
            train_ppo,
            pendulum,
            ppo_config=replace(PPO_CONFIG, normalize_observations=True, normalize_rewards=True),
        ),
    }


@pytest.fixture(scope="module", params=["sac normalized", "ppo", "ppo continuous", "ppo normalized"])
def run(request: pytest.FixtureRequest, trainers: dict[str, Any]) -> Any:
    return trainers[request.param]


@pytest.fixture(scope="module")
def straight(run: Any, new_memory: type) -> tuple[TrainResult, Any]:
    """A run that nothing interrupts, and its checkpointer."""
    memory = new_memory()
    return run(memory), memory


def same_bits(one: TrainResult, other: TrainResult) -> bool:
    return bool(eqx.tree_equal((one.state, one.runner), (other.state, other.runner)))


def test_a_run_trains_to_its_end_and_learns_on_the_way(straight: tuple[TrainResult, Any]) -> None:
    result, memory = straight
    assert result.step == int(result.state.step) == 320
    assert memory.all_steps() == [step for step in (104, 120, 200, 304, 320) if step in memory.all_steps()]
    assert memory.all_steps()[-1] == 320
    learning = {name: float(value) for name, value in result.runner.learning.items()}
    assert all(np.isfinite(value) for value in learning.values())
    assert learning.keys() <= result.history[-1].keys()


@pytest.mark.parametrize("cut", [0, -2])
def test_a_resumed_run_ends_in_the_same_bits(
    cut: int, run: Any, straight: tuple[TrainResult, Any], new_memory: type
) -> None:
    result, memory = straight
    part = new_memory()
    last = memory.all_steps()[cut]
    part.steps = {step: saved for step, saved in memory.steps.items() if step <= last}
    part.infos, part.stored_metadata = memory.infos, memory.stored_metadata
    resumed = run(part, resume=True)
    assert resumed.resumed_from == last
    assert same_bits(resumed, result)
    assert resumed.eval_return == result.eval_return


def test_how_often_a_run_is_looked_at_changes_no_bit(run: Any, straight: tuple[TrainResult, Any]) -> None:
    looked_at = run(eval_interval=80, log_interval=8, checkpoint_interval=40, eval_episodes=3)
    assert same_bits(looked_at, straight[0])


def test_every_leaf_of_a_run_is_strongly_typed(straight: tuple[TrainResult, Any]) -> None:
    for leaf in jax.tree.leaves((straight[0].state, straight[0].runner)):
        assert isinstance(leaf, jax.Array)
        assert jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.weak_type


def test_what_is_known_of_observations_and_rewards_grows_with_each_round(trainers: dict[str, Any]) -> None:
    for algorithm in ("ppo normalized", "sac normalized"):
        result = trainers[algorithm](total_timesteps=80)
        assert int(result.state.obs_stats.seen) == int(result.runner.rewards.stats.seen) == 80
        assert float(jnp.max(result.state.obs_stats.variance)) > 1


class Louder(Pendulum):
    """Earns 1,024 times as much."""

    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        obs, state, reward, *rest = super().step(key, state, action, params)
        return obs, state, 1024 * reward, *rest


def test_with_rewards_scaled_their_size_does_not_matter(pendulum: tuple[Any, Any]) -> None:
    config = replace(SAC_CONFIG, normalize_rewards=True)
    settings = replace(RUNNER, total_timesteps=96, eval_interval=None)
    plain, loud = (
        train_sac(env, pendulum[1], sac_config=config, runner_config=settings)
        for env in (pendulum[0], Louder())
    )
    assert int(plain.state.updates) > 0
    assert float(loud.runner.rewards.stats.deviation()) > 1_000
    for one, other in zip(
        jax.tree.leaves(plain.state.critics), jax.tree.leaves(loud.state.critics), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_round_of_ppo_is_never_cut(trainers: dict[str, Any], memory: Any) -> None:
    result = trainers["ppo"](memory, total_timesteps=90, checkpoint_interval=50, log_interval=30)
    assert memory.all_steps() == [80, 120]
    assert [line["step"] for line in result.history if "kl" in line] == [40, 80, 120]


def test_sac_fills_in_the_bounds_of_the_actions_and_its_state_loads_for_inference(
    trainers: dict[str, Any], tmp_path: Any
) -> None:
    directory = str(tmp_path / "run")
    result = trainers["sac"](checkpoint_dir=directory, total_timesteps=64)
    np.testing.assert_array_equal(result.state.action_scale, [2])
    skeleton = SAC.init(jax.random.PRNGKey(0), obs_shape=(3,), n_actions=1, config=SAC_CONFIG)
    state = load_checkpoint(directory, like=skeleton, step=64)
    assert eqx.tree_equal(state, result.state)
    action, _ = SAC.act(state, jnp.ones(3), config=SAC_CONFIG, explore=False)
    assert action.shape == (1,)


def test_a_state_of_ppo_loads_for_inference(trainers: dict[str, Any], tmp_path: Any) -> None:
    directory = str(tmp_path / "run")
    result = trainers["ppo"](checkpoint_dir=directory, total_timesteps=40)
    skeleton = PPO.init(jax.random.PRNGKey(0), obs_shape=(4,), n_actions=2, config=PPO_CONFIG)
    state = load_checkpoint(directory, like=skeleton, step=40)
    assert eqx.tree_equal(state, result.state)


@pytest.mark.parametrize(
    ("train", "config", "of"),
    [(train_sac, {"sac_config": SAC_CONFIG}, "SAC"), (train_dqn, {"dqn_config": None}, "DQN")],
)
def test_actions_that_an_algorithm_cannot_take_are_refused_before_anything_is_compiled(
    train: Any, config: Any, of: str, cartpole: tuple[Any, Any], pendulum: tuple[Any, Any]
) -> None:
    env = cartpole if of == "SAC" else pendulum
    with pytest.raises(InvalidValueError, match=f"^{of} .*the action space of"):
        train(*env, **config, runner_config=RUNNER)


def test_actions_without_bounds_are_refused() -> None:
    class Endless(Pendulum):
        def action_space(self, params: Any = None) -> spaces.Box:
            del params
            return spaces.Box(-jnp.inf, jnp.inf, (1,), jnp.float32)

    env = Endless()
    with pytest.raises(InvalidValueError, match="Wrap the environment so that its action space has finite"):
        train_sac(env, env.default_params, sac_config=SAC_CONFIG, runner_config=RUNNER)


def test_a_rollout_that_cannot_be_split_is_refused_by_its_fields(cartpole: tuple[Any, Any]) -> None:
    config = PPOConfig(rollout_length=5, n_minibatches=3)
    with pytest.raises(
        InvalidValueError, match=r"n_minibatches=3 .* 40 steps that rollout_length=5 and num_envs=8 give"
    ):
        train_ppo(*cartpole, ppo_config=config, runner_config=RUNNER)


def test_a_run_whose_last_rollout_would_outgrow_the_counter_of_steps_is_refused(
    trainers: dict[str, Any],
) -> None:
    with pytest.raises(InvalidValueError, match="with 40 steps at a time: steps are counted in 32 bits"):
        trainers["ppo"](total_timesteps=2**31 - 20)


def test_a_resume_that_does_not_fit_names_the_field_behind_it(
    trainers: dict[str, Any], memory: Any, pendulum: tuple[Any, Any]
) -> None:
    trainers["sac"](memory, total_timesteps=64)
    wider = SACConfig(**{**vars(SAC_CONFIG), "hidden_sizes": (9,)})
    settings = RunnerConfig(**{**vars(RUNNER), "resume": True})
    with pytest.raises(TemplateMismatchError, match=r"hidden_sizes=\[9\] \(was \[8\]\)"):
        train_sac(*pendulum, sac_config=wider, runner_config=settings, checkpointer=memory)


def test_a_checkpoint_of_another_algorithm_is_refused(
    trainers: dict[str, Any], memory: Any, pendulum: tuple[Any, Any]
) -> None:
    trainers["ppo continuous"](memory, total_timesteps=40)
    settings = RunnerConfig(**{**vars(RUNNER), "resume": True})
    with pytest.raises(InvalidValueError, match="is of algorithm 'ppo', so a run of algorithm 'sac'"):
        train_sac(*pendulum, sac_config=SAC_CONFIG, runner_config=settings, checkpointer=memory)


def test_ppo_refuses_minibatches_whose_scaled_advantages_are_all_zero(cartpole: tuple[Any, Any]) -> None:
    config = PPOConfig(rollout_length=5, n_minibatches=40)
    with pytest.raises(InvalidValueError, match="n_minibatches=40 cannot be used with normalize_advantages"):
        train_ppo(*cartpole, ppo_config=config, runner_config=RUNNER)


def test_a_period_of_which_no_saved_step_is_a_multiple_is_refused_with_what_fits(
    trainers: dict[str, Any], memory: Any
) -> None:
    with pytest.raises(
        InvalidValueError, match=r"keep_period=100 .* Set checkpoint_interval=120 and keep_period=120\."
    ):
        trainers["ppo"](memory, keep_period=100)
    assert memory.all_steps() == []


def test_ppo_refuses_to_resume_at_a_step_at_which_it_never_stops(
    cartpole: tuple[Any, Any], trainers: dict[str, Any], memory: Any
) -> None:
    trainers["ppo"](memory, total_timesteps=120)
    with pytest.raises(
        InvalidValueError,
        match=r"Step 120 .* num_envs=8, and 9 steps .*multiples of 72 only.*rollout_length=9 \(was 5\)",
    ):
        train_ppo(
            *cartpole,
            ppo_config=replace(PPO_CONFIG, rollout_length=9),
            runner_config=replace(RUNNER, resume=True),
            checkpointer=memory,
        )
