"""MetricsLogger at a URL: segments, what a flush costs, and what becomes of lines when something fails."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import vibe_store
from vibe_store import MetricsLogger, open_storage
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.metrics import read_metrics
from vibe_store.storage.url_path import UrlPath

HOURS = 3600.0


class ShakyFileSystem(MemoryFileSystem):
    """Memory whose writes can be made to fail or to wait, and are noted."""

    protocol = "shaky"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fault: ClassVar[BaseException | None] = None
    gate: ClassVar[threading.Event] = threading.Event()
    written: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("shaky://").strip("/")

    def pipe_file(self, path: str, value: bytes, *arguments: Any, **options: Any) -> None:
        self.gate.wait(30)
        if self.fault is not None:
            raise self.fault
        super().pipe_file(path, value, *arguments, **options)
        self.written.append(len(value))


@pytest.fixture
def shaky() -> Iterator[type[ShakyFileSystem]]:
    fsspec.register_implementation("shaky", ShakyFileSystem, clobber=True)
    ShakyFileSystem.store.clear()
    ShakyFileSystem.pseudo_dirs[:] = [""]
    ShakyFileSystem.written.clear()
    ShakyFileSystem.gate.set()
    yield ShakyFileSystem
    ShakyFileSystem.fault = None
    ShakyFileSystem.gate.set()


no_condition = pytest.mark.filterwarnings("ignore:.*cannot create an object only if")
"""Of a filesystem of no object store."""


@pytest.fixture
def url() -> UrlPath:
    """A log in memory."""
    return UrlPath(f"memory://{uuid.uuid4().hex}/logs/metrics.jsonl")


def objects(log: UrlPath) -> dict[str, bytes]:
    storage = open_storage(log.parent.url, **log.storage_options)
    return {blob.key: storage.read(blob.key) for blob in storage.list()}


def put(log: UrlPath, **segments: str) -> None:
    """Store objects: ``_1="..."`` is the segment 1."""
    storage = open_storage(log.parent.url)
    for name, text in segments.items():
        number = int(name[1:])
        storage.write(f"metrics.{number:05d}.jsonl" if number else "metrics.jsonl", text.encode())


def lines(*steps: int) -> str:
    return "".join(f'{{"step": {step}}}\n' for step in steps)


def steps(log: UrlPath) -> list[Any]:
    return [record.get("step") for record in read_metrics(log)]


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.005)


@pytest.mark.parametrize("kind", ["memory", "s3", pytest.param("gcs", marks=pytest.mark.proof)])
def test_lines_are_in_segments_and_read_back_in_order(
    kind: str, url: UrlPath, request: pytest.FixtureRequest
) -> None:
    options: Mapping[str, Any] = {}
    if kind != "memory":
        bucket = request.getfixturevalue(kind)
        url = UrlPath(f"{bucket.url}/{uuid.uuid4().hex}/logs/metrics.jsonl")
        options = bucket.storage_options
    with MetricsLogger(str(url), storage_options=options) as logger:
        logger.write({"step": 1, "loss": float("nan")})
        logger.flush()
        logger.write({"step": 2})
    with MetricsLogger(url, storage_options=options, resume_step=1) as logger:
        logger.write({"step": 3})
    with MetricsLogger(str(url), storage_options=options) as logger:
        logger.write({"step": 4})
    found = read_metrics(str(url), storage_options=options)
    assert found == [{"step": 1, "loss": "NaN"}, {"step": 3}, {"step": 4}]
    assert list(objects(UrlPath(url.url, options))) == ["metrics.00001.jsonl", "metrics.00002.jsonl"]


def test_the_last_lines_of_an_idle_run_are_stored_after_a_while(url: UrlPath) -> None:
    with MetricsLogger(url, flush_secs=0.05) as logger:
        logger.write({"step": 1})
        until(lambda: steps(url) == [1])
        logger.write({"step": 2})
        until(lambda: steps(url) == [1, 2])


def test_lines_wait_in_memory_until_they_are_flushed(url: UrlPath) -> None:
    with MetricsLogger(url, flush_secs=HOURS) as logger:
        logger.write({"step": 1})
        time.sleep(0.1)
        assert steps(url) == []
        logger.flush()
        assert steps(url) == [1]


@no_condition
def test_writing_a_line_never_waits_for_the_store(shaky: Any) -> None:
    with MetricsLogger("shaky://a/m.jsonl", flush_secs=0.01) as logger:
        shaky.gate.clear()
        began = time.monotonic()
        for step in range(3):
            logger.write({"step": step})
            time.sleep(0.05)  # the thread is at it by now
        assert time.monotonic() - began < 5
        shaky.gate.set()
    assert [record["step"] for record in read_metrics("shaky://a/m.jsonl")] == [0, 1, 2]


@no_condition
def test_a_full_segment_is_never_written_again(shaky: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_store.metrics.url_log._SEGMENT_BYTES", 100)
    log = UrlPath("shaky://a/m.jsonl")
    with MetricsLogger(log, flush_secs=HOURS) as logger:
        for step in range(40):
            logger.write({"step": step, "text": "x" * (200 if step == 20 else 10)})
            if step % 5 == 0:
                logger.flush()
    found = objects(log)
    sizes = [len(data) for data in found.values()]
    assert [record["step"] for record in read_metrics(log)] == list(range(40))
    assert len(found) > 10
    assert all(
        size <= 100 or data.count(b"\n") == 1 for size, data in zip(sizes, found.values(), strict=True)
    )
    assert sum(shaky.written) < 2 * sum(sizes), "each flush wrote one segment, not the log"


def test_a_log_goes_on_in_its_last_segment(url: UrlPath) -> None:
    put(url, _1=lines(1), _2=lines(2))
    with MetricsLogger(url) as logger:
        logger.write({"step": 3})
    assert objects(url) == {
        "metrics.00001.jsonl": lines(1).encode(),
        "metrics.00002.jsonl": lines(2, 3).encode(),
    }


def test_a_log_does_not_go_on_in_a_full_segment(url: UrlPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_store.metrics.url_log._SEGMENT_BYTES", 10)
    put(url, _1=lines(1))
    MetricsLogger(url).close()
    assert list(objects(url)) == ["metrics.00001.jsonl", "metrics.00002.jsonl"]


def test_a_plain_file_that_was_copied_there_comes_first(url: UrlPath) -> None:
    put(url, _0=lines(1, 9), _1=lines(9))
    with MetricsLogger(url, resume_step=1) as logger:
        logger.write({"step": 2})
    assert steps(url) == [1, 2]


def test_logs_whose_names_begin_alike_are_apart(url: UrlPath) -> None:
    other = url.parent / "metrics.eval.jsonl"
    with MetricsLogger(url) as logger, MetricsLogger(other) as eval_logger:
        logger.write({"step": 1})
        eval_logger.write({"step": 2})
    assert (steps(url), steps(other)) == ([1], [2])


def test_resuming_drops_the_lines_past_the_restored_step_and_begins_another_segment(url: UrlPath) -> None:
    note = '{"note": "no step"}\n'
    put(url, _1=lines(1, 2), _2=lines(3) + note + lines(4), _3=lines(5, 6), _4="", _5=note + lines(7))
    with MetricsLogger(url, resume_step=3) as logger:
        logger.write({"step": 4})
    assert objects(url) == {
        "metrics.00001.jsonl": lines(1, 2).encode(),
        "metrics.00002.jsonl": (lines(3) + note).encode(),
        "metrics.00005.jsonl": note.encode(),
        "metrics.00006.jsonl": lines(4).encode(),
    }


@no_condition
def test_dying_while_lines_are_dropped_leaves_no_hole(shaky: Any) -> None:
    log = UrlPath("shaky://a/metrics.jsonl")
    put(log, _1=lines(1, 5), _2=lines(2, 6), _3=lines(3, 7))
    left = 1

    def pipe_once(self: Any, path: str, value: bytes, **options: Any) -> None:
        nonlocal left
        if left == 0:
            raise OSError(5, "died")
        left -= 1
        MemoryFileSystem.pipe_file(self, path, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shaky, "pipe_file", pipe_once)
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be opened for writing: died"):
            MetricsLogger(log, resume_step=3)
    assert steps(log) == [1, 5, 2, 6, 3], "the last lines went first"


def test_a_writer_that_was_taken_for_dead_spoils_no_line_of_the_one_in_its_place(url: UrlPath) -> None:
    zombie = MetricsLogger(url, flush_secs=HOURS)
    zombie.write({"step": 1})
    zombie.flush()
    with MetricsLogger(url, resume_step=1) as logger:
        logger.write({"step": 2})
        logger.flush()
        zombie.write({"step": 99})
        zombie.close()
        logger.write({"step": 3})
    assert steps(url) == [1, 99, 2, 3]


def test_two_writers_never_begin_one_segment(url: UrlPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vibe_store.metrics.url_log._SEGMENT_BYTES", 40)
    loggers = [MetricsLogger(url, resume_step=0) for _ in range(2)]
    for step in range(10):
        for number, logger in enumerate(loggers):
            logger.write({"step": step, "writer": number})
            logger.flush()
    for logger in loggers:
        logger.close()
    records = read_metrics(url)
    for number in range(2):
        assert [record["step"] for record in records if record["writer"] == number] == list(range(10))


@no_condition
def test_a_flush_that_failed_is_told_once_by_the_next_write_and_loses_no_line(
    shaky: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vibe_store")
    log = UrlPath("shaky://a/m.jsonl")
    with MetricsLogger(log, flush_secs=0.5) as logger:
        shaky.fault = ConnectionResetError(104, "the store went away")
        logger.write({"step": 1})
        until(lambda: "A flush of the metrics log shaky://a/m.jsonl failed" in caplog.text)
        with pytest.raises(
            ConnectionResetError, match=r"not be stored in shaky://a/m\.jsonl, so 2 lines wait .*went away\."
        ):
            logger.write({"step": 2})
        logger.write({"step": 3})
        shaky.fault = None
    assert steps(log) == [1, 2, 3]


@no_condition
def test_a_failure_that_a_later_flush_made_good_is_not_told(
    shaky: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vibe_store")
    log = UrlPath("shaky://a/m.jsonl")
    with MetricsLogger(log, flush_secs=0.02) as logger:
        shaky.fault = OSError(5, "the store went away")
        logger.write({"step": 1})
        until(lambda: "A flush of the metrics log shaky://a/m.jsonl failed" in caplog.text)
        shaky.fault = None
        until(lambda: steps(log) == [1])
        logger.flush()
        logger.write({"step": 2})
    assert steps(log) == [1, 2]


@no_condition
@pytest.mark.parametrize("fault", [OSError(28, "no room"), RuntimeError("no room")])
def test_flushing_and_closing_say_what_went_wrong(shaky: Any, fault: Exception) -> None:
    log = UrlPath("shaky://a/m.jsonl")
    logger = MetricsLogger(log, flush_secs=HOURS)
    logger.write({"step": 1})
    shaky.fault = fault
    with pytest.raises(OSError, match=r"so 1 lines wait for the next flush: no room\."):
        logger.flush()
    logger.write({"step": 2})
    shaky.fault = None
    logger.flush()
    logger.write({"step": 3})
    shaky.fault = fault
    with pytest.raises(OSError, match=r"so 1 lines are lost: no room\."):
        logger.close()
    logger.close()
    logger.flush()
    with pytest.raises(InvalidValueError, match=r"m\.jsonl is closed"):
        logger.write({"step": 4})
    shaky.fault = None
    assert steps(log) == [1, 2]


@no_condition
def test_what_ended_the_block_is_not_hidden_by_lines_that_cannot_be_stored(
    shaky: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vibe_store.metrics.logger._LAST_FLUSH_SECS", 0.1)

    def preempted() -> None:
        with MetricsLogger("shaky://a/m.jsonl", flush_secs=HOURS) as logger:
            logger.write({"step": 1})
            shaky.gate.clear()
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        preempted()
    assert "so 1 lines are lost: it took longer than 0.1 s." in caplog.text


@no_condition
def test_a_log_that_cannot_be_written_is_refused_when_it_is_opened(shaky: Any) -> None:
    shaky.fault = PermissionError(13, "you may not")
    with pytest.raises(PermissionError, match=r"m\.jsonl cannot be opened for writing: you may not\."):
        MetricsLogger("shaky://refused/m.jsonl")  # where no log of another test is


def test_a_log_that_nobody_holds_any_more_is_stored(url: UrlPath) -> None:
    logger = MetricsLogger(url, flush_secs=HOURS)
    logger.write({"step": 1})
    del logger
    until(lambda: steps(url) == [1])


@pytest.mark.parametrize(("tail", "kept"), [('{"step": 2, "lo', [1, 3]), ('{"step": 2}', [1, 2, 3])])
def test_a_last_line_that_somebody_cut_is_dropped_with_a_warning_unless_it_is_whole(
    url: UrlPath, tail: str, kept: list[int]
) -> None:
    put(url, _1=lines(1) + tail)
    if kept == [1, 2, 3]:
        logger = MetricsLogger(url)
    else:
        with pytest.warns(VibeStoreWarning, match=r"was cut short.*\"step\": 2") as warned:
            logger = MetricsLogger(url)
        assert warned[0].filename == __file__
    with logger:
        logger.write({"step": 3})
    assert steps(url) == kept


def test_what_is_no_json_is_passed_over_with_a_warning_when_read(url: UrlPath, tmp_path: Path) -> None:
    put(url, _1="# by hand\n\n" + lines(1) + "[1]\n")
    (tmp_path / "m.jsonl").write_bytes(objects(url)["metrics.00001.jsonl"])
    for place in (url, tmp_path / "m.jsonl"):
        with pytest.warns(VibeStoreWarning, match=r"^2 lines of .*the first is b'# by hand"):
            assert read_metrics(place) == [{"step": 1}]


def test_reading_a_log_that_is_not_there_says_so(url: UrlPath, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no metrics log memory://.*metrics\.jsonl"):
        read_metrics(url)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "m.jsonl")


def test_a_url_that_went_through_pathlib_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("s3://bucket/m.jsonl"), Path("gs://bucket/m.jsonl").absolute()):
        with pytest.raises(InvalidValueError, match="is a URL that lost a slash"):
            MetricsLogger(path)
        with pytest.raises(InvalidValueError, match="is a URL that lost a slash"):
            read_metrics(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("secs", [0, -1.0, float("nan"), True, "3", None])
def test_an_interval_that_is_none_is_refused(url: UrlPath, secs: Any) -> None:
    with pytest.raises(InvalidValueError, match="flush_secs must be a number above 0"):
        MetricsLogger(url, flush_secs=secs)


def test_a_whole_bucket_is_no_log() -> None:
    with pytest.raises(InvalidValueError, match="is a whole storage"):
        MetricsLogger("memory://bucket")


def test_a_file_url_is_the_local_file(tmp_path: Path) -> None:
    with MetricsLogger(f"file://{tmp_path}/m.jsonl") as logger:
        logger.write({"step": 1})
        assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1}
    with pytest.raises(InvalidValueError, match="The local disk has no storage_options"):
        MetricsLogger(tmp_path / "m.jsonl", storage_options={"key": "secret"})


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(vibe_store.__file__).parents[1])}
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)


def test_a_forked_child_neither_stores_lines_nor_waits_for_a_thread_it_has_not() -> None:
    program = """
