"""Checkpoints through the plugin: saved, loaded, pruned and copied by managers, trainers and commands."""

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store import CheckpointManager, MetricsLogger, load_checkpoint, save_checkpoint
from vibe_store.checkpoint import verify_checkpoint
from vibe_store.cli import main
from vibe_store.errors import SaveFailedError, StepAlreadyExistsError, WriterSupersededError
from vibe_store.metrics import read_metrics
from vibe_store.storage.url_path import UrlPath

pytestmark = pytest.mark.proof


def eval_return(metrics: Any) -> float:
    return float(metrics["eval_return"])


@pytest.fixture
def place(bucket: Any) -> UrlPath:
    """A new place in the bucket, with the options that open it."""
    return UrlPath(bucket.opener()().url, bucket.storage_options)


def tree(value: int) -> dict[str, Any]:
    return {"w": jnp.full((300, 40), value, jnp.bfloat16), "n": np.int64(value), "key": jax.random.key(value)}


def check(found: dict[str, Any], value: int) -> None:
    wanted = tree(value)
    assert (found["w"] == wanted["w"]).all()
    assert found["n"] == wanted["n"]
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(wanted["key"]).tolist()


def test_a_manager_saves_restores_and_prunes(bucket: Any, place: UrlPath) -> None:
    with CheckpointManager(place, max_to_keep=2, best_fn=eval_return, best_mode="max") as manager:
        for step in range(1, 5):
            manager.save(
                step, tree(step), items={"more": {"n": step}}, metrics={"eval_return": 1.0 * (step == 1)}
            )
    assert str(place).split("://", maxsplit=1)[0].endswith("+obstore")
    with CheckpointManager(place, best_fn=eval_return, best_mode="max") as reader:
        assert reader.all_steps() == [1, 3, 4]  # the best is kept too
        assert reader.best_step() == 1
        check(reader.restore(None, tree(0)), 4)
        state, items = reader.restore(3, tree(0), items={"more": {"n": 0}})
        check(state, 3)
        assert items == {"more": {"n": 3}}
    assert verify_checkpoint(place) == []
    keys = [blob.key for blob in bucket.open(place.url.removeprefix(f"{bucket.url}/")).list()]
    assert [key for key in keys if "step_2/" in key] == []


def test_the_url_as_text_does_too(bucket: Any, place: UrlPath) -> None:
    with CheckpointManager(place.url, storage_options=dict(bucket.storage_options)) as manager:
        manager.save(7, tree(7))
        manager.wait()
        check(manager.restore(7, tree(0)), 7)
    check(load_checkpoint(place.url, tree(0), step=7, storage_options=dict(bucket.storage_options)), 7)
    assert bucket.raw_get(f"{place.url.removeprefix(f'{bucket.url}/')}/step_7/manifest.json")


def test_an_existing_step_stays_and_can_be_replaced_on_purpose(place: UrlPath) -> None:
    save_checkpoint(place, tree(1), step=1)
    with pytest.raises(StepAlreadyExistsError):
        CheckpointManager(place, async_timeout_secs=None).save(1, tree(2))
    check(load_checkpoint(place, tree(0), step=1), 1)
    save_checkpoint(place, tree(2), step=1)
    check(load_checkpoint(place, tree(0), step=1), 2)
    assert verify_checkpoint(place) == []


def test_of_two_managers_that_save_one_step_at_once_one_succeeds_and_what_is_there_verifies(
    place: UrlPath,
) -> None:
    managers = [CheckpointManager(place, max_to_keep=100, async_timeout_secs=None) for _ in range(2)]
    for step in range(4):
        together = threading.Barrier(2)

        def save(index: int, step: int = step, together: threading.Barrier = together) -> object:
            together.wait()
            try:
                return managers[index].save(step, {"w": jnp.full(1000, index), "n": index})
            except StepAlreadyExistsError as error:
                return type(error)

        with ThreadPoolExecutor(2) as threads:
            came = list(threads.map(save, range(2)))
        assert sorted(came, key=str) == sorted([True, StepAlreadyExistsError], key=str)
        found = load_checkpoint(place, {"w": jnp.zeros(1000, int), "n": 0}, step=step)
        assert found["n"] == came.index(True)
    assert verify_checkpoint(place) == []


