"""The model: what a directory should hold, and what a manager gives up."""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from vibe_store.interfaces import RetentionPolicy
from vibe_store.retention import best_n, every_steps, keep_any, latest

BAD = -1
"""What a step holds that does not verify."""

Loss = float | Literal["missing"] | None


@dataclass(frozen=True)
class Config:
    """How a manager is opened."""

    keep: str = "all"
    period: int | None = None
    mode: Literal["min", "max"] | None = None
    interval: int = 1
    background: bool = False


@dataclass
class Model:
    """What is stored: the save that each step holds, by a number that no other save has."""

    held: dict[int, int] = field(default_factory=dict)
    losses: dict[int, Loss] = field(default_factory=dict)
    pins: set[int] = field(default_factory=set)
    best: int | None = None
    damaged: dict[int, Literal["file", "manifest"]] = field(default_factory=dict)
    scarred: set[int] = field(default_factory=set)
    """Folders that hold or held a manifest that cannot be read, so nobody knows what in them is garbage."""

    def shown(self) -> dict[int, float]:
        """The loss of each step whose manifest can be read; NaN for one without."""
        losses = {step: self.losses[seed] for step, seed in self.held.items()}
        return {
            step: loss if isinstance(loss, float) else math.nan
            for step, loss in losses.items()
            if self.damaged.get(step) != "manifest"
        }

    def best_of(self, mode: Literal["min", "max"] | None, count: int = 1) -> list[int]:
        sign = {"min": 1, "max": -1, None: 0}[mode]
        ranked = sorted((sign * loss, step) for step, loss in self.shown().items() if not math.isnan(loss))
        return [step for _, step in ranked[:count]] if mode else []

    def given_up(self, config: Config, just_saved: int, restored: int | None) -> set[int]:
        """What a manager deletes after it has saved a step."""
        shown = set(self.shown())
        kept = {max(shown), just_saved, self.best} | self.pins | set(self.best_of(config.mode))
        if restored is not None and just_saved <= restored:
            kept.add(restored)
        if config.period is not None:
            kept |= {step for step in shown if step % config.period == 0}
        return shown - kept - KEPT[config.keep](self)

    def forget(self, steps: Set[int]) -> None:
        for step in steps:
            del self.held[step]
            self.damaged.pop(step, None)
            self.pins.discard(step)


def _hostile(step: int) -> bool:
    return step * 7 % 5 > 1


def _gives_up_at_random(checkpoints: Any, /) -> frozenset[int]:
    return frozenset(info.step for info in checkpoints if _hostile(info.step))


def _gives_up_all(checkpoints: Any, /) -> frozenset[int]:
    return frozenset(info.step for info in checkpoints)


POLICIES: dict[str, RetentionPolicy] = {
    "all": lambda _: frozenset(),
    "nothing": _gives_up_all,
    "at random": _gives_up_at_random,
    "two": latest(2),
    "some": keep_any(latest(1), every_steps(4), best_n(2, "loss", mode="max")),
}
KEPT: dict[str, Callable[[Model], set[int]]] = {
    "all": lambda model: set(model.held),
    "nothing": lambda _: set(),
    "at random": lambda model: {step for step in model.held if not _hostile(step)},
    "two": lambda model: set(sorted(model.shown())[-2:]),
    "some": lambda model: {0, 4, 8, max(model.shown()), *model.best_of("max", 2)},
}
