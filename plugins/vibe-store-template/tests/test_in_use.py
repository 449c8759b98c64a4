"""The three of them in use, as the README shows them."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vibe_store_template.retention import Records
from vibe_store_template.serializer import RawSerializer
from vibe_store_template.storage import SqliteStorage

from vibe_store import CheckpointManager
from vibe_store.errors import InvalidValueError, TemplateMismatchError
from vibe_store.interfaces import StorageBackend


def managed(storage: StorageBackend) -> CheckpointManager:
    return CheckpointManager(storage, serializer=RawSerializer(), retention=Records("loss", mode="min"))


def test_a_run_in_a_database_keeps_its_records_and_is_restored(tmp_path: Path) -> None:
    storage = SqliteStorage(f"sqlite://{tmp_path}/run.db")
    with managed(storage) as manager:
        for step, loss in enumerate([3.0, 5.0, 2.0, float("nan"), 1.0, 4.0]):
            manager.save(step, {"w": np.full(3, step), "name": "x"}, metrics={"loss": loss})
    with managed(SqliteStorage(storage.url)) as manager:
        assert manager.all_steps() == [0, 2, 4, 5]
        restored = manager.restore(4, {"w": np.zeros(3, int), "name": ""})
        assert restored["name"] == "x"
        assert restored["w"].tolist() == [4, 4, 4]
        with pytest.raises(TemplateMismatchError, match="shape"):
            manager.restore(4, {"w": np.zeros(4, int), "name": ""})
    assert [path.name for path in tmp_path.iterdir()] == ["run.db"]


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match=r"sqlite://.*run\.db: file is not a database"):
        SqliteStorage(f"sqlite://{tmp_path}/run.db").read("key")


def test_a_mode_that_is_none_is_refused() -> None:
    wrong: dict[str, Any] = {"mode": "bogus"}
    with pytest.raises(InvalidValueError, match='mode is "min" or "max", whichever is best; got \'bogus\''):
        Records(**wrong)


@pytest.mark.parametrize("provider", [SqliteStorage, RawSerializer, Records])
def test_each_class_has_forty_lines_at_most(provider: type) -> None:
    assert len([line for line in inspect.getsource(provider).splitlines() if line.strip()]) <= 40
