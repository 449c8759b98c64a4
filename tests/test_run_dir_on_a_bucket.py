"""RunDir on a URL: the same run, with no folders."""

import json
import os
import subprocess
import sys
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

import vibe_store
from vibe_store import (
    MetricsLogger,
    load_checkpoint,
    load_eqx,
    open_storage,
    registry,
    save_checkpoint,
    save_eqx,
)
from vibe_store.checkpoint import CheckpointManager, initialize_checkpoint_dir, verify_checkpoint
from vibe_store.discovery import Plugin, installed_plugins
from vibe_store.errors import CheckpointNotFoundError, InvalidValueError, VibeStoreWarning
from vibe_store.hookspecs import Provider, hookimpl
from vibe_store.run_dir import RunDir, find_runs
from vibe_store.storage.memory import MemoryStorage
from vibe_store.storage.url_path import UrlPath

TREE = {"a": np.arange(3)}
ZEROS = {"a": np.zeros(3, np.int64)}


@pytest.fixture(
    params=[
        "memory",
        pytest.param("s3", marks=pytest.mark.proof),
        pytest.param("gcs", marks=pytest.mark.proof),
    ]
)
def base(request: pytest.FixtureRequest) -> UrlPath:
    if request.param == "memory":
        return UrlPath(f"memory://{uuid.uuid4().hex}/runs")
    bucket = request.getfixturevalue(request.param)
    return UrlPath(f"{bucket.url}/{uuid.uuid4().hex}/runs", bucket.storage_options)


@pytest.fixture
def memory() -> UrlPath:
    return UrlPath(f"memory://{uuid.uuid4().hex}/runs")


def keys(place: UrlPath) -> list[str]:
    return [blob.key for blob in open_storage(place.url, **place.storage_options).list()]


class FlatStorage(MemoryStorage):
    """Keeps each root apart from what is below its URL."""

    def __init__(self, url: str) -> None:
        super().__init__(f"memory://{quote(url, safe='')}")
        self.url = url


def test_a_storage_whose_roots_do_not_nest_holds_no_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Provider("flat", f"{__name__}:FlatStorage")
    hooks = SimpleNamespace(vibe_store_storage=hookimpl(lambda: [flat], specname="vibe_store_storage"))
    plugins = [*installed_plugins(), Plugin("flat", lambda: hooks, "flat", "1.0")]
    monkeypatch.setattr(registry, "_default", SimpleNamespace(get=lambda: registry.Registry(plugins)))
    run = RunDir(base_dir=f"flat://{uuid.uuid4().hex}/runs", run_id="mine")
    with pytest.raises(InvalidValueError, match=r"/runs cannot hold runs: the config.json of 'mine' is not"):
        run.save_config({"lr": 1e-3})


def test_a_whole_run_is_in_the_bucket(base: UrlPath) -> None:
    options: Mapping[str, Any] = base.storage_options
    run = RunDir("dqn", base_dir=base.url, storage_options=options)
    run.save_config({"lr": 1e-3})
    manager, resuming = initialize_checkpoint_dir(run.checkpoints, resume=True, max_to_keep=9)
    assert not resuming
    with manager, MetricsLogger(run.log_path()) as logger:
        for step in range(4):
            manager.save(step, {"a": np.arange(3) + step})
            logger.write({"step": step})
    run.mark_best(1)

    again = RunDir(base_dir=base, run_id=run.run_id)
    assert again.load_config() == {"lr": 1e-3}
    assert again.path == base / run.run_id
    assert again.list_checkpoints() == [(step, again.checkpoints / f"step_{step}") for step in range(4)]
    assert again.latest_checkpoint == again.checkpoints / "step_3"
    assert again.best_checkpoint == again.checkpoints / "step_1"
    assert np.array_equal(load_checkpoint(again.best_checkpoint, ZEROS)["a"], np.arange(3) + 1)
    assert np.array_equal(load_checkpoint(again.checkpoints / "best", ZEROS)["a"], np.arange(3) + 1)
    for folder in (again.best_checkpoint, again.checkpoints / "best"):
        assert np.array_equal(load_eqx(folder / "state.eqx", like=ZEROS)["a"], np.arange(3) + 1)
    file = f"{again.latest_checkpoint}/state.eqx"
    assert np.array_equal(load_eqx(file, ZEROS, storage_options=options)["a"], np.arange(3) + 3)
    assert verify_checkpoint(again.checkpoints) == []

    assert again.cleanup_checkpoints(keep=1) == [again.checkpoints / f"step_{step}" for step in (0, 2)]
    assert [step for step, _ in again.list_checkpoints()] == [1, 3]
    found = keys(again.path)
    assert {".vibe_store/run.json", "config.json", "logs/metrics.00001.jsonl", "checkpoints/best"} <= set(
        found
    )
    assert [run.run_id for run in find_runs(base)] == [again.run_id]


