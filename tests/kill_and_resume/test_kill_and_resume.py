"""Real processes, really killed: a run that died and was resumed ends in the bits of one that did not."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vibe_store.checkpoint import list_checkpoints, load_manifest, verify_checkpoint
from vibe_store.checkpoint.layout import is_local
from vibe_store.checkpoint.step_index import latest_step
from vibe_store.interfaces import StorageBackend
from vibe_store.registry import open_storage

pytestmark = pytest.mark.proof

TOTAL, INTERVAL = 20_000, 1_000
TRAINEE = Path(__file__).with_name("trainee.py")


@dataclass(frozen=True)
class Home:
    """Where a run has its checkpoints."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> StorageBackend:
        return open_storage(self.url, **self.options)


_ALONE = pytest.mark.xdist_group("kill_and_resume")
_LOCAL = pytest.param("local", marks=_ALONE)
_S3, _GCS = (
    pytest.param(kind, marks=pytest.mark.xdist_group(f"kill_and_resume_{kind}")) for kind in ("s3", "gcs")
)


@pytest.fixture(params=[_LOCAL, _S3, _GCS])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    if request.param == "local":
        return Home(str(tmp_path))
    bucket = request.getfixturevalue(request.param)
    return Home(f"{bucket.url}/{uuid.uuid4().hex}", bucket.storage_options)


@pytest.fixture
def local(tmp_path: Path) -> Home:
    return Home(str(tmp_path))