SAVER = """
import itertools, json, sys
import jax.numpy as jnp
from vibe_store import CheckpointManager
url, options = json.loads(sys.argv[1])
manager = CheckpointManager(url, storage_options=options, max_to_keep=100)
for step in itertools.count():
    manager.save(step, {"w": jnp.full(1000, 5), "n": 5})
    manager.wait()
    print(step, flush=True)
"""


def test_a_killed_writer_leaves_what_was_committed_and_the_next_one_goes_on(
    bucket: Any, place: UrlPath
) -> None:
    what = json.dumps([place.url, bucket.storage_options])
    process = subprocess.Popen([sys.executable, "-c", SAVER, what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert verify_checkpoint(place) == []
    with CheckpointManager(place, max_to_keep=1) as manager:
        newest = manager.latest_step()
        assert newest is not None
        assert newest >= last
        found = manager.restore(None, {"w": jnp.zeros(1000, int), "n": 0})
        assert found["n"] == 5
        manager.save(newest + 1, found)
        manager.wait()
        assert manager.all_steps() == [newest + 1]


def test_the_writer_before_stops_at_its_next_save(place: UrlPath, monkeypatch: pytest.MonkeyPatch) -> None:
    zombie = CheckpointManager(place)
    zombie.save(1, tree(1))
    zombie.wait()
    with monkeypatch.context() as patch:
        patch.setattr("vibe_store.checkpoint.writer_id._id", "another")
        CheckpointManager(place).become_writer()
    zombie.save(2, tree(2))
    with pytest.raises((SaveFailedError, WriterSupersededError)):
        zombie.wait()
    assert zombie.all_steps() == [1]


def test_the_commands_list_verify_and_copy(
    bucket: Any, place: UrlPath, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with CheckpointManager(place / "checkpoints") as manager:
        for step in (10, 20):
            manager.save(step, tree(step))
    options = json.dumps(bucket.storage_options)

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0, capfd.readouterr()
        said = capfd.readouterr()
        for secret in bucket.secrets:
            assert secret not in said.out + said.err
        return said.out

    listed = json.loads(run("ls", place.url, "--storage-options", options, "--json"))
    assert "20" in json.dumps(listed)
    run("verify", place.url, "--storage-options", options)
    copied = run("copy", place.url, str(tmp_path / "copy"), "--source-options", options)
    assert "Copied 2 checkpoints" in copied
    check(load_checkpoint(tmp_path / "copy", tree(0), step=20), 20)
    back = run("copy", str(tmp_path / "copy"), f"{place.url}/back", "--target-options", options)
    assert "Copied 2 checkpoints" in back
    assert verify_checkpoint(place / "back") == []


def test_a_run_trains_into_a_container_and_resumes_to_the_same_bits(az: Any) -> None:
    place = UrlPath(az.opener()().url, az.storage_options)
    gymnax = pytest.importorskip("gymnax", reason='needs pip install "vibe-store[rl]"')
    from vibe_store.algorithms.dqn import DQNConfig
    from vibe_store.runner import RunnerConfig, train_dqn

    def train(name: str, steps: int, *, resume: bool = False) -> Any:
        return train_dqn(
            *gymnax.make("CartPole-v1"),
            dqn_config=DQNConfig(hidden_sizes=(8,), buffer_size=256, batch_size=8, learning_starts=64),
            runner_config=RunnerConfig(
                total_timesteps=steps,
                num_envs=4,
                checkpoint_dir=place / name,
                checkpoint_interval=128,
                eval_interval=None,
                resume=resume,
            ),
        )

    straight = train("straight", 512)
    train("halves", 256)
    resumed = train("halves", 512, resume=True)
    assert resumed.resumed_from == 256
    assert eqx.tree_equal((straight.state, straight.runner), (resumed.state, resumed.runner))


def test_metrics_are_logged_beside_the_checkpoints(place: UrlPath) -> None:
    for step, loss in ((1, 0.5), (2, 0.25)):
        with MetricsLogger(place / "metrics.jsonl") as logger:
            logger.write({"step": step, "loss": loss})
    assert [row["loss"] for row in read_metrics(place / "metrics.jsonl")] == [0.5, 0.25]
