"""What presets learn as shipped, over 5 seeds: the mean return of 100 greedy episodes at the last step.

With ``--rejax`` the same environment, network and hyperparameters are trained by rejax too, which evaluates
128 episodes (of DQN with one random action in 200, of SAC and PPO with actions drawn from the policy). Needs
``pip install "vibe-store[rl]"``, and rejax for that. Run it with
``python benchmarks/learning.py [PRESET ...] [--seeds N] [--rejax]``.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from vibe_store.runner.presets import Preset, get_preset, preset_names

EVAL_EPISODES = 100


def ours(preset: Preset, seed: int) -> float:
    # How often and on how many episodes a run is evaluated changes nothing of what it learns.
    steps = preset.runner.total_timesteps
    settings = replace(preset.runner, seed=seed, eval_episodes=EVAL_EPISODES, eval_interval=steps)
    result = preset.train(*preset.make_env(), preset.config, settings)
    assert result.eval_return is not None
    return result.eval_return


def theirs(preset: Preset, seed: int) -> float:
    from rejax_peer import rejax_algorithm

    algorithm: Any = rejax_algorithm(
        preset.env_id,
        preset.config,
        num_envs=preset.runner.num_envs,
        steps=preset.runner.total_timesteps,
    )
    _, (_, returns) = jax.jit(algorithm.train)(jax.random.key(seed))
    return float(np.mean(returns[-1]))


def show(name: str, preset: Preset, returns: Sequence[float]) -> None:
    print(
        f"{name:34} {preset.runner.total_timesteps:>9,}  {statistics.median(returns):>8.1f}  "
        f"{min(returns):>8.1f} to {max(returns):.1f}   ({', '.join(f'{value:.0f}' for value in returns)})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", default=["cartpole_dqn"], choices=preset_names())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rejax", action="store_true")
    args = parser.parse_args()

    print(f"{'preset':34} {'steps':>9}  {'median':>8}  {'spread':>8}")
    for name in args.presets:
        preset = get_preset(name)
        show(name, preset, [ours(preset, seed) for seed in range(args.seeds)])
        if args.rejax:
            show(f"{name}, rejax", preset, [theirs(preset, seed) for seed in range(args.seeds)])


if __name__ == "__main__":
    main()
