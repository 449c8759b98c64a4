"""Checkpoints over a network that is slow, fails, or takes the writer away between any two requests."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from proxy import Fault

from vibe_store.checkpoint import (
    CheckpointManager,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from vibe_store.errors import SaveFailedError, VibeStoreError
from vibe_store.interfaces import StorageBackend

pytestmark = pytest.mark.proof

LATENCY_SECS = 0.15
ATTEMPTS = 5


@pytest.fixture
def path() -> str:
    return f"{uuid.uuid4().hex}/checkpoints"


@pytest.fixture
def through(proxy: Any, bucket: Any, path: str) -> Callable[..., StorageBackend]:
    """Opens the directory through the proxy."""

    def open_through(**options: Any) -> StorageBackend:
        patience = {"retry_backoff_secs": 0.01, **bucket.patience(0.5)}
        return bucket.through(proxy, **{**patience, **options}).open(path)

    return open_through


def _rounds(requests: list[Any]) -> int:
    """How many of the requests came one after another: the longest row of them in which none overlap."""
    count, free = 0, 0.0
    for request in sorted(requests, key=lambda request: request.end):
        if request.start >= free:
            count, free = count + 1, request.end
    return count


# --- A slow network.


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_a_save_takes_few_round_trips_however_many_files_it_has(
    through: Callable[..., StorageBackend],
    bucket: Any,
    proxy: Any,
    until: Any,
    serializer: str,
) -> None:
    if serializer == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    tree = {f"layer_{number}": np.full((8, 8), number, np.float32) for number in range(12)}
    storage = through(**bucket.patience(60.0))
    puts = 1  # all of them at once
    with CheckpointManager(storage, max_to_keep=2, serializer=serializer) as manager:
        for step in range(2):  # the first claims the directory as well, and opens the connections
            manager.save(step, tree)
        manager.wait()
        for _ in range(ATTEMPTS):
            step += 1
            proxy.clear()
            proxy.latency_secs = LATENCY_SECS
            manager.save(step, tree)
            manager.wait()
            until(lambda: all(request.end for request in proxy.requests))
            # A busy machine can make requests come late, but none that waits for another come early.
            if _rounds(proxy.requests) <= puts + 5:
                break
        else:
            pytest.fail("\n".join(map(str, proxy.requests)))
        proxy.clear()
        proxy.latency_secs = LATENCY_SECS
        assert manager.latest_step() == step
        assert len(proxy.requests) == 1
    assert verify_checkpoint(storage) == []


def test_a_slow_network_does_not_block_the_training_thread(
    through: Callable[..., StorageBackend], proxy: Any, scenarios: ModuleType
) -> None:
    with CheckpointManager(through()) as manager:
        manager.save(1, scenarios.tree(1))
        manager.wait()
        proxy.latency_secs = 3.0
        began = time.monotonic()
        manager.save(2, scenarios.tree(2))
        assert time.monotonic() - began < 2.0
        proxy.latency_secs = 0.0
        manager.wait()


# --- A network that fails.


@pytest.mark.parametrize("how", ["status", "reset", "reset after", "silence", "cut request", "cut answer"])
def test_a_save_succeeds_although_every_request_of_it_fails_once(
    through: Callable[..., StorageBackend], proxy: Any, scenarios: ModuleType, how: str
) -> None:
    storage = through()
    scenarios.prepare(storage)
    seen: set[tuple[str, str, str]] = set()

    def each_once(_: int, request: Any) -> Any:
        which = (request.method, request.path, request.query)
        if which in seen:
            return None
        seen.add(which)
        return Fault(how)

    proxy.clear()
    proxy.faults = each_once
    with CheckpointManager(storage, max_to_keep=1) as manager:
        scenarios.save(manager, 9, 9)
        manager.wait()
    assert len(seen) > 5
    proxy.clear()
    assert scenarios.held(storage, 9) == 9
    assert [status.step for status in list_checkpoints(storage)] == [9]
    assert verify_checkpoint(storage) == []


@pytest.mark.parametrize("how", ["status", "reset", "silence"])
def test_a_store_that_does_not_answer_is_told_of_within_the_deadline_and_the_next_save_works(
    through: Callable[..., StorageBackend],
    bucket: Any,
    proxy: Any,
    scenarios: ModuleType,
    how: str,
) -> None:
    storage = through(**bucket.patience(60.0))  # so that only the deadline ends a silence
    with CheckpointManager(storage, async_timeout_secs=2.0) as manager:
        scenarios.save(manager, 1, 1)
        manager.wait()
        proxy.faults = lambda *_: Fault(how)
        began = time.monotonic()
        scenarios.save(manager, 2, 2)
        assert time.monotonic() - began < 1.9
        with pytest.raises(SaveFailedError, match=r"The save of step 2 failed") as caught:
            scenarios.save(manager, 3, 3)
        assert time.monotonic() - began < 6.0
        assert caught.value.step == 2
        proxy.clear()
        scenarios.save(manager, 3, 3)
        manager.wait()
        assert manager.all_steps() == [1, 3]
    assert verify_checkpoint(storage) == []


def test_a_store_that_does_not_answer_the_first_save_is_told_of_within_the_deadline(
    through: Callable[..., StorageBackend], bucket: Any, proxy: Any, scenarios: ModuleType
) -> None:
    proxy.faults = lambda *_: Fault("silence")
    with CheckpointManager(through(**bucket.patience(60.0)), async_timeout_secs=1.0) as manager:
        began = time.monotonic()
        with pytest.raises(SaveFailedError, match=r"The save of step 1 was not begun") as caught:
            scenarios.save(manager, 1, 1)
        assert time.monotonic() - began < 5.0
        assert caught.value.step == 1
        proxy.clear()
        scenarios.save(manager, 1, 1)
        manager.wait()
        assert manager.all_steps() == [1]


# --- Ctrl-C.

_SAVE_OR_LOAD = """
import json, sys
import numpy as np
from vibe_store.checkpoint import load_checkpoint, save_checkpoint

