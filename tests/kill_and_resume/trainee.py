"""A training run for a process of its own, which says where it is and can die or hang in a save."""

import importlib
import itertools
import os
import signal
import warnings
from collections.abc import Mapping
from typing import Any

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.checkpoint import initialize_checkpoint_dir
from vibe_store.errors import VibeStoreWarning
from vibe_store.registry import open_storage
from vibe_store.runner import RunnerConfig, train_dqn
from vibe_store.testing import Call, Fault, FaultyStorage

# What gymnax takes longest to import. It computes with JAX as it is imported, so a fork comes before it.
importlib.import_module("seaborn")


def _fault(at_call: int | None, fault: str) -> Fault:
    calls = itertools.count(1)

    def now(call: Call) -> bool:
        if call.method not in {"write", "put", "delete"} or next(calls) != at_call:
            return False
        if fault == "hang":
            print("hanging", flush=True)
        return True

    def die() -> BaseException:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    if fault == "hang":
        return Fault(now, "delay", seconds=300.0)
    return Fault(now, "before" if fault == "before" else "after", die)


def main(
    directory: str,
    options: Mapping[str, Any],
    total: int,
    interval: int,
    fault_at_call: int | None,
    fault: str,
) -> None:
    """Train.

    Args:
        directory: where the checkpoints are.
        options: of the storage there.
        total: how many steps.
        interval: steps from one checkpoint to the next.
        fault_at_call: at which of its calls that change something it meets its fault; None for none.
        fault: "before" or "after" (it dies before or after that call), or "hang" (it stops there).
    """
    import gymnax

    warnings.simplefilter("error", VibeStoreWarning)
    env, env_params = gymnax.make("CartPole-v1")
    storage = FaultyStorage(open_storage(directory, **options), _fault(fault_at_call, fault))
    checkpointer, _ = initialize_checkpoint_dir(storage, resume=True, max_to_keep=3)
    print("resumed", checkpointer.latest_step() or 0, flush=True)
    with checkpointer:
        result = train_dqn(
            env,
            env_params,
            dqn_config=DQNConfig(
                hidden_sizes=(32, 32), buffer_size=5_000, batch_size=32, learning_starts=500
            ),
            runner_config=RunnerConfig(
                total_timesteps=total,
                num_envs=8,
                checkpoint_interval=interval,
                eval_interval=2 * interval,
                eval_episodes=2,
                log_interval=500,
                resume=True,
            ),
            checkpointer=checkpointer,
            on_progress=lambda progress: print("at", progress.step, flush=True),
        )
    print("done", result.step, flush=True)
