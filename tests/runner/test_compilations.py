"""How often a run compiles: each program once, whatever the lengths of its chunks, new or resumed."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import gymnax
import jax
import pytest

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.algorithms.sac import SACConfig
from vibe_store.checkpoint import CheckpointManager
from vibe_store.runner import RunnerConfig, train_dqn, train_ppo, train_sac

pytestmark = pytest.mark.proof

RUNS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "dqn": (
        train_dqn,
        "CartPole-v1",
        {"dqn_config": DQNConfig(hidden_sizes=(8,), buffer_size=96, batch_size=8, learning_starts=48)},
    ),
    "sac": (
        train_sac,
        "Pendulum-v1",
        {"sac_config": SACConfig(hidden_sizes=(8,), buffer_size=96, batch_size=8, train_interval=8)},
    ),
    "ppo": (
        train_ppo,
        "CartPole-v1",
        {"ppo_config": PPOConfig(hidden_sizes=(8,), rollout_length=4, n_epochs=1, normalize_rewards=True)},
    ),
}


def compilations(caplog: pytest.LogCaptureFixture, action: Callable[[], object]) -> Counter[tuple[str, str]]:
    """How often each program, by name and the shapes that it takes, was compiled during an action."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles(True):
        action()
    found = (
        re.match(
            r"Compiling (\S+) with global shapes and types (.*?)\. Argument mapping", record.getMessage()
        )
        for record in caplog.records
    )
    return Counter((match[1], match[2]) for match in found if match)


@pytest.mark.parametrize(("algorithm", "num_seeds"), [("dqn", 1), ("sac", 1), ("ppo", 3)])
def test_a_run_and_its_resume_compile_each_program_once(
    algorithm: str, num_seeds: int, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train, env_id, config = RUNS[algorithm]
    env = gymnax.make(env_id)
    stops: list[int] = []

    def run(total: int) -> None:
        settings = RunnerConfig(
            total_timesteps=total,
            num_envs=8,
            num_seeds=num_seeds,
            checkpoint_interval=96,
            eval_interval=160,
            eval_episodes=2,
            log_interval=64,
            resume=True,
        )
        with CheckpointManager(tmp_path) as store:
            train(
                *env,
                **config,
                runner_config=settings,
                checkpointer=store,
                on_progress=lambda progress: stops.append(progress.step),
            )

    first = compilations(caplog, lambda: run(256))
    resumed = compilations(caplog, lambda: run(512))
    lengths = {later - earlier for earlier, later in itertools.pairwise(stops)}
    assert len(lengths) > 1
    for counted in (first, resumed):
        assert counted
        assert {program: n for program, n in counted.items() if n > 1} == {}
        by_name = Counter(name for name, _ in counted)
        assert by_name["jit(advance)"] == by_name["jit(evaluate_state)"] == 1