what, url, options = json.loads(sys.argv[1])
tree = {"w": np.zeros(1000)}
if what == "save":
    save_checkpoint(url, tree, step=1, storage_options=options)
else:
    load_checkpoint(url, tree, step=1, storage_options=options)
"""


@pytest.mark.parametrize("what", ["save", "load"])
def test_ctrl_c_ends_a_process_whose_store_does_not_answer(
    bucket: Any, proxy: Any, path: str, what: str
) -> None:
    save_checkpoint(bucket.open(path), {"w": np.zeros(1000)}, step=1)
    reached = threading.Event()

    def stall(_: int, request: Any) -> Fault | None:
        if what == "load" and "state" not in request.path:
            return None
        reached.set()
        return Fault("silence")

    proxy.faults = stall
    command = [sys.executable, "-W", "ignore", "-c", _SAVE_OR_LOAD]
    told = json.dumps([what, f"{bucket.url}/{path}", bucket.through(proxy).storage_options])
    with subprocess.Popen([*command, told], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert reached.wait(60)
            time.sleep(0.3)  # for a thread to wait for the answer
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            took = time.monotonic() - began
        finally:
            process.kill()
    assert said.endswith("KeyboardInterrupt\n")
    assert took < 15.0


# --- A writer that goes.


@pytest.mark.usefixtures("dead_at_once")
@pytest.mark.parametrize(
    ("bucket", "scenario", "how"),
    [
        *itertools.product(["gcs"], ["save", "replace", "prune", "wipe"], ["reset after"]),
        ("gcs", "replace", "reset"),
        ("s3", "save", "reset after"),  # whose server takes its time
    ],
    indirect=["bucket"],
)
def test_a_writer_gone_at_any_request_leaves_whole_steps_and_the_next_one_goes_on(
    proxy: Any,
    bucket: Any,
    scenarios: ModuleType,
    until: Any,
    scenario: str,
    how: str,
) -> None:
    """To the store, a killed writer is one of which no request comes any more."""
    for index in range(100):
        path = f"{uuid.uuid4().hex}/checkpoints"
        direct = bucket.open(path)
        scenarios.prepare(direct)
        proxy.clear()

        def gone(number: int, _: Any, index: int = index) -> Any:
            return None if number < index else Fault(how if number == index else "reset")

        proxy.faults = gone
        dying = bucket.through(proxy, retry_attempts=1).open(path)
        with suppress(OSError, VibeStoreError):
            scenarios.SCENARIOS[scenario](dying)
        until(lambda: all(request.end for request in proxy.requests))  # what had come is carried out
        scenarios.check(scenario, direct)
        assert verify_checkpoint(direct) == [] if list_checkpoints(direct) else True
        scenarios.check_next_writer(direct)
        if len(proxy.requests) <= index:
            break
    assert 3 < index < 99
