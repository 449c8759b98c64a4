"""A training run in a process of its own, which prints where it is and can be told to die or hang in a save.

Its only argument is a JSON object: ``directory``, ``total``, ``interval``, ``fault_at_call`` and
``fault``, which is "before" or "after" (it dies before or after that call) or "hang" (it stops there).
"""

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import gymnax

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.checkpoint import initialize_checkpoint_dir
from vibe_store.errors import VibeStoreWarning
from vibe_store.runner import RunnerConfig, train_dqn
from vibe_store.storage.local import LocalStorage


class FaultyStorage(LocalStorage):
    """A local storage that kills its process, or hangs, at its n-th call that changes something."""

    def __init__(self, url: str, fault_at_call: int | None, fault: str) -> None:
        super().__init__(url)
        self._left, self._fault = fault_at_call, fault

    def write(self, key: str, data: bytes, *, overwrite: bool = True, durable: bool = True) -> None:
        self._about_to()
        super().write(key, data, overwrite=overwrite, durable=durable)
        self._did()

    def put(self, source: Path, key: str, *, move: bool = False, durable: bool = True) -> None:
        self._about_to()
        super().put(source, key, move=move, durable=durable)
        self._did()

    def delete(self, keys: Iterable[str], *, durable: bool = True) -> None:
        self._about_to()
        super().delete(keys, durable=durable)
        self._did()

    def _about_to(self) -> None:
        if self._left is not None:
            self._left -= 1
        if self._left == 0 and self._fault == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._left == 0 and self._fault == "hang":
            print("hanging", flush=True)
            time.sleep(300)

    def _did(self) -> None:
        if self._left == 0 and self._fault == "after":
            os.kill(os.getpid(), signal.SIGKILL)


def main(directory: str, total: int, interval: int, fault_at_call: int | None, fault: str) -> None:
    warnings.simplefilter("error", VibeStoreWarning)
    env, env_params = gymnax.make("CartPole-v1")
    storage = FaultyStorage(directory, fault_at_call, fault)
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


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
