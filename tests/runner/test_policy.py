"""``load_policy``: what acts is loaded from wherever a run is, and nothing else of it."""

import functools
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.algorithms.dqn import DQN
from vibe_store.algorithms.ppo import PPO, PPOConfig
from vibe_store.algorithms.sac import SAC, SACConfig
from vibe_store.checkpoint import CheckpointManager, list_checkpoints, save_checkpoint
from vibe_store.errors import CheckpointNotFoundError, CorruptCheckpointError, InvalidValueError
from vibe_store.run_dir import RunDir
from vibe_store.runner import RunnerConfig, load_policy, select_seed, train_dqn
from vibe_store.runner.dqn import dqn_program
from vibe_store.runner.ppo import ppo_program
from vibe_store.runner.sac import sac_program
from vibe_store.runner.seeds import run_keys
from vibe_store.storage.memory import MemoryStorage

SAC_CONFIG = SACConfig(hidden_sizes=(8,), buffer_size=64, batch_size=8, normalize_observations=True)
PPO_CONFIG = PPOConfig(hidden_sizes=(8,), rollout_length=4)
RUNNER = RunnerConfig(num_envs=4, eval_episodes=1)


def obs_of(env: str, n: int = 5) -> Any:
    return jax.random.normal(jax.random.key(1), (n, 4 if env == "CartPole-v1" else 3))


@pytest.fixture(scope="module")
def agents(small: SimpleNamespace) -> Mapping[str, tuple[Any, Any, Any]]:
    """By name: a program with nothing trained, its algorithm and its configuration."""
    cartpole, pendulum = gymnax.make("CartPole-v1"), gymnax.make("Pendulum-v1")
    return {
        "dqn": (dqn_program(*cartpole, dqn_config=small.dqn, runner_config=RUNNER), DQN, small.dqn),
        "sac": (sac_program(*pendulum, sac_config=SAC_CONFIG, runner_config=RUNNER), SAC, SAC_CONFIG),
        "ppo": (ppo_program(*cartpole, ppo_config=PPO_CONFIG, runner_config=RUNNER), PPO, PPO_CONFIG),
        "ppo continuous": (
            ppo_program(*pendulum, ppo_config=PPO_CONFIG, runner_config=RUNNER),
            PPO,
            PPO_CONFIG,
        ),
    }


@pytest.fixture(scope="module")
def save(agents: Mapping[str, tuple[Any, Any, Any]]) -> Callable[..., list[Any]]:
    """Save a step for each metric, as the runners do; return the states."""

    @functools.cache
    def carry(name: str, seed: int) -> Any:
        return inits[name](jax.random.key(seed))

    def run(directory: Any, name: str = "dqn", metrics: tuple[Any, ...] = (None,)) -> list[Any]:
        with CheckpointManager(directory, async_timeout_secs=None, max_to_keep=9) as manager:
            for index, metric in enumerate(metrics):
                manager.save(
                    10 * (index + 1),
                    carry(name, index).state,
                    items={"runner": carry(name, index).runner},
                    metrics=None if metric is None else {"eval_return": metric},
                    metadata=agents[name][0].metadata,
                )
        return [carry(name, index).state for index in range(len(metrics))]

    inits = {name: jax.jit(program.init) for name, (program, _, _) in agents.items()}
    return run


@pytest.mark.parametrize("name", ["dqn", "sac", "ppo", "ppo continuous"])
def test_a_policy_acts_as_its_whole_state_does_greedily(
    name: str, agents: Mapping[str, Any], save: Callable[..., Any], tmp_path: Path
) -> None:
    (state,) = save(tmp_path, name)
    program, algorithm, config = agents[name]
    policy, obs = load_policy(tmp_path), obs_of(program.metadata["env"])
    expected, _ = algorithm.act(state, obs, config=config, explore=False)
    np.testing.assert_allclose(policy(obs), expected, rtol=1e-6)
    np.testing.assert_allclose(policy(obs[0]), expected[0], rtol=1e-6)
    assert policy(obs).dtype == expected.dtype
    assert (policy.step, policy.metadata["algorithm"]) == (10, name.split()[0])


