"""What TensorBoard finds in the files of a TensorBoardLogger."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.errors import InvalidValueError
from vibe_store.metrics import TensorBoardLogger

pytest.importorskip("tensorboardX", reason='needs pip install "vibe-store[tensorboard]"')


def points(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Every point in the event files of a folder, which are TFRecords of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value


def test_each_number_of_a_line_is_a_point_of_its_curve(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path / "curves") as logger:
        logger.write({"step": 10, "loss": 0.5, "updates": 3, "note": "words", "return_by_seed": [1.0, 2.0]})
        logger.write({"step": 20, "loss": 0.25})
        logger.write({"loss": 9.0})
    assert list(points(tmp_path / "curves")) == [
        ("loss", 10, 0.5),
        ("updates", 10, 3.0),
        ("return_by_seed/0", 10, 1.0),
        ("return_by_seed/1", 10, 2.0),
        ("loss", 20, 0.25),
    ]


def test_a_resumed_run_takes_back_what_came_after_its_step(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import SessionLog

    with TensorBoardLogger(tmp_path, resume_step=10) as logger:
        logger.write({"step": 20, "loss": 0.25})
    (file,) = tmp_path.iterdir()
    start = bytes([SessionLog.DESCRIPTOR.fields_by_name["status"].number << 3, SessionLog.START])
    assert start in file.read_bytes()


def test_numbers_of_numpy_and_jax_are_points_too(tmp_path: Path) -> None:
    with TensorBoardLogger(tmp_path) as logger:
        logger.write({"step": np.int64(3), "loss": jnp.float32(0.5), "count": np.int32(2)})
        logger.write(
            {"step": jnp.int32(4), "return_by_seed": np.arange(2.0), "losses": {"actor": (1, "x", None)}}
        )
    assert list(points(tmp_path)) == [
        ("loss", 3, 0.5),
        ("count", 3, 2.0),
        ("return_by_seed/0", 4, 0.0),
        ("return_by_seed/1", 4, 1.0),
        ("losses/actor/0", 4, 1.0),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"loss": 1.0, "step": 2.5}, r"The step of a line of metrics is 2\.5"),
        ({"step": 1, "loss": 1.0, "model": [object()]}, "The metric 'model/0' is of type object"),
    ],
)
def test_a_line_that_cannot_be_shown_is_refused_whole(
    tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    with TensorBoardLogger(tmp_path) as logger, pytest.raises(InvalidValueError, match=message):
        logger.write(line)
    assert list(points(tmp_path)) == []


def test_nothing_can_be_written_once_it_is_closed(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.close()
    with pytest.raises(InvalidValueError, match=r"TensorBoard's log in .* is closed"):
        logger.write({"step": 1, "loss": 1.0})
    assert len(list(tmp_path.iterdir())) == 1


def test_closing_twice_is_no_error(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.close()
    logger.close()


def test_a_url_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"local folders only, and s3://key@bucket/run is a URL"):
        TensorBoardLogger("s3://key:secret@bucket/run")
