"""Two processes that write to one directory of a bucket at the same moments, as a zombie does.

The environment variable ``VIBE_STORE_ROUNDS`` says how often; 200 times take some minutes.
"""

import json
import os
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store.checkpoint import list_checkpoints, verify_checkpoint

pytestmark = pytest.mark.proof

ROUNDS = int(os.environ.get("VIBE_STORE_ROUNDS", "10"))
_WRITER = """
import json, time
from vibe_store.checkpoint import verify_checkpoint
from vibe_store.checkpoint.writer_id import WriterClaim
from vibe_store.errors import StepAlreadyExistsError, WriterSupersededError
from vibe_store.registry import open_storage

who, meeting = arguments["who"], Path(arguments["meeting"])
storage = open_storage(arguments["url"], **arguments["options"])
if not arguments["check"]:
    WriterClaim.check = lambda self: None

def meet(where):
    (meeting / f"{where}-{who}").touch()
    deadline = time.monotonic() + 60
    while not (meeting / f"{where}-{1 - who}").exists():
        assert time.monotonic() < deadline, f"nobody came to {where}"
        time.sleep(0.0005)

for number in range(arguments["rounds"]):
    meet(f"begin-{number}")
    manager = CheckpointManager(storage, max_to_keep=3)
    for step in (10 * number, 10 * number + 1 + who):
        outcome = "won"
        try:
            save(manager, step, 100_000 * who + step)
            manager.wait()
        except (StepAlreadyExistsError, WriterSupersededError) as error:
            if f"Step {step} was saved, and is the last" not in str(error):
                outcome = type(error).__name__
        print(json.dumps([who, step, outcome]))
    meet(f"end-{number}")
    if who == 0:
        assert verify_checkpoint(storage) == []
    meet(f"verified-{number}")
"""


@pytest.mark.parametrize("check", [True, False], ids=["who writes is checked", "who writes is not checked"])
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_no_step_has_two_winners_and_every_listed_step_verifies(
    kind: str,
    check: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    scenarios: ModuleType,
    processes: Any,
) -> None:
    bucket: Any = request.getfixturevalue(kind)
    url = f"{bucket.url}/two-{check}"
    arguments = {"url": url, "options": bucket.storage_options, "check": check, "meeting": str(tmp_path)}
    writers = [processes.start(_WRITER, who=who, rounds=ROUNDS, **arguments) for who in (0, 1)]
    for writer in writers:
        assert writer.wait(300) == 0, writer.output
    outcomes = [
        json.loads(line) for writer in writers for line in writer.output.splitlines() if line[0] == "["
    ]
    assert len(outcomes) == 4 * ROUNDS
    winners = [(step, who) for who, step, outcome in outcomes if outcome == "won"]
    assert max(Counter(step for step, _ in winners).values()) == 1
    storage = bucket.open(f"two-{check}")
    found = list_checkpoints(storage)
    assert {status.status for status in found} == {"committed"}
    assert verify_checkpoint(storage) == []
    for status in found:
        seed = scenarios.held(storage, status.step)
        assert (seed % 100_000, seed // 100_000) in winners
    told = Counter(outcome for _, _, outcome in outcomes)
    assert told["won"] >= ROUNDS
    assert (told["WriterSupersededError"] > 0) == check
    assert check or told["StepAlreadyExistsError"] == ROUNDS
