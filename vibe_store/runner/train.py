"""One training run of any algorithm, from opening its checkpoints to its result."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import jax

from vibe_store.interfaces import Checkpointer
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.envs import VectorEnv
from vibe_store.runner.loop import Callbacks, MetricsWriter, Program, Progress, Trainer, TrainResult
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