def test_nothing_is_made_by_asking(memory: UrlPath) -> None:
    run = RunDir(base_dir=memory, run_id="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run.log_path() == run.logs / "metrics.jsonl"
        assert run.checkpoint_dir(5) == run.checkpoints / "step_5"
        assert run.list_checkpoints() == []
        assert run.latest_checkpoint is None
        assert run.best_checkpoint is None
        assert run.load_config() is None
        assert run.cleanup_checkpoints() == []
        assert find_runs(memory) == []
    assert keys(memory) == []


def test_runs_that_begin_in_the_same_second_get_names_of_their_own(base: UrlPath) -> None:
    runs = [RunDir("dqn", base_dir=base) for _ in range(3)]
    assert len({run.run_id for run in runs}) == 3
    assert all(run.run_id.startswith("dqn_") for run in runs)
    claims = [open_storage(run.path.url, **base.storage_options).read(".vibe_store/run.json") for run in runs]
    said = [json.loads(claim) for claim in claims]
    assert [claim["run_id"] for claim in said] == [run.run_id for run in runs]
    assert said[0].keys() == {"run_id", "began", "host", "pid", "claim"}


_BEGINS = """
import json, sys
from vibe_store import RunDir
options = json.loads(sys.argv[2])
RunDir(base_dir=sys.argv[1], run_id="x", storage_options=options).load_config()  # so that both are ready
print("ready", flush=True)
sys.stdin.readline()
print(*[RunDir("dqn", base_dir=sys.argv[1], storage_options=options).run_id for _ in range(5)])
"""


def test_runs_that_two_processes_begin_at_the_same_moment_share_no_name(s3: Any) -> None:
    base = f"{s3.url}/{uuid.uuid4().hex}"
    environment = {**os.environ, "PYTHONPATH": str(Path(vibe_store.__file__).parents[1])}
    command = [sys.executable, "-c", _BEGINS, base, json.dumps(dict(s3.storage_options))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ids = [run_id for process in processes for run_id in process.communicate(timeout=60)[0].split()]
    assert len(ids) == 10
    assert len(set(ids)) == 10


def test_a_claim_whose_answer_was_lost_is_still_ours(
    memory: UrlPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vibe_store.storage.memory import MemoryStorage

    write = MemoryStorage.write

    def repeats(self: MemoryStorage, key: str, data: bytes, **options: Any) -> None:
        write(self, key, data, **options)
        write(self, key, data, **options)

    monkeypatch.setattr(MemoryStorage, "write", repeats)
    run = RunDir("dqn", base_dir=memory)
    assert keys(memory) == [f"{run.run_id}/.vibe_store/run.json"]
    assert run.run_id.count("_") == 2, "there was no need of another name"


def test_best_is_an_object_that_holds_a_name(memory: UrlPath) -> None:
    run = RunDir("dqn", base_dir=memory)
    run.mark_best(7)
    with pytest.warns(VibeStoreWarning, match="best points to step 7, which is not there") as warned:
        assert run.best_checkpoint is None
    assert warned[0].filename == __file__
    assert open_storage(run.checkpoints.url).read("best") == b"step_7\n"
    save_checkpoint(run.checkpoints, TREE, step=7)
    assert run.best_checkpoint == run.checkpoints / "step_7"


def test_a_config_that_is_no_json_is_named(memory: UrlPath) -> None:
    run = RunDir(base_dir=memory, run_id="mine")
    for text in (b"{", b"[1]", b"\xff"):
        open_storage(run.path.url).write("config.json", text)
        with pytest.raises(InvalidValueError, match=r"memory://.*/runs/mine/config\.json"):
            run.load_config()


def test_a_run_is_shown_without_credentials() -> None:
    run = RunDir(base_dir=UrlPath("ftp://user:hunter2@host/runs", {"password": "hunter3"}), run_id="mine")
    assert repr(run) == "RunDir(base_dir='ftp://user@host/runs', run_id='mine')"
    assert "hunter" not in repr(run.checkpoints)


def test_a_base_that_went_through_pathlib_is_refused_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("s3://bucket/runs"), Path("gs://bucket/runs").absolute(), "s3:/bucket/runs"):
        with pytest.raises(InvalidValueError, match="is a URL that lost a slash"):
            RunDir("dqn", base_dir=path)
    calls: list[Any] = [
        lambda path: load_eqx(path / "state.eqx", TREE),
        lambda path: save_eqx(path / "state.eqx", TREE),
        lambda path: save_checkpoint(path, TREE, step=1),
        lambda path: load_checkpoint(path, TREE, step=1),
        lambda path: CheckpointManager(path),
    ]
    for call in calls:
        with pytest.raises(InvalidValueError, match="lost a slash"):
            call(Path("s3://bucket/runs"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_url_is_a_local_run(tmp_path: Path) -> None:
    run = RunDir("dqn", base_dir=f"file://{tmp_path}/runs")
    assert run.path == tmp_path / "runs" / run.run_id
    assert run.path.is_dir()
    with pytest.raises(InvalidValueError, match="The local disk has no storage_options"):
        RunDir("dqn", base_dir=tmp_path, storage_options={"key": "secret"})


def test_runs_are_found_by_their_configurations(memory: UrlPath, tmp_path: Path) -> None:
    for base in (memory, tmp_path):
        for name in ("b", "a"):
            RunDir(base_dir=base, run_id=name).save_config({})
        RunDir("no_config", base_dir=base)
        save_checkpoint(base / "a" / "checkpoints", TREE, step=1)
        assert [run.run_id for run in find_runs(base)] == ["a", "b"]


def test_loading_from_a_run_that_is_not_there_says_so(memory: UrlPath) -> None:
    run = RunDir(base_dir=memory, run_id="mine")
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 5 in memory://"):
        load_checkpoint(run.checkpoints / "step_5", ZEROS)
    with pytest.raises(CheckpointNotFoundError, match=r"no object memory://.*/step_5/state\.eqx"):
        load_eqx(run.checkpoints / "step_5" / "state.eqx", ZEROS)
