"""What training shows while it runs."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vibe_store.cli.progress import ProgressDisplay, progress_line, readable_size
from vibe_store.runner import Progress

EARLY = Progress(
    step=500,
    total=100_000,
    steps_per_second=12345.6,
    recent_return=None,
    eval_return=None,
    checkpoint_step=None,
    committed_step=None,
    committed_bytes=None,
    blocked_seconds=0.0,
)
LATER = replace(
    EARLY,
    step=40_000,
    recent_return=182.44,
    eval_return=500.0,
    checkpoint_step=40_000,
    committed_step=40_000,
    committed_bytes=3 * 2**20,
    blocked_seconds=0.0012,
)


def test_the_line_leaves_out_what_is_not_known_yet() -> None:
    assert progress_line(EARLY) == "step 500 of 100,000 (0 %)  12,346 steps/s"


def test_the_line_says_how_far_how_fast_how_well_and_what_was_saved() -> None:
    assert progress_line(LATER) == (
        "step 40,000 of 100,000 (40 %)  12,346 steps/s  return 182.4  evaluation 500.0  "
        "saved at 40,000 (blocked 1.2 ms, 3.0 MiB)"
    )


def test_a_save_that_is_still_under_way_is_not_said_to_be_saved() -> None:
    first = replace(LATER, committed_step=None, committed_bytes=None)
    assert progress_line(first).endswith("evaluation 500.0  saving 40,000 (blocked 1.2 ms)")
    second = replace(LATER, committed_step=20_000)
    assert progress_line(second).endswith("saved at 20,000 (3.0 MiB)  saving 40,000 (blocked 1.2 ms)")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_500_000, "1.4 MiB"),
        (2**20, "1.0 MiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable_size(size) == text


def test_without_a_terminal_there_is_one_plain_line_for_each_interval_and_one_at_the_end() -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, width=20), interval=1000) as display:
        for step in (500, 1000, 1500, 2700, 2900, 3100):
            display(replace(EARLY, step=step, total=3100))
    steps = [line.split()[1] for line in file.getvalue().splitlines()]
    assert steps == ["1,000", "2,700", "3,100"]


def test_on_a_terminal_one_line_is_kept_up_to_date() -> None:
    file = io.StringIO()
    with ProgressDisplay(Console(file=file, width=60, force_terminal=True), interval=1000) as display:
        display(EARLY)
        display(LATER)
    text = file.getvalue()
    assert "compiling ..." in text
    assert "step 500 of 100,000" in text
    assert "step 40,000 of 100,000" in text
    assert text.count("\n") == 1
