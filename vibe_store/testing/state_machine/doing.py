"""What is done to a directory: by whom, with what, and what gets in its way."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from vibe_store.checkpoint import CheckpointManager
from vibe_store.interfaces import StorageBackend
from vibe_store.testing.faulty_storage import Call, Fault, FaultyStorage
from vibe_store.testing.state_machine.model import POLICIES, Config, Loss


class Crash(BaseException):
    """The process of a writer ends: nothing of it comes after."""


class Trouble:
    """The fault that one operation meets: at its n-th call to the storage, or its n-th deletion."""

    def __init__(
        self, kind: str, at: int, how: Literal["before", "after", "cut"], method: str | None = None
    ) -> None:
        self.kind, self.how, self.method, self.struck = kind, how, method, False
        self.left = at if method is None else at % 4

    def faults(self) -> tuple[Fault, ...]:
        def error() -> BaseException:
            return Crash() if self.kind == "crash" else OSError("injected fault")

        if self.how == "cut":  # only a deletion may be cut in half: everything else is whole or not at all
            return (
                Fault(lambda call: call.method == "delete" and self._now(call), "cut", error),
                Fault(lambda call: call.method != "delete" and self._now(call), "before", error),
                Fault(self._dead, "before", error),
            )
        return Fault(self._now, self.how, error), Fault(self._dead, "before", error)

    def _now(self, call: Call) -> bool:
        if self.struck or self.kind == "none" or self.method not in {None, call.method}:
            return False
        self.left -= 1
        self.struck = self.left < 0
        return self.struck

    def _dead(self, _: Call) -> bool:
        return self.kind == "crash" and self.struck

    def __repr__(self) -> str:
        return f"Trouble({self.kind!r}, {self.how!r}, {self.method!r}, struck={self.struck})"


class Between:
    """Does something once, just before the n-th call of an operation on another storage."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.left, self.act, self.done = at, act, False

    def faults(self) -> tuple[Fault, ...]:
        return (Fault(self._now),)

    def _now(self, _: Call) -> bool:
        self.left -= 1
        if self.left < 0 and not self.done:
            self.done = True
            self.act()
        return False


class Writer:
    """One manager, and the storage as its process sees it."""

    def __init__(self, inner: StorageBackend, config: Config) -> None:
        self.config, self.storage = config, FaultyStorage(inner)
        self.restored: int | None = None
        self.begun = False
        self.manager = CheckpointManager(self.storage, **options(config))


def options(config: Config) -> dict[str, Any]:
    return {
        "retention": POLICIES[config.keep],
        "keep_period": config.period,
        "save_interval_steps": config.interval,
        "async_timeout_secs": 60.0 if config.background else None,
        "best_fn": None if config.mode is None else lambda metrics: metrics["loss"],
        "best_mode": config.mode or "min",
    }


def content(seed: int, loss: Loss) -> dict[str, Any]:
    """The arguments of one save, apart from its step; the seed decides what goes with it."""
    numbers = {"other": 1.0} if loss == "missing" else {"loss": loss}
    return {
        "pytree": {"k": seed, "w": np.full(3, seed, np.float32)},
        "items": {"aux": np.full(2, seed)} if seed % 3 == 0 else None,
        "metadata": {"seed": seed} if seed % 4 == 0 else None,
        "metrics": None if loss is None else numbers,
    }


def save_with(
    manager: CheckpointManager, step: int, seed: int, loss: Loss, *, force: bool, expect: bool = True
) -> None:
    """Save, and spoil what was passed as soon as the manager has it."""
    arguments = content(seed, loss)
    assert manager.save(step, force=force, **arguments) is expect
    arguments["pytree"]["w"][:] = -1
    arguments["pytree"]["k"] = -1


WHO = st.sampled_from([0, 1])
STEPS = st.integers(0, 7)
LOSSES = st.sampled_from([None, "missing", math.nan, -math.inf, 1.0, 2.0, 2.0, 3.0])
CONFIGS = st.builds(
    Config,
    keep=st.sampled_from(sorted(POLICIES)),
    period=st.sampled_from([None, 3]),
    mode=st.sampled_from([None, "min", "max"]),
    interval=st.sampled_from([1, 1, 2]),
    background=st.booleans(),
)
TROUBLES = st.builds(
    Trouble,
    st.sampled_from(["none", "none", "fail", "fail", "crash"]),
    st.integers(0, 24),
    st.sampled_from(["before", "after", "cut"]),
    st.sampled_from([None, None, "delete"]),
)
