"""Real processes, really killed: a run that died and was resumed ends in the bits of one that did not."""

import functools
import itertools
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
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


class Life:
    """One process that trains, and what it says of itself."""

    def __init__(self, child: Any) -> None:
        self._child = child
        self.resumed_from, self.reached, self.done = -1, 0, False

    @property
    def lines(self) -> list[str]:
        return self._child.output.splitlines()

    def hear(self) -> None:
        """Take note of all that it has said so far."""
        for what, step in re.findall(r"^(resumed|at|done) (\d+)\n", self._child.output, re.MULTILINE):
            self.reached = max(self.reached, int(step))
            self.done = self.done or what == "done"
            if what == "resumed":
                self.resumed_from = int(step)

    def hear_until(self, holds: Callable[["Life"], bool]) -> None:
        while not holds(self):
            assert self._child.alive, self.lines
            time.sleep(0.005)
            self.hear()

    def kill(self, number: int) -> None:
        os.kill(self._child.pid, number)

    def wait_for_commit_past(self, step: int, home: Home) -> None:
        storage = home.open()
        while self._child.alive and (latest_step(storage) or 0) <= step:
            time.sleep(0.001 if is_local(storage) else 0.02)

    def end(self, timeout: float = 300.0) -> int:
        status: int = self._child.wait(timeout)
        self.hear()
        return status


Begin = Callable[..., Life]


@pytest.fixture(scope="module")
def _server(fork_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiled programs are shared, so that each life is up sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.delenv("XLA_FLAGS", raising=False)  # optimized, as it is for users
        return fork_server(TRAINEE, "eqx")


def _begin(
    server: Any, home: Home, *, total: int = TOTAL, fault_at_call: int | None = None, fault: str = "before"
) -> Life:
    settings = {
        "directory": home.url,
        "options": home.options,
        "total": total,
        "interval": INTERVAL,
        "fault_at_call": fault_at_call,
        "fault": fault,
    }
    return Life(server.start("main(**arguments)", **settings))


@pytest.fixture
def begin(_server: Any) -> Iterator[Begin]:
    yield functools.partial(_begin, _server)
    _server.end_children()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, _server: Any) -> Mapping[str, bytes]:
    straight_home = Home(str(tmp_path_factory.mktemp("uninterrupted")))
    straight = _begin(_server, straight_home)
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


def test_a_run_killed_again_and_again_ends_in_the_same_bits(
    home: Home, begin: Begin, uninterrupted: Mapping[str, bytes]
) -> None:
    lives: list[Life] = []
    # Inside a save, at calls that are each another phase of it (the list of pending keys or the mark, the
    # files, the manifest, the deletion of an older step and of its files), and shortly after a commit.
    inside = [(8, "before"), (13, "after"), (16, "before"), (19, "after"), (22, "before")]
    delays = [0.0, 0.003, 0.01, 0.03, 0.1]
    if not is_local(home.open()):  # ten kills on the disk; in a bucket, where each life is long, two
        inside, delays = [(16, "before")], [0.03]
    for (call, fault), delay in zip(inside, delays, strict=True):
        dying = begin(home, fault_at_call=call, fault=fault)
        assert dying.end() == -signal.SIGKILL, dying.lines
        killed = begin(home)
        killed.hear_until(lambda life: life.resumed_from >= 0)
        killed.wait_for_commit_past(killed.resumed_from, home)
        time.sleep(delay)
        killed.kill(signal.SIGKILL)
        assert killed.end() == -signal.SIGKILL, killed.lines
        lives += [dying, killed]
        assert verify_checkpoint(home.open()) == []
    last = begin(home)
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
    home: Home, begin: Begin, uninterrupted: Mapping[str, bytes]
) -> None:
    stopped_at = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        stopped = begin(home)
        stopped.hear_until(lambda life, past=stopped_at: life.reached > past)
        stopped.kill(number)
        assert stopped.end() == status, stopped.lines
        assert stopped.resumed_from == stopped_at
        stopped_at = max(committed(home))
        assert stopped_at >= stopped.reached > stopped.resumed_from
        assert any("resume" in line and f"{stopped_at:,}" in line for line in stopped.lines), stopped.lines
    last = begin(home)
    assert last.end() == 0, last.lines
    assert last.resumed_from == stopped_at
    assert final_files(home) == uninterrupted


@_ALONE
def test_a_second_signal_ends_a_run_whose_save_hangs_and_leaves_what_was_committed(
    local: Home, begin: Begin
) -> None:
    stopped = begin(local, fault_at_call=15, fault="hang")
    stopped.hear_until(lambda life: "hanging" in life.lines)
    stopped.kill(signal.SIGTERM)
    with pytest.raises(AssertionError, match="still runs"):
        stopped.end(timeout=0.5)
    stopped.kill(signal.SIGINT)
    assert stopped.end(timeout=20) == -signal.SIGINT, stopped.lines
    assert committed(local)
    assert verify_checkpoint(local.open()) == []


@_ALONE
def test_a_finished_run_that_is_extended_ends_in_the_same_bits(
    local: Home, begin: Begin, uninterrupted: Mapping[str, bytes]
) -> None:
    first = begin(local, total=TOTAL // 2 + 200)
    assert first.end() == 0, first.lines
    extended = begin(local)
    assert extended.end() == 0, extended.lines
    assert extended.resumed_from == TOTAL // 2 + 200
    assert final_files(local) == uninterrupted
