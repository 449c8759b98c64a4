"""MetricsLogger: what a line may hold, and what becomes of the file when its writer is killed or resumed."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.metrics import MetricsLogger


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, *records: dict[str, Any], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_each_write_is_one_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "logs" / "metrics.jsonl"
    with MetricsLogger(path) as logger:
        logger.write({"step": 1, "eval_return": 2.5})
        logger.write({"step": 2, "note": "two\nlines \u2028 é", "flags": [True, None], "in": {"a": {"b": 1}}})
    assert lines(path) == [
        {"step": 1, "eval_return": 2.5},
        {"step": 2, "note": "two\nlines \u2028 é", "flags": [True, None], "in": {"a": {"b": 1}}},
    ]
    assert path.read_bytes().count(b"\n") == 2


def test_scalars_of_numpy_and_jax_are_written_as_plain_numbers(tmp_path: Path) -> None:
    import jax.numpy as jnp

    with MetricsLogger(tmp_path / "m.jsonl") as logger:
        logger.write(
            {
                "f32": np.float32(0.5),
                "f64": np.float64(0.1),
                "i64": np.int64(2**40),
                "bool": np.bool_(True),
                "zero_d": np.array(3, np.int8),
                "str": np.str_("text"),
                "jax": jnp.float32(0.25),
                "bf16": jnp.asarray(1.5, jnp.bfloat16),
                "inside": [{"deep": jnp.int32(7)}, (np.int8(1),)],
            }
        )
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text) == {
        "f32": 0.5,
        "f64": 0.1,
        "i64": 2**40,
        "bool": True,
        "zero_d": 3,
        "str": "text",
        "jax": 0.25,
        "bf16": 1.5,
        "inside": [{"deep": 7}, [1]],
    }
    assert '"bool": true' in text
    assert '"zero_d": 3,' in text


def test_numbers_that_json_lacks_are_written_as_strings_that_float_reads(tmp_path: Path) -> None:
    values = {"a": float("nan"), "b": np.float32("inf"), "c": [np.float64("-inf")], "d": np.array(np.nan)}
    with MetricsLogger(tmp_path / "m.jsonl") as logger:
        logger.write(values)
    (record,) = lines(tmp_path / "m.jsonl")
    assert record == {"a": "NaN", "b": "Infinity", "c": ["-Infinity"], "d": "NaN"}
    assert float(record["c"][0]) == float("-inf")


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({"loss": np.ones(3)}, r"'loss' is of type ndarray \(shape \(3,\), dtype float64\).*\.tolist\(\)"),
        ({"a": {"b": [1, object()]}}, r"'a\.b\[1\]' is of type object"),
        ({"z": 1j}, "'z' is of type complex"),
        ({"z": np.complex64(1)}, "'z' is of type complex64"),
        ({"when": np.datetime64("2026-01-01")}, "'when' is of type datetime64"),
        ({"a": [10**5000]}, r"'a\[0\]' is a whole number of more than 4300 digits"),
        ({"raw": b"x"}, "'raw' is of type bytes"),
        ({3: 1}, "must be strings, but one is 3"),
        ({"by_env": {3: 1}}, "must be strings, but one in 'by_env' is 3"),
        ([("loss", 1)], "must be a mapping, not of type list"),
    ],
)
def test_what_cannot_be_logged_is_refused_by_key_and_nothing_is_written(
    tmp_path: Path, metrics: Any, sentence: str
) -> None:
    with MetricsLogger(tmp_path / "m.jsonl") as logger:
        with pytest.raises(InvalidValueError, match=sentence):
            logger.write(metrics)
        logger.write({"step": 1})
    assert lines(tmp_path / "m.jsonl") == [{"step": 1}]


def test_a_traced_value_is_refused_by_key(tmp_path: Path) -> None:
    import jax

    with MetricsLogger(tmp_path / "m.jsonl") as logger:

        def step(x: jax.Array) -> jax.Array:
            logger.write({"loss": x})
            return x

        with pytest.raises(InvalidValueError, match=r"'loss'.*traced"):
            jax.jit(step)(1.0)


def test_a_line_is_there_for_others_as_soon_as_write_returns(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "m.jsonl") as logger:
        logger.write({"step": 1})
        assert lines(tmp_path / "m.jsonl") == [{"step": 1}]


def test_a_killed_writer_loses_no_line_that_it_wrote(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from vibe_store.metrics import MetricsLogger\n"
        "logger = MetricsLogger(sys.argv[1])\n"
        "for step in range(5): logger.write({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "m.jsonl"
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3, 4]


def test_resuming_drops_the_lines_past_the_restored_step(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.jsonl",
        {"step": 10, "loss": 1.0},
        {"note": "no step"},
        {"step": "300", "note": "a step that is no number"},
        {"step": 30, "loss": 3.0},
        {"step": 20.0, "loss": 2.0},
        {"step": 20.5},
        tail='{"step": 40, "lo',
    )
    path.chmod(0o640)
    with MetricsLogger(path, resume_step=20) as logger:
        logger.write({"step": 21})
    assert lines(path) == [
        {"step": 10, "loss": 1.0},
        {"note": "no step"},
        {"step": "300", "note": "a step that is no number"},
        {"step": 20.0, "loss": 2.0},
        {"step": 21},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_resuming_keeps_lines_that_are_no_json_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'# \xff by hand\n[1, 2]\n{"step": true}\n{"step": 9}\n{"step": 0}')
    MetricsLogger(path, resume_step=0).close()
    assert path.read_bytes() == b'# \xff by hand\n[1, 2]\n{"step": true}\n{"step": 0}\n'


def test_dying_while_lines_are_dropped_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "m.jsonl", {"step": 1}, {"step": 2})
    before = path.read_bytes()

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"m\.jsonl cannot be opened for writing: No space left"):
        MetricsLogger(path, resume_step=1)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_what_a_process_leaves_that_is_killed_while_lines_are_dropped_goes_with_the_next_log(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "m.jsonl", {"step": 1}, {"step": 2})
    program = (
        "import os, signal, sys; from vibe_store.metrics import MetricsLogger\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "MetricsLogger(sys.argv[1], resume_step=1)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    MetricsLogger(path).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_file_with_nothing_to_drop_is_not_replaced(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", {"step": 1})
    inode = path.stat().st_ino
    MetricsLogger(path, resume_step=1).close()
    assert path.stat().st_ino == inode


def test_a_log_behind_a_symlink_stays_behind_it(tmp_path: Path) -> None:
    real = written(tmp_path / "real.jsonl", {"step": 1}, {"step": 2})
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    MetricsLogger(link, resume_step=1).close()
    assert link.is_symlink()
    assert lines(real) == [{"step": 1}]


def test_opening_without_a_step_appends_and_keeps_every_line(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", {"step": 7})
    with MetricsLogger(path) as logger:
        logger.write({"step": 1})
    assert lines(path) == [{"step": 7}, {"step": 1}]


def test_opening_without_a_step_drops_a_partial_last_line_with_a_warning(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", {"step": 1}, tail='{"step": 2, "lo')
    with pytest.warns(VibeStoreWarning, match=r"m\.jsonl was cut short.*\"step\": 2") as caught:
        logger = MetricsLogger(path)
    assert caught[0].filename == __file__
    with logger:
        logger.write({"step": 2})
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", tail='{"step": 1}')
    with warnings.catch_warnings(), MetricsLogger(path) as logger:
        warnings.simplefilter("error")
        logger.write({"step": 2})
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_line_that_does_not_fit_on_the_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with MetricsLogger(path) as logger:
            logger.write({"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            with pytest.raises(OSError, match=r"could not be written to .*m\.jsonl: File too large"):
                logger.write({"text": "x" * 200})
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            logger.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("step", [-1, True, 1.0, "3"])
def test_a_resume_step_that_is_no_step_is_refused(tmp_path: Path, step: Any) -> None:
    with pytest.raises(InvalidValueError, match="resume_step must be an integer of 0 or more"):
        MetricsLogger(tmp_path / "m.jsonl", resume_step=step)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="is a directory; give the path of a file"):
        MetricsLogger(tmp_path)


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/m\.jsonl cannot be opened for writing"):
        MetricsLogger(tmp_path / "file" / "m.jsonl")


def test_a_closed_log_says_so(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "m.jsonl")
    logger.close()
    logger.close()
    with pytest.raises(InvalidValueError, match="is closed"):
        logger.write({"step": 1})


def test_the_module_imports_neither_numpy_nor_jax() -> None:
    program = "import sys, vibe_store.metrics; print({'numpy', 'jax', 'pluggy', 'fsspec'} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"
