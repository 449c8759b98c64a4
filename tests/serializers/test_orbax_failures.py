"""Where Orbax fails there is one exception of ours, and no log of what it says already."""

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')

from vibe_store.serializers.orbax import OrbaxSerializer

_WRITES_THAT_FAIL = """
import asyncio, errno, gc, resource, sys, threading, time
from pathlib import Path
import numpy as np
from vibe_store.serializers.orbax import OrbaxSerializer

tree = {f"a{i}": np.random.default_rng(i).random((50, 20)) for i in range(20)}
folder = Path(sys.argv[1])

def fails():
    try:
        OrbaxSerializer().save(tree, folder, "state")
    except OSError as error:
        assert error.errno == errno.EFBIG and str(folder / "state") in str(error), error
        assert error.__cause__ is not None
    else:
        raise SystemExit("it did not fail")
    assert list(folder.iterdir()) == []

async def fails_in_a_loop():
    fails()

for limit in (100, 2_000, 50_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    fails()
    asyncio.run(fails_in_a_loop())
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    gc.collect()
time.sleep(0.1)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
OrbaxSerializer().save(tree, folder, "state")
"""

_READS_THAT_FAIL = """
import gc, sys, time
from pathlib import Path
import numpy as np
from vibe_store import load_checkpoint, save_checkpoint
from vibe_store.errors import CorruptCheckpointError

tree = {f"a{i}": np.random.default_rng(i).random((50, 20)) for i in range(20)}
folder = Path(sys.argv[1])
save_checkpoint(folder, tree, step=1, serializer="orbax")
failures = 0
for path in sorted((folder / "step_1" / "state").rglob("*")):
    if path.is_file():
        data = path.read_bytes()
        for damaged in (data[:-1], data[: len(data) // 2], b"", data[:20] + bytes(len(data) - 20)):
            path.write_bytes(damaged)
            try:
                load_checkpoint(folder, tree, step=1, verify="off")
            except CorruptCheckpointError:
                failures += 1
        path.write_bytes(data)
gc.collect()
time.sleep(0.1)
assert failures >= 8, failures
"""


_FOLDERS_THAT_FAIL = """
import errno, gc, sys
from pathlib import Path
import numpy as np
from vibe_store.serializers.orbax import OrbaxSerializer

file = Path(sys.argv[1]) / "file"
file.touch()
for folder, number in ((file, errno.ENOTDIR), (Path("/proc/self/none"), errno.ENOENT)):
    try:
        OrbaxSerializer().save({"a": np.ones(3), "b": 1}, folder, "state")
    except OSError as error:
        assert error.errno == number, error
    else:
        raise SystemExit("it did not fail")
    gc.collect()
"""


@pytest.mark.parametrize("code", [_FOLDERS_THAT_FAIL, _READS_THAT_FAIL], ids=["folders", "reads"])
def test_a_failure_is_one_exception_and_nothing_is_printed(code: str, tmp_path: Path) -> None:
    done = _run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failure_to_write_is_one_exception_and_nothing_is_logged(tmp_path: Path) -> None:
    done = _run(_WRITES_THAT_FAIL, tmp_path)
    # On what was under way when Orbax closed its event loop, Python may remark; see `_not_logged`.
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "ERROR:absl" not in done.stderr


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_logging_is_as_it_was_after_a_save(tmp_path: Path) -> None:
    logger = logging.getLogger("absl")
    before = list(logger.filters), logger.level, logger.disabled
    OrbaxSerializer().save({"a": np.ones(3)}, tmp_path, "state")
    assert (list(logger.filters), logger.level, logger.disabled) == before


def test_what_others_log_as_an_error_through_absl_is_logged_during_a_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asyncio.new_event_loop

    def speaking() -> asyncio.AbstractEventLoop:
        logging.getLogger("absl").error("Something else failed.")
        return before()

    monkeypatch.setattr(asyncio, "new_event_loop", speaking)
    OrbaxSerializer().save({"a": np.ones(3)}, tmp_path, "state")
    assert "Something else failed." in caplog.text
