"""What checkpoints cost a training run: time the training thread stands still, and the whole wall clock.

Each repeat trains the same run twice, with and without checkpoints, in turn and in one process, after a
warm-up. Both figures are over the time of training alone, compilation apart::

    python benchmarks/overhead.py [--repeats 5] [--steps 100000]
"""

import argparse
import dataclasses
import statistics
import tempfile

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.runner import RunnerConfig, TrainResult, train_dqn
from vibe_store.runner.presets import Preset, get_preset

INTERVAL = 5_000
BUFFER = 100_000
CLEANRL = DQNConfig(
    hidden_sizes=(64, 64), learning_rate=2.5e-4, batch_size=128, learning_starts=1_000, train_interval=10
)
CLEANRL_ENVS = 10


def train(preset: Preset, dqn_config: DQNConfig, runner_config: RunnerConfig) -> TrainResult:
    env, env_params = preset.make_env()
    return train_dqn(env, env_params, dqn_config=dqn_config, runner_config=runner_config)


def measure(
    title: str, preset: Preset, dqn_config: DQNConfig, runner_config: RunnerConfig, repeats: int
) -> None:
    dqn_config = dataclasses.replace(dqn_config, buffer_size=BUFFER)
    runner_config = dataclasses.replace(
        runner_config, checkpoint_interval=INTERVAL, eval_interval=None, checkpoint_dir=None
    )
    blocked, wall, saves, sizes = [], [], [], []
    for repeat in range(repeats + 1):
        without = train(preset, dqn_config, runner_config)
        with tempfile.TemporaryDirectory() as folder:
            saving = dataclasses.replace(runner_config, checkpoint_dir=folder)
            saved = train(preset, dqn_config, saving)
        if repeat == 0:
            continue
        blocked.append(saved.blocked_seconds / saved.train_seconds)
        wall.append(saved.train_seconds / without.train_seconds - 1)
        saves.append(len(saved.saved_steps))
        sizes.append(without.train_seconds)
    print(
        f"{title:10} {saves[0]:3d} saves, {statistics.median(sizes):6.2f} s without them | "
        f"blocked {statistics.median(blocked):6.2%} ({min(blocked):.2%} to {max(blocked):.2%}) | "
        f"wall {statistics.median(wall):+6.2%} ({min(wall):+.2%} to {max(wall):+.2%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    preset = get_preset("cartpole_dqn")
    print(f"{options.steps:,} steps, a checkpoint every {INTERVAL:,}, a buffer of {BUFFER:,} transitions")
    shipped = dataclasses.replace(preset.runner, total_timesteps=options.steps)
    measure("shipped", preset, preset.config, shipped, options.repeats)
    cleanrl = dataclasses.replace(shipped, num_envs=CLEANRL_ENVS)
    measure("CleanRL's", preset, CLEANRL, cleanrl, options.repeats)


if __name__ == "__main__":
    main()
