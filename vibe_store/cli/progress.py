"""What training shows while it runs: one live line on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from vibe_store.runner.loop import Progress

__all__ = ["ProgressDisplay", "progress_line", "readable_size"]


class ProgressDisplay:
    """Shows how far a run is, each time it is called.

    On a terminal one line is kept up to date, and whatever else is printed appears above it. Elsewhere a line
    is printed at the first call on or past each multiple of ``interval`` steps, and at the end.

    Args:
        console: where to.
        interval: steps between two plain lines.
    """

    def __init__(self, console: Console, *, interval: int) -> None:
        self._console = console
        self._interval = interval
        self._printed = 0
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __call__(self, progress: "Progress") -> None:
        if self._live is not None:
            text = Text(progress_line(progress), no_wrap=True, overflow="ellipsis")
            self._live.update(text, refresh=True)
        elif progress.step // self._interval > self._printed or progress.step >= progress.total:
            self._printed = progress.step // self._interval
            self._console.print(progress_line(progress), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self._live.update(Text("compiling ..."), refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del kind, error, traceback
        if self._live is not None:
            self._live.stop()


def progress_line(progress: "Progress") -> str:
    """Return one line that says how far a run is; what is not known yet is left out."""
    parts = [
        f"step {progress.step:,} of {progress.total:,} ({100 * progress.step // progress.total} %)",
        f"{progress.steps_per_second:,.0f} steps/s",
    ]
    if progress.recent_return is not None:
        parts.append(f"return {progress.recent_return:.1f}")
    if progress.eval_return is not None:
        parts.append(f"evaluation {progress.eval_return:.1f}")
    blocked = f"blocked {1000 * progress.blocked_seconds:.1f} ms"
    under_way = progress.checkpoint_step != progress.committed_step
    if progress.committed_step is not None and progress.committed_bytes is not None:
        size = readable_size(progress.committed_bytes)
        details = size if under_way else f"{blocked}, {size}"
        parts.append(f"saved at {progress.committed_step:,} ({details})")
    if progress.checkpoint_step is not None and under_way:
        parts.append(f"saving {progress.checkpoint_step:,} ({blocked})")
    return "  ".join(parts)


def readable_size(size: int) -> str:
    """Return a number of bytes in the unit that suits it: ``"812 B"``, ``"3.4 MiB"``."""
    if size < 1024:
        return f"{size} B"
    exponent = min((size.bit_length() - 1) // 10, len(_UNITS))
    return f"{size / 1024**exponent:.1f} {_UNITS[exponent - 1]}"


_UNITS = ("KiB", "MiB", "GiB", "TiB")
