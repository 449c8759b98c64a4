"""Training speed beside rejax: DQN and PPO on CartPole, SAC on Pendulum, compilation apart.

DQN has CleanRL's settings; the networks, batches, buffers and numbers of updates are the same on both sides.
``--seeds 16`` trains so many at once on both sides; steps are then those of all of them together. Repeats are
interleaved, so that whatever else the machine does falls on both sides alike. Needs
``pip install "vibe-store[rl]" rejax``. Run it with
``python benchmarks/train.py [--algorithm dqn sac ppo] [--seeds N] [--steps N] [--repeats N]``.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import gymnax
import jax
from rejax_peer import rejax_algorithm

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.algorithms.ppo import PPOConfig
from vibe_store.algorithms.sac import SACConfig
from vibe_store.runner import RunnerConfig, TrainResult, train_dqn, train_ppo, train_sac


@dataclass(frozen=True)
class Case:
    """One algorithm; rejax gets the settings of its configuration.

    Attributes:
        env_id: gymnax's name of the environment.
        num_envs: how many there are.
        steps: environment steps in each repeat.
        train: our trainer.
        config: our configuration, by the name of its argument.
    """

    env_id: str
    num_envs: int
    steps: int
    train: Callable[..., TrainResult]
    config: Mapping[str, Any]


CASES = {
    "dqn": Case(
        env_id="CartPole-v1",
        num_envs=10,
        steps=300_000,
        train=train_dqn,
        config={
            "dqn_config": DQNConfig(
                hidden_sizes=(64, 64),
                learning_rate=2.5e-4,
                buffer_size=10_000,
                batch_size=128,
                learning_starts=1_000,
                train_interval=10,
                target_update_interval=50,
            )
        },
    ),
    "sac": Case(
        env_id="Pendulum-v1",
        num_envs=1,
        steps=20_000,
        train=train_sac,
        config={
            "sac_config": SACConfig(
                hidden_sizes=(64, 64),
                actor_learning_rate=1e-3,
                tau=0.01,
                buffer_size=10_000,
                batch_size=256,
                learning_starts=1_000,
            )
        },
    ),
    "ppo": Case(
        env_id="CartPole-v1",
        num_envs=8,
        steps=400_000,
        train=train_ppo,
        config={
            "ppo_config": PPOConfig(
                hidden_sizes=(64, 64), learning_rate=2.5e-3, rollout_length=128, n_epochs=4, n_minibatches=4
            )
        },
    ),
}


def ours(case: Case, steps: int, seed: int, seeds: int) -> tuple[float, float]:
    """Return the seconds of compilation and of training."""
    config = RunnerConfig(
        total_timesteps=steps,
        num_envs=case.num_envs,
        num_seeds=seeds,
        seed=seed,
        eval_interval=None,
        log_interval=steps,
    )
    result = case.train(*gymnax.make(case.env_id), runner_config=config, **case.config)
    return result.compile_seconds, result.train_seconds


def theirs(case: Case, steps: int, seed: int, seeds: int) -> tuple[float, float]:
    """Return the seconds of compilation and of training."""
    (config,) = case.config.values()
    algorithm = rejax_algorithm(case.env_id, config, num_envs=case.num_envs, steps=steps)
    algorithm = algorithm.replace(eval_callback=lambda *_: ())
    key = jax.random.key(seed)
    train: Callable[..., Any] = algorithm.train
    if seeds > 1:
        key, train = jax.random.split(key, seeds), jax.vmap(train)
    started = time.perf_counter()
    compiled = jax.jit(train).lower(key).compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(key))
    return ready - started, time.perf_counter() - ready


def compare(name: str, case: Case, steps: int, repeats: int, seeds: int) -> None:
    print(f"\n{name} on {case.env_id}: {steps:,} steps, {case.num_envs} environments, {seeds} seed(s)")
    print(f"{'repeat':>6}  {'vibe_store':>12}  {'rejax':>12}  {'ratio':>6}   (environment steps per second)")
    speeds: list[tuple[float, float]] = []
    compiling: list[tuple[float, float]] = []
    for repeat in range(repeats):
        mine, other = ours(case, steps, repeat, seeds), theirs(case, steps, repeat, seeds)
        compiling.append((mine[0], other[0]))
        speeds.append((seeds * steps / mine[1], seeds * steps / other[1]))
        print(f"{repeat:>6}  {speeds[-1][0]:>12,.0f}  {speeds[-1][1]:>12,.0f}", end="  ")
        print(f"{speeds[-1][0] / speeds[-1][1]:>6.2f}", flush=True)
    my_speed, their_speed = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(mine / other for mine, other in speeds)
    print(f"{'median':>6}  {my_speed:>12,.0f}  {their_speed:>12,.0f}  {ratio:>6.2f}")
    mine, other = (statistics.median(column) for column in zip(*compiling, strict=True))
    print(f"compilation: vibe_store {mine:.1f} s, rejax {other:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="environment steps of each seed in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, rejax {version('rejax')}")
    for name in args.algorithm:
        compare(name, CASES[name], args.steps or CASES[name].steps, args.repeats, args.seeds)


if __name__ == "__main__":
    main()
