"""What a preset learns as shipped: the mean return of 100 greedy episodes at its last step, over 5 seeds.

Needs ``pip install "vibe-store[rl]"``. Run it with ``python benchmarks/learning.py [PRESET] [--seeds N]``.
"""

import argparse
import statistics
from dataclasses import replace

from vibe_store.runner.presets import get_preset, preset_names

EVAL_EPISODES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="cartpole_dqn", choices=preset_names())
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()

    preset = get_preset(args.preset)
    env, env_params = preset.make_env()
    print(f"{preset.name}: {preset.env_id}, {preset.runner.total_timesteps:,} steps")
    print(f"{'seed':>4}  {'return':>7}  {'best':>7}  {'compile':>8}  {'training':>9}")
    returns = []
    for seed in range(args.seeds):
        # How often and on how many episodes a run is evaluated changes nothing of what it learns.
        config = replace(preset.runner, seed=seed, eval_episodes=EVAL_EPISODES)
        result = preset.train(env, env_params, preset.config, config)
        evaluations = [line["eval_return"] for line in result.history if "eval_return" in line]
        returns.append(evaluations[-1])
        print(
            f"{seed:>4}  {returns[-1]:>7.1f}  {max(evaluations):>7.1f}  "
            f"{result.compile_seconds:>6.1f} s  {result.train_seconds:>7.1f} s",
            flush=True,
        )
    print(f"median return: {statistics.median(returns):.1f}")


if __name__ == "__main__":
    main()
