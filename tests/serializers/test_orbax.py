"""What is particular to the serializer ``orbax``: its options, its limits, its ways with a process."""

import asyncio
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store import CheckpointManager, load_checkpoint, save_checkpoint
from vibe_store.checkpoint import verify_checkpoint
from vibe_store.errors import InvalidValueError

pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')

import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from vibe_store.serializers.orbax import OrbaxSerializer
from vibe_store.storage.memory import MemoryStorage

Same = Callable[[Any, Any], None]


def mixed() -> dict[str, Any]:
    return {
        "w": jnp.arange(6.0).reshape(2, 3),
        "key": jax.random.key(3),
        "half": jnp.ones(3, jnp.bfloat16),
        "rest": [1, "text", jnp.sin, np.zeros((0, 2)), np.arange(3, dtype=">i4")],
    }


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_manager_saves_in_the_background_and_restores(
    where: str, tmp_path: Path, assert_same: Same
) -> None:
    directory = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}-orbax"
    with CheckpointManager(directory, serializer="orbax", max_to_keep=2) as manager:
        for step in range(3):
            manager.save(step, mixed(), items={"runner": {"step": step}})
        state, items = manager.restore(None, mixed(), items={"runner": {"step": 0}})
        assert_same(state, mixed())
        assert items == {"runner": {"step": 2}}
        assert manager.all_steps() == [1, 2]
        assert manager.info(2).serializer == "orbax"
    assert_same(load_checkpoint(directory, mixed(), step=1), mixed())


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_step_that_was_replaced_loads(where: str, tmp_path: Path, assert_same: Same) -> None:
    directory = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}-replaced"
    for value in range(3):
        tree = {"a": np.full(4, value), "b": [value]}
        save_checkpoint(directory, tree, step=1, serializer="orbax")
        assert_same(load_checkpoint(directory, tree, step=1), tree)
    if where == "local":
        assert len(list((tmp_path / "step_1").glob("state*"))) == 1


def test_a_checkpoint_without_a_step_lies_beside_steps(tmp_path: Path, assert_same: Same) -> None:
    for step in (None, 3):
        save_checkpoint(tmp_path, {"a": np.full(2, step or 0)}, step=step, serializer="orbax")
    for step in (None, 3):
        tree = {"a": np.full(2, step or 0)}
        assert_same(load_checkpoint(tmp_path, tree, step=step), tree)
    assert CheckpointManager(tmp_path).all_steps() == [3]


def test_a_checkpoint_of_another_serializer_is_loaded_by_what_its_manifest_says(
    tmp_path: Path, assert_same: Same
) -> None:
    with CheckpointManager(tmp_path, serializer="orbax") as manager:
        manager.save(1, mixed())
    with CheckpointManager(tmp_path) as manager:
        manager.save(2, mixed())
        for step in (1, 2):
            assert_same(manager.restore(step, mixed()), mixed())


def test_nothing_else_is_left_in_the_folder_and_nothing_of_the_save_is_staged(tmp_path: Path) -> None:
    saved = OrbaxSerializer().save(mixed(), tmp_path, "state")
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    assert {entry.name for entry in saved.files} == names
    assert {path.name for path in tmp_path.iterdir()} == {"state", "orbax.checkpoint", "_CHECKPOINT_METADATA"}
    assert not any(part in name for name in names for part in ("tmp", "_sharding", "array_metadatas"))


def test_compression_is_off_until_it_is_asked_for(
    tmp_path: Path, folder_source: Any, assert_same: Same
) -> None:
    tree = {"a": np.zeros(1 << 20, np.uint8)}
    sizes = {}
    for compress in (False, True):
        folder = tmp_path / str(compress)
        folder.mkdir()
        saved = OrbaxSerializer(compress=compress).save(tree, folder, "state")
        sizes[compress] = sum(entry.size for entry in saved.files)
        assert_same(OrbaxSerializer().load(folder_source(folder, saved), "state", tree), tree)
    assert sizes[True] < 1 << 17 < 1 << 20 < sizes[False]
    plain = tmp_path / "plain"
    plain.mkdir()
    saved = OrbaxSerializer().save(tree, plain, "state")
    assert sum(entry.size for entry in saved.files) > 1 << 20


def test_compress_is_true_or_false() -> None:
    with pytest.raises(InvalidValueError, match="compress is True or False; got 'zstd'"):
        OrbaxSerializer(compress="zstd")  # type: ignore[arg-type] # what is refused


@pytest.mark.parametrize("item", ["step_3", "metrics", "_CHECKPOINT_METADATA"])
def test_an_item_whose_folder_would_mean_something_else_is_refused(item: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=f"cannot store an item '{item}'"):
        save_checkpoint(tmp_path, {"a": 1}, items={item: {"b": 1}}, serializer="orbax")
    assert CheckpointManager(tmp_path).all_steps() == []