@dataclass
class Life:
    """What one process said of itself."""

    process: subprocess.Popen[str]
    resumed_from: int = -1
    reached: int = 0
    done: bool = False
    lines: list[str] = field(default_factory=list)

    def hear(self, line: str) -> None:
        self.lines.append(line)
        if match := re.fullmatch(r"(resumed|at|done) (\d+)\n", line):
            what, step = match[1], int(match[2])
            self.reached = max(self.reached, step)
            self.done = self.done or what == "done"
            if what == "resumed":
                self.resumed_from = step

    def hear_until(self, holds: Callable[["Life"], bool]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.hear(line)
            if holds(self):
                return

    def end(self) -> int:
        self.hear_until(lambda _: False)
        return self.process.wait()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of every life; compiled programs are shared, so that each is up sooner."""
    cache = tmp_path_factory.mktemp("compiled")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@contextmanager
def life(
    home: Home,
    environment: Mapping[str, str],
    *,
    total: int = TOTAL,
    fault_at_call: int | None = None,
    fault: str = "before",
) -> Iterator[Life]:
    settings = {
        "directory": home.url,
        "options": home.options,
        "total": total,
        "interval": INTERVAL,
        "fault_at_call": fault_at_call,
        "fault": fault,
    }
    process = subprocess.Popen(
        [sys.executable, str(TRAINEE), json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        yield Life(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]
) -> Mapping[str, bytes]:
    straight_home = Home(str(tmp_path_factory.mktemp("uninterrupted")))
    with life(straight_home, environment) as straight:
        assert straight.end() == 0, straight.lines
    return final_files(straight_home)


def final_files(home: Home) -> dict[str, bytes]:
    """The bytes of the last step's items. They hold every leaf, its path and type, and nothing else."""
    storage = home.open()
    return {
        name: storage.read(f"step_{TOTAL}/{file.key}")
        for item in load_manifest(storage, step=TOTAL).items.values()
        for name, file in item.files.items()
    }


def committed(home: Home) -> set[int]:
    found = list_checkpoints(home.open())
    assert {each.status for each in found} <= {"committed"}
    return {each.step for each in found}


def wait_for_commit_past(step: int, home: Home, process: subprocess.Popen[str]) -> None:
    storage = home.open()
    while process.poll() is None and (latest_step(storage) or 0) <= step:
        time.sleep(0.001 if is_local(storage) else 0.02)


def test_a_run_killed_again_and_again_ends_in_the_same_bits(
    home: Home, environment: Mapping[str, str], uninterrupted: Mapping[str, bytes]
) -> None:
    lives: list[Life] = []
    # Inside a save, at calls that are each another phase of it (the list of pending keys or the mark, the
    # files, the manifest, the deletion of an older step and of its files), and shortly after a commit.
    inside = [(8, "before"), (13, "after"), (16, "before"), (19, "after"), (22, "before")]
    delays = [0.0, 0.003, 0.01, 0.03, 0.1]
    if not is_local(home.open()):  # ten kills on the disk; in a bucket, where each life is long, two
        inside, delays = [(16, "before")], [0.03]
    for (call, fault), delay in zip(inside, delays, strict=True):
        with life(home, environment, fault_at_call=call, fault=fault) as dying:
            assert dying.end() == -signal.SIGKILL, dying.lines
        lives.append(dying)
        with life(home, environment) as killed:
            killed.hear_until(lambda life: life.resumed_from >= 0)
            wait_for_commit_past(killed.resumed_from, home, killed.process)
            time.sleep(delay)
            killed.process.send_signal(signal.SIGKILL)
            assert killed.end() == -signal.SIGKILL, killed.lines
        lives.append(killed)
        assert verify_checkpoint(home.open()) == []
    with life(home, environment) as last:
        assert last.end() == 0, last.lines
    lives.append(last)

    assert lives[0].resumed_from == 0
    assert all(after_kill.resumed_from > 0 for after_kill in lives[1:])
    assert all(later.resumed_from >= earlier.resumed_from for earlier, later in itertools.pairwise(lives))
    executed = sum(max(each.reached - each.resumed_from, 0) for each in lives)
    # A save to a bucket may be on its way until the next one is due.
    lost_at_most = INTERVAL if is_local(home.open()) else 2 * INTERVAL
    assert executed <= TOTAL + (len(lives) - 1) * lost_at_most
    assert final_files(home) == uninterrupted


@pytest.mark.parametrize("home", [_LOCAL, _GCS], indirect=True)
def test_a_run_stopped_by_sigterm_and_ctrl_c_saves_at_once_and_ends_in_the_same_bits(
    home: Home, environment: Mapping[str, str], uninterrupted: Mapping[str, bytes]
) -> None:
    stopped_at = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with life(home, environment) as stopped:
            stopped.hear_until(lambda life: life.reached > stopped_at)  # noqa: B023 - called in this round only
            stopped.process.send_signal(number)
            assert stopped.end() == status, stopped.lines
        assert stopped.resumed_from == stopped_at
        stopped_at = max(committed(home))
        assert stopped_at >= stopped.reached > stopped.resumed_from
        assert any("resume" in line and f"{stopped_at:,}" in line for line in stopped.lines), stopped.lines
    with life(home, environment) as last:
        assert last.end() == 0, last.lines
    assert last.resumed_from == stopped_at
    assert final_files(home) == uninterrupted


@_ALONE
def test_a_second_signal_ends_a_run_whose_save_hangs_and_leaves_what_was_committed(
    local: Home, environment: Mapping[str, str]
) -> None:
    with life(local, environment, fault_at_call=15, fault="hang") as stopped:
        stopped.hear_until(lambda life: life.lines[-1] == "hanging\n")
        stopped.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            stopped.process.wait(0.5)
        stopped.process.send_signal(signal.SIGINT)
        assert stopped.process.wait(20) == -signal.SIGINT, stopped.lines
    assert committed(local)
    assert verify_checkpoint(local.open()) == []


@_ALONE
def test_a_finished_run_that_is_extended_ends_in_the_same_bits(
    local: Home, environment: Mapping[str, str], uninterrupted: Mapping[str, bytes]
) -> None:
    with life(local, environment, total=TOTAL // 2 + 200) as first:
        assert first.end() == 0, first.lines
    with life(local, environment) as extended:
        assert extended.end() == 0, extended.lines
    assert extended.resumed_from == TOTAL // 2 + 200
    assert final_files(local) == uninterrupted
