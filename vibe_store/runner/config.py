"""RunnerConfig: how long a run trains, on how many environments, and what it saves on the way."""

import os
from dataclasses import dataclass
from math import isfinite

from vibe_store.algorithms.settings import check_kinds
from vibe_store.errors import InvalidValueError
from vibe_store.run_dir import Place

__all__ = ["RunnerConfig"]


@dataclass(frozen=True)
class RunnerConfig:
    """Settings of one training run. Steps are environment steps, summed over all environments."""

    total_timesteps: int = 100_000
    """Step at which training ends, counted from the very first one; a resumed run goes on to it."""
    num_envs: int = 8
    """Environments that are stepped together."""
    seed: int = 0
    """Seed of everything random in the run."""
    num_seeds: int = 1
    """Runs that are trained at once, on the seeds from seed on; steps and episodes are those of each."""
    checkpoint_dir: str | os.PathLike[str] | Place | None = None
    """Where checkpoints are stored; None saves none, or from the command line into the run's own folder."""
    checkpoint_interval: int = 5_000
    """Steps between two checkpoints."""
    max_checkpoints: int = 5
    """Most recent checkpoints that are kept, unless there is a retention policy."""
    keep_period: int | None = None
    """Keep every checkpoint whose step is a multiple of this for ever; None keeps the most recent only. A run
    refuses one of which the steps that it saves, multiples of what it takes at a time, hardly ever are."""
    save_replay_buffer: bool = True
    """Store the replay buffer in checkpoints; without it a resume is not exact, and fills a new one first."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one."""
    overwrite: bool = False
    """Delete the checkpoints that exist and start anew."""
    eval_interval: int | None = 5_000
    """Steps between two evaluations; None never evaluates."""
    eval_episodes: int = 20
    """Greedy episodes in each evaluation."""
    target_return: float | None = None
    """Stop at the first evaluation whose mean return is this or more; None trains to the end."""
    log_interval: int = 1_000
    """Steps between two lines of metrics."""
    preemption_deadline_secs: float = 25.0
    """Seconds that Ctrl-C or SIGTERM waits for the last checkpoint."""
    async_timeout_secs: int | None = 7_200
    """Seconds that a checkpoint may take in the background; None saves in the training thread."""
    serializer: str = "eqx"
    """Serializer of new checkpoints, by name and options: orbax, or orbax:compress=true."""
    retention: str | None = None
    """Retention policy, by name and options, as every_steps:interval=10000; None keeps the most recent."""

    def __post_init__(self) -> None:
        check_kinds(self)
        if isinstance(self.checkpoint_dir, os.PathLike):
            object.__setattr__(self, "checkpoint_dir", os.fspath(self.checkpoint_dir))
        if self.checkpoint_dir == "":
            raise InvalidValueError(
                "checkpoint_dir='' cannot be used: it must be a folder ('.' is the current one) or a URL, or "
                "None."
            )
        for name in (
            "total_timesteps",
            "num_envs",
            "num_seeds",
            "checkpoint_interval",
            "max_checkpoints",
            "eval_episodes",
            "log_interval",
        ):
            _check_int(name, getattr(self, name), least=1)
        for name in ("keep_period", "eval_interval", "async_timeout_secs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), least=1, otherwise=", or None")
        _check_int("seed", self.seed, least=0)
        if self.seed + self.num_seeds > 2**32:
            raise InvalidValueError(
                f"seed={self.seed} cannot be used with num_seeds={self.num_seeds}: the last seed must be at "
                f"most {2**32 - 1}, as seeds have 32 bits."
            )
        _check_name("serializer", self.serializer)
        if self.retention is not None:
            _check_name("retention", self.retention, otherwise=", or None")
        if self.total_timesteps + self.num_envs >= 2**31:
            raise InvalidValueError(
                f"total_timesteps={self.total_timesteps} cannot be used: steps are counted in 32 bits, "
                f"up to {2**31 - 1:,}."
            )
        if self.target_return is not None and not isfinite(self.target_return):
            raise InvalidValueError(
                f"target_return={self.target_return!r} cannot be used: it must be a number, or None."
            )
        if self.target_return is not None and self.eval_interval is None:
            raise InvalidValueError(
                f"target_return={self.target_return!r} cannot be reached with eval_interval=None: set an "
                "interval, or no target."
            )
        if not (isfinite(self.preemption_deadline_secs) and self.preemption_deadline_secs > 0):
            raise InvalidValueError(
                f"preemption_deadline_secs={self.preemption_deadline_secs!r} cannot be used: "
                "it must be a number above 0."
            )
        if self.resume and self.overwrite:
            raise InvalidValueError(
                "resume=True and overwrite=True contradict each other: resume goes on from the checkpoints "
                "that exist, overwrite deletes them. Set one of them to False."
            )


def _check_name(name: str, value: object, *, otherwise: str = "") -> None:
    if not isinstance(value, str) or not value:
        raise InvalidValueError(
            f"{name}={value!r} cannot be used: it must be a name, as text, with options as "
            f"'name:option=value,option=value'{otherwise}."
        )


def _check_int(name: str, value: object, *, least: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidValueError(
            f"{name}={value!r} cannot be used: it must be a whole number, at least {least}{otherwise}."
        )