class Metered(MemoryStorage):
    """Remembers what was read, manifests and metadata apart."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")
        self.keys: set[str] = set()
        self.count = 0

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().read(key, start, end)
        self._note(key, len(data))
        return data

    def get(self, key: str, target: Path) -> None:
        super().get(key, target)
        self._note(key, target.stat().st_size)

    def _note(self, key: str, size: int) -> None:
        if not key.endswith(".json"):
            self.keys.add(key.rpartition("/")[2].partition(".")[0])
            self.count += size


@pytest.mark.parametrize(
    ("name", "n_numbers"),
    [
        ("dqn", 4 * 8 + 8 + 8 * 2 + 2),
        ("sac", 3 * 8 + 8 + 8 * 2 + 2 + 1 + 1 + (1 + 3 + 3)),
        ("ppo", 4 * 8 + 8 + 8 * 2 + 2),
        ("ppo continuous", 3 * 8 + 8 + 8 * 1 + 1 + 1 + 1 + 1),
    ],
)
def test_only_what_acts_is_read(name: str, n_numbers: int, save: Callable[..., Any]) -> None:
    storage = Metered()
    save(storage, name)
    storage.keys, storage.count = set(), 0
    load_policy(storage)
    assert storage.keys == {"state"}
    assert storage.count == 4 * n_numbers


def test_a_policy_can_be_called_inside_of_a_compiled_function(
    save: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path)
    policy, obs = load_policy(tmp_path), obs_of("CartPole-v1")
    scanned = jax.jit(lambda obs: jax.lax.map(policy, obs))(obs)
    np.testing.assert_array_equal(scanned, policy(obs))


def test_observations_of_another_shape_are_refused(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(
        InvalidValueError, match=r"takes observations of shape \(4,\).*given an array of shape"
    ):
        load_policy(tmp_path)(jnp.ones(3))


def test_the_directory_may_be_the_run_the_checkpoints_or_one_step(
    save: Callable[..., Any], tmp_path: Path
) -> None:
    save(tmp_path / "run" / "checkpoints", metrics=(1.0, 2.0, 3.0))
    run = tmp_path / "run"
    steps = [
        load_policy(place).step for place in (run, str(run / "checkpoints"), run / "checkpoints/step_20")
    ]
    assert steps == [30, 30, 20]
    assert load_policy(run, step=10).step == 10
    assert load_policy(f"file://{run}").step == 30


def test_the_best_is_what_best_points_to(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints", metrics=(1.0, 3.0, 2.0))
    RunDir(base_dir=tmp_path, run_id="run").mark_best(10)
    assert load_policy(tmp_path / "run", best=True).step == 10


def test_without_a_mark_the_best_has_the_highest_evaluation(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path, metrics=(1.0, 3.0, float("nan"), None))
    assert load_policy(tmp_path, best=True).step == 20


def test_without_evaluations_there_is_no_best(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="none was saved with the metric 'eval_return'"):
        load_policy(tmp_path, best=True)


def test_a_best_that_is_not_there_is_an_error(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "best").symlink_to("step_77")
    with pytest.raises(CheckpointNotFoundError, match=r"checkpoint of step 77 .*committed are: 10\."):
        load_policy(tmp_path, best=True)


def test_the_best_and_a_step_exclude_each_other(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path, metrics=(1.0,))
    with pytest.raises(InvalidValueError, match="not both"):
        load_policy(tmp_path, best=True, step=10)
    with pytest.raises(InvalidValueError, match="Give the directory around it"):
        load_policy(tmp_path / "step_10", best=True)


@pytest.mark.parametrize("create", [True, False])
def test_a_directory_without_checkpoints_is_an_error(create: bool, tmp_path: Path) -> None:
    if create:
        (tmp_path / "run").mkdir()
    with pytest.raises(
        CheckpointNotFoundError, match=r"There is no (committed checkpoint in|directory) .*run"
    ):
        load_policy(tmp_path / "run")


def test_a_checkpoint_of_something_else_is_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"w": jnp.ones(3)}, step=1)
    with pytest.raises(InvalidValueError, match="does not say that it is of one of the algorithms dqn, ppo"):
        load_policy(tmp_path)


def test_a_checkpoint_that_does_not_say_its_spaces_is_an_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"w": jnp.ones(3)}, step=1, metadata={"algorithm": "dqn"})
    with pytest.raises(InvalidValueError, match=r"not know \(KeyError: 'spaces'\).*template of DQN\.init"):
        load_policy(tmp_path)


def test_damage_in_what_acts_is_noticed_and_elsewhere_is_not(
    save: Callable[..., Any], tmp_path: Path
) -> None:
    (state,) = save(tmp_path)

    def damage(array: Any) -> None:
        file = tmp_path / "step_10" / "state.eqx"
        data = bytearray(file.read_bytes())
        data[data.rindex(np.asarray(array).tobytes())] ^= 1
        file.write_bytes(data)

    damage(jax.random.key_data(state.key))
    load_policy(tmp_path)
    # The target network is a copy of the online one, so what comes first is the online one.
    file = tmp_path / "step_10" / "state.eqx"
    weight = np.asarray(state.params.layers[0].weight).tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(weight)] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        load_policy(tmp_path)


@pytest.fixture(scope="module")
def three_seeds(small: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of a run with three seeds, and its state."""
    directory = tmp_path_factory.mktemp("seeds")
    settings = small.replace(RUNNER, num_seeds=3)
    program = dqn_program(*gymnax.make("CartPole-v1"), dqn_config=small.dqn, runner_config=settings)
    init = jax.jit(jax.vmap(lambda key: DQN.init(key, (4,), 2, config=small.dqn)))
    states = init(run_keys(0, 3))
    save_checkpoint(directory, states, step=10, metadata=program.metadata)
    return directory, states


