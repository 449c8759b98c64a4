"""Training speed beside rejax: DQN and PPO on CartPole, SAC on Pendulum, compilation apart.

DQN has CleanRL's settings, and a loop in the style of PureJaxRL on a buffer of flashbax beside it, too. The
networks, batches, buffers and numbers of updates are the same everywhere. ``--seeds 16`` trains so many at
once; steps are then those of all of them together. Repeats are interleaved, so that whatever else the machine
does falls on all alike. Needs ``pip install "vibe-store[rl]" rejax flashbax``. Run it with
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
from scan_peer import scan_dqn

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


def peers(case: Case, steps: int) -> dict[str, Callable[[Any], Any]]:
    """Return by name what trains the same from a PRNG key."""
    (config,) = case.config.values()
    algorithm = rejax_algorithm(case.env_id, config, num_envs=case.num_envs, steps=steps)
    found = {"rejax": algorithm.replace(eval_callback=lambda *_: ()).train}
    if isinstance(config, DQNConfig):
        found["scan on flashbax"] = scan_dqn(case.env_id, config, num_envs=case.num_envs, steps=steps)
    return found


def timed(train: Callable[[Any], Any], seed: int, seeds: int) -> tuple[float, float]:
    """Return the seconds of compilation and of training."""
    key = jax.random.key(seed)
    if seeds > 1:
        key, train = jax.random.split(key, seeds), jax.vmap(train)
    started = time.perf_counter()
    compiled = jax.jit(train).lower(key).compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(key))
    return ready - started, time.perf_counter() - ready


def compare(name: str, case: Case, steps: int, repeats: int, seeds: int) -> None:
    print(f"\n{name} on {case.env_id}: {steps:,} steps, {case.num_envs} environments, {seeds} seed(s)")
    taken: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(repeats):
        taken.setdefault("vibe_store", []).append(ours(case, steps, repeat, seeds))
        for peer, train in peers(case, steps).items():
            taken.setdefault(peer, []).append(timed(train, repeat, seeds))
    for who, seconds in taken.items():
        compiling, training = (statistics.median(column) for column in zip(*seconds, strict=True))
        ratios = [other[1] / mine[1] for mine, other in zip(taken["vibe_store"], seconds, strict=True)]
        print(
            f"{who:>18}  {seeds * steps / training:>10,.0f} steps/s, {compiling:5.1f} s of compilation; "
            f"vibe_store is {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


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