def test_a_partial_template_has_only_its_own_leaves_read(tmp_path: Path, folder_source: Any) -> None:
    tree = {"small": np.ones(10), "large": [np.ones(1 << 17), np.ones(1 << 17)]}
    serializer = OrbaxSerializer()
    source = folder_source(tmp_path, serializer.save(tree, tmp_path, "state"))
    before = bytes_read()
    loaded = serializer.load(source, "state", {"small": np.zeros(10)}, partial=True)
    assert loaded["small"].sum() == 10
    assert bytes_read() - before < 1 << 17
    before = bytes_read()
    serializer.load(source, "state", tree)
    assert bytes_read() - before > 1 << 21


def test_a_file_that_nobody_saved_is_not_read(tmp_path: Path, assert_same: Same) -> None:
    save_checkpoint(tmp_path, mixed(), step=1, serializer="orbax")
    step = tmp_path / "step_1"
    (step / "_CHECKPOINT_DELETION").write_text("{}")
    (step / "state" / "_strings.json").write_text("no json")
    (step / "state" / "_sharding").write_text("no json")
    assert_same(load_checkpoint(tmp_path, mixed(), step=1), mixed())


def test_a_full_disk_is_an_oserror_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"too large: .*{tmp_path}/state"):
            OrbaxSerializer().save({"a": np.ones(3_000_000, np.uint8)}, tmp_path, "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_files_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        OrbaxSerializer().save(mixed(), tmp_path, "state")
    finally:
        os.umask(old)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_the_options_of_the_callers_own_orbax_are_left_alone(tmp_path: Path, assert_same: Same) -> None:
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.checkpoint_layout = ocp.options.CheckpointLayout.SAFETENSORS
    with context:
        save_checkpoint(tmp_path, mixed(), step=1, serializer="orbax")
        assert_same(load_checkpoint(tmp_path, mixed(), step=1), mixed())
    assert (tmp_path / "step_1" / "state" / "manifest.ocdbt").exists()


def test_many_saves_and_loads_leave_no_thread_and_no_open_file(tmp_path: Path) -> None:
    def resources() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    def work(step: int) -> None:
        save_checkpoint(tmp_path, mixed(), step=step, serializer="orbax")
        load_checkpoint(tmp_path, mixed(), step=step)

    for step in range(3):
        work(step)
    before = resources()
    for step in range(3, 15):
        work(step)
    after = resources()
    # Orbax keeps a few idle threads of a pool, which it fills up to the number of cores.
    assert after[0] <= before[0] + 8
    assert after[1] <= before[1] + 2


def test_nothing_is_printed_and_no_warning_is_issued_at_any_save_or_load(tmp_path: Path) -> None:
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
from vibe_store import CheckpointManager, load_checkpoint, save_checkpoint
tree = {"a": jnp.ones(3), "k": jax.random.key(0), "s": "x", "z": np.zeros((0,)), "n": [np.float32(1), 1j]}
with CheckpointManager(sys.argv[1], serializer="orbax") as manager:
    manager.save(1, tree, items={"runner": {"a": 1}, "empty": {}, "text": ["a"]})
    manager.restore(None, tree, items={"runner": {"a": 1}, "empty": {}, "text": [""]})
    manager.restore(None, {"a": jnp.ones(3)}, partial=True)
save_checkpoint(sys.argv[1], tree, step=1, serializer="orbax")
load_checkpoint(sys.argv[1], jax.eval_shape(lambda: {"a": jnp.ones(3), "k": jax.random.key(0)}) | {
    name: tree[name] for name in "szn"}, step=1)
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_child_of_a_process_that_has_not_used_orbax_yet_saves_and_loads(tmp_path: Path) -> None:
    code = """
import os, sys
import numpy as np
import vibe_store.serializers.orbax
from vibe_store import load_checkpoint, save_checkpoint
tree = {"a": np.arange(5)}
child = os.fork()
if child == 0:
    save_checkpoint(sys.argv[1], tree, step=1, serializer="orbax")
    os._exit(0 if load_checkpoint(sys.argv[1], tree, step=1)["a"].tolist() == [0, 1, 2, 3, 4] else 9)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert load_checkpoint(sys.argv[1], tree, step=1)["a"].tolist() == [0, 1, 2, 3, 4]
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_saving_works_where_an_event_loop_runs(tmp_path: Path) -> None:
    async def train() -> Any:
        save_checkpoint(tmp_path, {"a": np.ones(2)}, step=1, serializer="orbax")
        return load_checkpoint(tmp_path, {"a": np.zeros(2)}, step=1)

    assert asyncio.run(train())["a"].tolist() == [1, 1]


def test_a_job_of_several_processes_is_refused_instead_of_waiting_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, {"a": 1}, step=1, serializer="orbax")
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(InvalidValueError, match="works in jobs of one process, and this one has 2"):
        save_checkpoint(tmp_path, {"a": 1}, step=2, serializer="orbax")
    with pytest.raises(InvalidValueError, match="works in jobs of one process, and this one has 2"):
        load_checkpoint(tmp_path, {"a": 1}, step=1)


def test_items_that_go_up_one_before_the_other_share_what_describes_the_checkpoint() -> None:
    storage = MemoryStorage("memory://shared-marker")
    for step in range(5):
        save_checkpoint(
            storage, {"w": np.arange(4)}, step=step, items={"aux": np.ones(3)}, serializer="orbax"
        )
    assert verify_checkpoint(storage) == []
