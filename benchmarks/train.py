"""Training speed beside rejax: DQN on CartPole with CleanRL's settings, compilation apart.

Needs ``pip install "vibe-store[rl]" rejax``. Repeats are interleaved, so that whatever else the machine does
falls on both sides alike. Run it with ``python benchmarks/train.py [--steps N] [--repeats N]``.
"""

import argparse
import statistics
import time
from importlib.metadata import version

import gymnax
import jax
import rejax
from gymnax.wrappers.compat import LegacyStepAPIWrapper

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.runner import RunnerConfig, train_dqn

ENV, ENV_PARAMS = gymnax.make("CartPole-v1")
NUM_ENVS = 10


class CopyableLegacyEnv(LegacyStepAPIWrapper):
    """rejax copies its environment, and gymnax's wrapper looks attributes up for ever while it is copied."""

    def __deepcopy__(self, memo: dict[int, object]) -> "CopyableLegacyEnv":
        return self


CONFIG = DQNConfig(
    hidden_sizes=(64, 64),
    learning_rate=2.5e-4,
    gamma=0.99,
    buffer_size=10_000,
    batch_size=128,
    learning_starts=1_000,
    train_interval=10,
    target_update_interval=50,
    double=True,
    loss="mse",
    max_grad_norm=None,
)


def ours(steps: int, seed: int) -> tuple[float, float]:
    """Return the seconds of compilation and of training."""
    config = RunnerConfig(
        total_timesteps=steps, num_envs=NUM_ENVS, seed=seed, eval_interval=None, log_interval=steps
    )
    result = train_dqn(ENV, ENV_PARAMS, dqn_config=CONFIG, runner_config=config)
    return result.compile_seconds, result.train_seconds


def theirs(steps: int, seed: int) -> tuple[float, float]:
    """Return the seconds of compilation and of training."""
    algorithm = (
        rejax.get_algo("dqn")
        .create(
            env=CopyableLegacyEnv(ENV),
            env_params=ENV_PARAMS,
            agent_kwargs={"activation": "relu"},
            num_envs=NUM_ENVS,
            learning_rate=CONFIG.learning_rate,
            gamma=CONFIG.gamma,
            buffer_size=CONFIG.buffer_size,
            batch_size=CONFIG.batch_size,
            fill_buffer=CONFIG.learning_starts,
            num_epochs=1,
            target_update_freq=CONFIG.target_update_interval * CONFIG.train_interval,
            total_timesteps=steps,
            eval_freq=steps,
            skip_initial_evaluation=True,
        )
        .replace(eval_callback=lambda *_: ())
    )
    key = jax.random.key(seed)
    started = time.perf_counter()
    train = jax.jit(algorithm.train).lower(key).compile()
    compiled = time.perf_counter()
    jax.block_until_ready(train(key))
    return compiled - started, time.perf_counter() - compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300_000, help="environment steps in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    print(f"DQN on CartPole-v1, {args.steps:,} steps, {NUM_ENVS} environments, one update per 10 steps")
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, rejax {version('rejax')}\n")
    print(f"{'repeat':>6}  {'vibe_store':>12}  {'rejax':>12}  {'ratio':>6}   (environment steps per second)")
    speeds: list[tuple[float, float]] = []
    compile_seconds: list[tuple[float, float]] = []
    for repeat in range(args.repeats):
        (our_compile, our_train), (their_compile, their_train) = (
            ours(args.steps, repeat),
            theirs(args.steps, repeat),
        )
        speeds.append((args.steps / our_train, args.steps / their_train))
        compile_seconds.append((our_compile, their_compile))
        our_speed, their_speed = speeds[-1]
        print(f"{repeat:>6}  {our_speed:>12,.0f}  {their_speed:>12,.0f}  {our_speed / their_speed:>6.2f}")
    our_speed, their_speed = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratio = statistics.median(mine / other for mine, other in speeds)
    print(f"{'median':>6}  {our_speed:>12,.0f}  {their_speed:>12,.0f}  {ratio:>6.2f}")
    our_compile, their_compile = (statistics.median(column) for column in zip(*compile_seconds, strict=True))
    print(f"compilation: vibe_store {our_compile:.1f} s, rejax {their_compile:.1f} s")


if __name__ == "__main__":
    main()
