"""A retention policy: the checkpoints that were better than every one before them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import CheckpointInfo


@dataclass(frozen=True)
class Records:
    """Keeps each checkpoint that set a record in a metric: how a run learned, in steps to look at.

    Args:
        metric: the name of the metric. A checkpoint without it, or with NaN, sets no record.
        mode: whether the highest ("max") or the lowest ("min") is best.
    """

    metric: str = "eval_return"
    mode: Literal["min", "max"] = "max"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise InvalidValueError(f'mode is "min" or "max", whichever is best; got {self.mode!r}.')

    def __call__(self, checkpoints: Sequence[CheckpointInfo], /) -> frozenset[int]:
        """Return the steps to delete, out of ``checkpoints``, which are sorted by step."""
        sign = 1 if self.mode == "max" else -1
        record, deleted = float("-inf"), set[int]()
        for info in checkpoints:
            score = sign * (info.metrics or {}).get(self.metric, float("nan"))
            if score > record:
                record = score
            elif info.step is not None:
                deleted.add(info.step)
        return frozenset(deleted)
