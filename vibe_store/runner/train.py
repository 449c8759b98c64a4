"""One training run of any algorithm, from opening its checkpoints to its result."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import lcm
from typing import Any

import jax

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import Checkpointer
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.loop import Callbacks, MetricsWriter, Program, Progress, Trainer, TrainResult
from vibe_store.runner.points import first_multiple
from vibe_store.runner.resume import opened, restore, returns_so_far
from vibe_store.runner.seeds import of_seeds, run_keys
from vibe_store.runner.signals import SignalWatch

__all__ = ["described", "train"]


def train(
    program: Program,
    runner_config: RunnerConfig,
    *,
    checkpointer: Checkpointer | None = None,
    metrics: MetricsWriter | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_best: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train a program until ``runner_config.total_timesteps``; see :func:`~vibe_store.runner.train_dqn`."""
    _check_keep_period(runner_config, program.stride)
    program = of_seeds(program, runner_config.num_seeds)
    key = run_keys(runner_config.seed, runner_config.num_seeds)
    with SignalWatch() as signals, opened(runner_config, checkpointer) as (store, resume_from):
        if store is None or resume_from is None:
            carry, returns = jax.jit(program.init)(key), {}
        else:
            carry, returns = restore(store, resume_from, program, key), returns_so_far(store)
        return Trainer(
            program,
            runner_config,
            carry,
            key,
            checkpointer=store,
            resumed_from=resume_from,
            returns=returns,
            callbacks=Callbacks(metrics=metrics, on_progress=on_progress, on_best=on_best),
            signals=signals,
        ).run()


def described(algorithm: str, envs: VectorEnv, config: Any, runner_config: RunnerConfig) -> Mapping[str, Any]:
    """Return what is stored with each checkpoint of a run.

    Args:
        algorithm: its name.
        envs: the environments.
        config: the algorithm's configuration, a dataclass.
        runner_config: the settings of the run.
    """
    settings = asdict(runner_config)
    # A checkpoint does not depend on where it is, and a place may have credentials.
    del settings["checkpoint_dir"]
    return {
        "algorithm": algorithm,
        "env": envs.name,
        "env_params": envs.plain_params(),
        "spaces": envs.spaces(),
        "algorithm_config": {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
        },
        "runner_config": settings,
        "run": {name: settings[name] for name in ("num_envs", "num_seeds", "seed")},
    }


def _check_keep_period(config: RunnerConfig, stride: int) -> None:
    """Refuse a period of which the steps that are saved are hardly ever multiples."""
    interval, period = config.checkpoint_interval, config.keep_period
    # Where the interval is no multiple of the stride, saves drift past its multiples.
    fitting = stride if interval % stride == 0 else lcm(stride, interval)
    if period is None or stride % period == 0 or period % fitting == 0:
        return
    interval = first_multiple(interval, stride)
    raise InvalidValueError(
        f"keep_period={period} cannot be used with checkpoint_interval={config.checkpoint_interval}: with "
        f"{stride:,} steps at a time, a run saves at multiples of that, which are hardly ever multiples of "
        f"keep_period. Set checkpoint_interval={interval} and keep_period={first_multiple(period, interval)}."
    )