import os, sys, warnings
from vibe_store import MetricsLogger
from vibe_store.metrics import read_metrics
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
logger = MetricsLogger("memory://a/m.jsonl", flush_secs=3600)
logger.write({"step": 1})
with logger._sink._changed:  # as if the thread held it at that moment
    child = os.fork()
    if child == 0:
        logger.flush()
        try:
            logger.write({"step": 2})
        except ValueError as error:
            assert "from which this one was forked" in str(error)
            logger.close()
            del logger
            os._exit(0 if read_metrics("memory://a/m.jsonl") == [] else 2)
        os._exit(3)
assert os.waitpid(child, 0)[1] == 0
logger.close()
print(read_metrics("memory://a/m.jsonl"))
"""
    ran = _run(program)
    assert (ran.stdout, ran.stderr) == ("[{'step': 1}]\n", "")


_WRITES = """
import json, os, signal, sys
from vibe_store import MetricsLogger
logger = MetricsLogger(sys.argv[1], flush_secs=3600, storage_options=json.loads(sys.argv[2]))
for step in range(3): logger.write({"step": step})
logger.flush()
logger.write({"step": 3})
if sys.argv[3] == "killed": os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "status"), [("killed", -signal.SIGKILL), ("ended", 0)])
def test_a_process_that_does_not_close_the_log_loses_the_lines_since_the_last_flush(
    s3: Any, how: str, status: int
) -> None:
    log = UrlPath(f"{s3.url}/{uuid.uuid4().hex}/m.jsonl", s3.storage_options)
    ran = _run(_WRITES, log.url, json.dumps(dict(s3.storage_options)), how)
    assert ran.returncode == status
    said = ran.stderr.startswith("1 lines are lost, because the metrics log s3://bucket/")
    assert said == (how == "ended")
    assert steps(log) == [0, 1, 2]
