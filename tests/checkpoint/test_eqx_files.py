"""Single ``.eqx`` files in a bucket: found through the manifest, fetched and verified."""

import io
import uuid
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store import load_checkpoint, load_eqx, open_storage, save_checkpoint, save_eqx
from vibe_store.checkpoint import load_manifest
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    TemplateMismatchError,
    UnverifiedCheckpointWarning,
)
from vibe_store.storage.url_path import UrlPath

LIKE = {"a": jax.ShapeDtypeStruct((1000,), jnp.float32), "b": 0}


def tree(value: int) -> dict[str, Any]:
    return {"a": np.full(1000, value, np.float32), "b": value}


def value_of(loaded: Any) -> int:
    assert np.array_equal(loaded["a"], np.full(1000, loaded["b"], np.float32))
    return int(loaded["b"])


@pytest.fixture(params=["memory", "s3", pytest.param("gcs", marks=pytest.mark.proof)])
def place(request: pytest.FixtureRequest) -> UrlPath:
    if request.param == "memory":
        return UrlPath(f"memory://{uuid.uuid4().hex}/checkpoints")
    bucket = request.getfixturevalue(request.param)
    return UrlPath(f"{bucket.url}/{uuid.uuid4().hex}/checkpoints", bucket.storage_options)


@pytest.fixture
def memory() -> UrlPath:
    return UrlPath(f"memory://{uuid.uuid4().hex}/checkpoints")


def stored_file(folder: UrlPath) -> str:
    """The key of ``state.eqx`` in the storage of a step's folder."""
    return load_manifest(folder).items["state"].files["state.eqx"].key


def damage(folder: UrlPath, key: str) -> None:
    storage = open_storage(folder.url)
    data = bytearray(storage.read(key))
    data[len(data) // 3] ^= 1
    storage.write(key, bytes(data))


def test_a_file_is_found_through_the_manifest_however_often_it_was_replaced(place: UrlPath) -> None:
    file = place / "step_5" / "state.eqx"
    for value in range(3):
        save_checkpoint(place, tree(value), step=5, items={"runner": tree(value + 10)})
        assert value_of(load_eqx(file, LIKE)) == value
        assert value_of(load_eqx(file.url, LIKE, storage_options=place.storage_options)) == value
        assert value_of(load_eqx(file.parent / "runner.eqx", LIKE)) == value + 10
    assert stored_file(file.parent) != "state.eqx"
    assert load_eqx(file)["b"] == 2
    assert load_eqx(file, {"b": 0}, partial=True) == {"b": 2}
    with pytest.raises(TemplateMismatchError, match=r"step_5/state\.eqx"):
        load_eqx(file, {"a": np.zeros(3)})


def test_a_checkpoint_without_a_step_and_one_that_was_copied_load_too(memory: UrlPath) -> None:
    save_checkpoint(memory, tree(1))
    assert value_of(load_eqx(memory / "state.eqx", LIKE)) == 1
    save_checkpoint(memory / "run", tree(2), step=5)
    storage = open_storage(memory.url)
    for blob in list(storage.list("run/step_5/")):
        storage.write(blob.key.replace("run/step_5", "step_7"), storage.read(blob.key))
    assert value_of(load_eqx(memory / "step_7" / "state.eqx", LIKE)) == 2


def test_a_file_that_is_not_what_the_manifest_says_is_refused(memory: UrlPath) -> None:
    for value in (1, 2):
        save_checkpoint(memory, tree(value), step=value)
    one, two = memory / "step_1", memory / "step_2"
    storage = open_storage(memory.url)
    storage.write(f"step_1/{stored_file(one)}", storage.read(f"step_2/{stored_file(two)}"))
    with pytest.raises(CorruptCheckpointError, match=r"step_1/state.*\.eqx"):
        load_eqx(one / "state.eqx", LIKE)  # whole by its own trailer
    damage(two, stored_file(two))
    with pytest.raises(CorruptCheckpointError, match=r"step_2/state.*\.eqx"):
        load_eqx(two / "state.eqx", LIKE)
    storage.delete([f"step_1/{stored_file(one)}"])
    with pytest.raises(CorruptCheckpointError, match="is missing, and the manifest names it"):
        load_eqx(one / "state.eqx", LIKE)


def test_a_file_that_no_manifest_names_is_verified_by_itself(memory: UrlPath, tmp_path: Path) -> None:
    save_checkpoint(memory, tree(1), step=1)
    save_eqx(tmp_path / "model.eqx", tree(2))
    storage = open_storage(memory.url)
    for key in ("step_1/model.eqx", "model.eqx"):
        storage.write(key, (tmp_path / "model.eqx").read_bytes())
        assert value_of(load_eqx(memory / key, LIKE)) == 2
    damage(memory, "model.eqx")
    with pytest.raises(CorruptCheckpointError, match=r"memory://.*/model\.eqx"):
        load_eqx(memory / "model.eqx", LIKE)
    plain = io.BytesIO()
    eqx.tree_serialise_leaves(plain, {"a": jnp.arange(3.0)})
    storage.write("step_9/state.eqx", plain.getvalue())
    with pytest.warns(UnverifiedCheckpointWarning, match=r"memory://.*/step_9/state\.eqx"):
        assert load_eqx(memory / "step_9" / "state.eqx", {"a": jnp.zeros(3)})["a"][2] == 2
    with pytest.warns(UnverifiedCheckpointWarning):
        assert load_checkpoint(memory, {"a": jnp.zeros(3)}, step=9)["a"][2] == 2


def test_beside_a_damaged_manifest_the_object_itself_is_read_with_a_warning(
    memory: UrlPath, tmp_path: Path
) -> None:
    save_checkpoint(memory, tree(1), step=1)
    damage(memory, "step_1/manifest.json")
    with pytest.raises(CorruptCheckpointError, match="manifest"):
        load_eqx(memory / "step_1" / "missing.eqx", LIKE)
    save_eqx(tmp_path / "model.eqx", tree(2))
    open_storage(memory.url).write("step_1/state.eqx", (tmp_path / "model.eqx").read_bytes())
    with pytest.warns(DamagedCheckpointWarning, match="is read as it is") as warned:
        assert value_of(load_eqx(memory / "step_1" / "state.eqx", LIKE)) == 2
    assert warned[0].filename == __file__


def test_what_is_not_there_is_named(place: UrlPath) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no object .*://.*/step_5/state\.eqx"):
        load_eqx(place / "step_5" / "state.eqx", LIKE)
    with pytest.raises(InvalidValueError, match="names no object"):
        load_eqx("s3://bucket", LIKE)


def test_a_single_file_is_not_saved_to_a_url(memory: UrlPath, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (memory / "model.eqx", "s3://bucket/model.eqx"):
        with pytest.raises(
            InvalidValueError, match=r"is a URL. Save a checkpoint there with save_checkpoint"
        ):
            save_eqx(path, tree(1))
    assert list(tmp_path.iterdir()) == []
    save_eqx(f"file://{tmp_path}/model.eqx", tree(1))
    assert value_of(load_eqx(tmp_path / "model.eqx", LIKE)) == 1
