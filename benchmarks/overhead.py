"""What checkpoints cost a training run: time the training thread stands still, and the whole wall clock.

Each repeat trains the same run twice, with and without checkpoints, in turn and in one process, after a
warm-up. Both figures are over the time of training alone, compilation apart. DQN on CartPole is trained by
its preset and by CleanRL's settings, with a checkpoint every 5,000 steps, 100,000 slots of replay and no
evaluations; a preset that is named is trained as it is shipped, evaluations included::

    python benchmarks/overhead.py [PRESET ...] [--repeats 5] [--steps 100000]
"""

import argparse
import dataclasses
import statistics
import tempfile

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.runner import TrainResult
from vibe_store.runner.presets import Preset, get_preset

INTERVAL = 5_000
BUFFER = 100_000
CLEANRL = DQNConfig(
    hidden_sizes=(64, 64), learning_rate=2.5e-4, batch_size=128, learning_starts=1_000, train_interval=10
)
CLEANRL_ENVS = 10


def train(preset: Preset, checkpoint_dir: str | None) -> TrainResult:
    runner_config = dataclasses.replace(preset.runner, checkpoint_dir=checkpoint_dir)
    return preset.train(*preset.make_env(), preset.config, runner_config)


def measure(title: str, preset: Preset, repeats: int) -> None:
    blocked, wall, saves, sizes = [], [], [], []
    for repeat in range(repeats + 1):
        without = train(preset, None)
        with tempfile.TemporaryDirectory() as folder:
            saved = train(preset, folder)
        if repeat == 0:
            continue
        blocked.append(saved.blocked_seconds / saved.train_seconds)
        wall.append(saved.train_seconds / without.train_seconds - 1)
        saves.append(len(saved.saved_steps))
        sizes.append(without.train_seconds)
    print(
        f"{title:26} {saves[0]:3d} saves, {statistics.median(sizes):6.2f} s without them | "
        f"blocked {statistics.median(blocked):6.2%} ({min(blocked):.2%} to {max(blocked):.2%}) | "
        f"wall {statistics.median(wall):+6.2%} ({min(wall):+.2%} to {max(wall):+.2%})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    for name in options.presets:
        measure(name, get_preset(name), options.repeats)
    if options.presets:
        return
    print(f"{options.steps:,} steps, a checkpoint every {INTERVAL:,}, a buffer of {BUFFER:,} transitions")
    preset = get_preset("cartpole_dqn")
    runner_config = dataclasses.replace(
        preset.runner, total_timesteps=options.steps, checkpoint_interval=INTERVAL, eval_interval=None
    )
    for title, config, num_envs in (
        ("shipped", preset.config, runner_config.num_envs),
        ("CleanRL's", CLEANRL, CLEANRL_ENVS),
    ):
        changed = dataclasses.replace(
            preset,
            config=dataclasses.replace(config, buffer_size=BUFFER),
            runner=dataclasses.replace(runner_config, num_envs=num_envs),
        )
        measure(title, changed, options.repeats)


if __name__ == "__main__":
    main()
