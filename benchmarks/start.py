"""How long a run takes from the start of its process to its first steps, new and resumed, beside rejax.

Each start is a process of its own that trains DQN on CartPole with CleanRL's settings: once with nothing
compiled before, and again with what JAX's persistent compilation cache then holds. Ours tells of the first
chunk of steps; rejax tells of nothing before its end, so it is asked for its shortest run. Needs
``pip install "vibe-store[rl]" rejax``. Run it with ``python benchmarks/start.py [--repeats N]``.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

_OURS = """
import sys
import gymnax
from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.runner import RunnerConfig, train_dqn

def tell(progress):
    print("trained", flush=True)

config = DQNConfig(hidden_sizes=(64, 64), buffer_size=10_000, batch_size=128, learning_starts=1_000)
runner = RunnerConfig(
    total_timesteps=int(sys.argv[2]), num_envs=10, checkpoint_dir=sys.argv[1], eval_interval=None, resume=True
)
train_dqn(*gymnax.make("CartPole-v1"), dqn_config=config, runner_config=runner, on_progress=tell)
"""

_REJAX = """
import jax
from rejax_peer import rejax_algorithm
from vibe_store.algorithms.dqn import DQNConfig

config = DQNConfig(hidden_sizes=(64, 64), buffer_size=10_000, batch_size=128, learning_starts=10)
algorithm = rejax_algorithm("CartPole-v1", config, num_envs=10, steps=10)
algorithm = algorithm.replace(eval_callback=lambda *_: ())
jax.block_until_ready(jax.jit(algorithm.train)(jax.random.key(0)))
print("trained", flush=True)
"""


def seconds_to_first_steps(code: str, *args: str, environment: Mapping[str, str]) -> float:
    """Start a process, and wait until it says that it has trained; it is then let run to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    taken = time.perf_counter() - started
    process.communicate()
    assert line == "trained\n"
    assert process.returncode == 0
    return taken


def one_round(folder: str) -> dict[str, float]:
    """Start each kind of run once with an empty compilation cache, and once with a full one."""
    taken = {}
    for cache in ("empty", "full"):
        for name in ("ours, new", "ours, resumed", "rejax"):
            environment = {
                "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled-{name}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            if name == "rejax":
                taken[f"{name}, {cache} cache"] = seconds_to_first_steps(_REJAX, environment=environment)
                continue
            run = f"{folder}/{cache}"
            total = "5000" if name == "ours, new" else "10000"
            taken[f"{name}, {cache} cache"] = seconds_to_first_steps(
                _OURS, run, total, environment=environment
            )
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rounds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(one_round(folder))
    for name in rounds[0]:
        values = [each[name] for each in rounds]
        print(f"{name:28} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