def test_one_of_several_seeds_is_selected(three_seeds: tuple[Path, Any], small: SimpleNamespace) -> None:
    directory, states = three_seeds
    obs, policies = obs_of("CartPole-v1", 50), [load_policy(directory, seed=index) for index in range(3)]
    actions = [np.asarray(policy(obs)) for policy in policies]
    for index in range(3):
        alone = select_seed(states, index)
        np.testing.assert_array_equal(actions[index], DQN.act(alone, obs, config=small.dqn, explore=False)[0])
    assert not np.array_equal(actions[0], actions[1])


def test_of_several_seeds_one_must_be_named(three_seeds: tuple[Path, Any]) -> None:
    with pytest.raises(
        InvalidValueError, match="holds 3 seeds: say whose policy to load, from seed=0 to seed=2"
    ):
        load_policy(three_seeds[0])
    with pytest.raises(InvalidValueError, match="There are 3 seeds, counted from 0, so there is none"):
        load_policy(three_seeds[0], seed=3)


def test_a_single_seed_takes_no_choice(save: Callable[..., Any], tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(InvalidValueError, match="holds a single seed, so seed=0 selects nothing"):
        load_policy(tmp_path, seed=0)


def test_what_a_run_saved_is_what_plays(
    cartpole: tuple[Any, Any], small: SimpleNamespace, tmp_path: Path
) -> None:
    settings = small.replace(small.runner, checkpoint_dir=str(tmp_path), eval_interval=None)
    result = train_dqn(*cartpole, dqn_config=small.dqn, runner_config=settings)
    policy, obs = load_policy(tmp_path), obs_of("CartPole-v1")
    assert policy.step == result.step == max(entry.step for entry in list_checkpoints(tmp_path))
    expected, _ = DQN.act(result.state, obs, config=small.dqn, explore=False)
    np.testing.assert_array_equal(policy(obs), expected)
