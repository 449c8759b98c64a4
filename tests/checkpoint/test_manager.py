"""CheckpointManager: what it saves, when, and what comes back."""

import inspect
import logging
import math
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.checkpoint import CheckpointManager
from vibe_store.errors import (
    CheckpointerClosedError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    StepAlreadyExistsError,
    UnknownProviderError,
)
from vibe_store.storage.local import LocalStorage
from vibe_store.testing import Call, Fault, FaultyStorage


def _commits(call: Call) -> bool:
    return call.method == "write" and call.keys[0].endswith("manifest.json")


_SLOW = Fault(_commits, "delay", seconds=0.3)


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_the_parameters_have_the_promised_names_and_defaults() -> None:
    parameters = inspect.signature(CheckpointManager).parameters
    promised = {
        "max_to_keep": 5,
        "keep_period": None,
        "save_interval_steps": 1,
        "async_timeout_secs": 7200,
        "best_fn": None,
        "best_mode": "min",
    }
    assert {name: parameters[name].default for name in promised} == promised
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["directory"]
    save = inspect.signature(CheckpointManager.save).parameters
    assert list(save)[:5] == ["self", "step", "pytree", "items", "metrics"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default in (None, False) for p in list(save.values())[3:])
    assert list(inspect.signature(CheckpointManager.restore).parameters)[:3] == ["self", "step", "like"]


def test_a_save_may_take_for_ever_and_metrics_may_be_numpys(tmp_path: Path, scenarios: ModuleType) -> None:
    with CheckpointManager(tmp_path, async_timeout_secs=math.inf) as manager:
        assert manager.save(2, scenarios.tree(2), metrics={"loss": np.float32(0.5)})
        assert manager.info(2).metrics == {"loss": 0.5}


def test_only_multiples_of_the_interval_are_saved_unless_forced(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    with CheckpointManager(tmp_path, save_interval_steps=10, max_to_keep=9) as manager:
        saved = [step for step in range(31) if manager.save(step, scenarios.tree(step))]
        assert saved == [0, 10, 20, 30]
        assert manager.save(33, scenarios.tree(33), force=True)
        assert manager.all_steps() == [0, 10, 20, 30, 33]


def test_a_save_returns_before_it_is_written_and_whoever_reads_sees_it(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    storage = LocalStorage(str(tmp_path))
    with CheckpointManager(FaultyStorage(storage, _SLOW)) as manager:
        manager.save(1, scenarios.tree(1))
        assert not (tmp_path / "step_1" / "manifest.json").exists()
        assert manager.last_committed is None
        assert manager.all_steps() == [1]
        assert manager.last_committed is not None
        manager.save(2, scenarios.tree(2))
        assert manager.latest_step() == 2
        manager.save(3, scenarios.tree(3))
        assert scenarios.same(manager.restore(None, scenarios.tree(0)), scenarios.tree(3))
        manager.save(4, scenarios.tree(4))
        manager.wait()
        assert (tmp_path / "step_4" / "manifest.json").exists()
        manager.save(5, scenarios.tree(5))
    assert (tmp_path / "step_5" / "manifest.json").exists()


def test_a_save_waits_for_the_one_before_and_the_log_says_so(
    tmp_path: Path, scenarios: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(FaultyStorage(LocalStorage(str(tmp_path)), _SLOW)) as manager:
        manager.save(1, scenarios.tree(1))
        with caplog.at_level(logging.INFO, "vibe_store"):
            manager.save(2, scenarios.tree(2))
        assert (tmp_path / "step_1" / "manifest.json").exists()
    assert any("The save of step 2 waited 0." in message for message in caplog.messages)
    assert any(message.endswith("s for that of step 1.") for message in caplog.messages)


def test_without_a_timeout_a_save_is_written_in_the_callers_thread(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    threads: list[threading.Thread] = []

    def note(call: Call) -> bool:
        threads.append(threading.current_thread())
        return call.index == -1

    storage = FaultyStorage(LocalStorage(str(tmp_path)), Fault(note))
    CheckpointManager(storage, async_timeout_secs=None).save(1, scenarios.tree(1))
    assert set(threads) == {threading.current_thread()}
    assert (tmp_path / "step_1" / "manifest.json").exists()


def test_items_load_apart_and_the_state_alone_does_not_need_them(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, scenarios.tree(1), items={"replay": scenarios.tree(2), "env-0": scenarios.tree(3)})
        manager.wait()
        _damage(tmp_path / "step_1" / "replay.eqx")
        assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(1))
        _, items = manager.restore(1, scenarios.tree(0), items={"env-0": scenarios.tree(0)})
        assert scenarios.same(items["env-0"], scenarios.tree(3))
        with pytest.raises(CorruptCheckpointError, match=r"replay\.eqx"):
            manager.restore(1, scenarios.tree(0), items={"replay": scenarios.tree(0)})
        with pytest.raises(CheckpointNotFoundError, match="no item 'other'; it has env-0, replay, state"):
            manager.restore(1, scenarios.tree(0), items={"other": scenarios.tree(0)})
        with pytest.raises(CheckpointNotFoundError, match="no item 'other'"):
            manager.restore(None, scenarios.tree(0), items={"other": scenarios.tree(0)})


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", "-x", "a.b", "state", "State", "manifest", "metadata", "x" * 201, 3]
)
def test_an_item_name_that_cannot_be_a_file_name_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(InvalidValueError, match="The item name"):
        CheckpointManager(tmp_path).save(1, {}, items={name: {}})
    assert list(tmp_path.iterdir()) == []


def test_restoring_the_newest_passes_over_damaged_ones_and_names_each(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    _damage(tmp_path / "step_3" / "manifest.json")
    _damage(tmp_path / "step_2" / "state.eqx")
    manager = CheckpointManager(tmp_path)
    with pytest.warns(DamagedCheckpointWarning) as warned:
        assert scenarios.same(manager.restore(None, scenarios.tree(0)), scenarios.tree(1))
    assert [str(each.message)[:6] for each in warned] == ["Step 3", "Step 2"]
    assert {each.filename for each in warned} == {__file__}
    _damage(tmp_path / "step_1" / "state.eqx")
    with (
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(CorruptCheckpointError, match=r"None of the steps \[1, 2, 3\]"),
    ):
        manager.restore(None, scenarios.tree(0))


def test_restoring_a_damaged_step_by_its_number_is_an_error(tmp_path: Path, scenarios: ModuleType) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    _damage(tmp_path / "step_3" / "state.eqx")
    with pytest.raises(CorruptCheckpointError, match=r"step_3/state\.eqx"):
        CheckpointManager(tmp_path).restore(3, scenarios.tree(0))


def test_restoring_where_nothing_is_says_so(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="There is no checkpoint in"):
        manager.restore(None, {})
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 5"):
        manager.restore(5, {})


def test_reading_creates_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "none")
    assert manager.all_steps() == []
    assert manager.best_step() is None
    manager.close()
    assert not (tmp_path / "none").exists()


def test_saving_a_step_twice_says_what_to_do(tmp_path: Path, scenarios: ModuleType) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, scenarios.tree(1))
        with pytest.raises(StepAlreadyExistsError, match=r"step 1 is already in .* save_checkpoint\(\)"):
            manager.save(1, scenarios.tree(2))


def test_a_foreign_file_whose_name_begins_like_the_manifest_is_no_checkpoint(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "manifest.json.bak").write_text("{}")
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(1, scenarios.tree(1))
        assert manager.all_steps() == [1]


def test_a_closed_manager_saves_no_more_but_still_reads(tmp_path: Path, scenarios: ModuleType) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, scenarios.tree(1))
    manager.close()
    manager.close()
    with pytest.raises(CheckpointerClosedError, match="step 2 cannot be saved"):
        manager.save(2, scenarios.tree(2))
    assert scenarios.same(manager.restore(1, scenarios.tree(0)), scenarios.tree(1))


def test_a_closed_manager_writes_nothing_on_or_off_the_interval_and_locks_nobody_out(
    tmp_path: Path, scenarios: ModuleType, processes: Any
) -> None:
    manager = CheckpointManager(tmp_path, save_interval_steps=10)
    manager.save(10, scenarios.tree(10))
    manager.close()
    for refused in (
        lambda: manager.save(20, scenarios.tree(20)),
        lambda: manager.save(21, scenarios.tree(21)),
        lambda: manager.pin(10),
        lambda: manager.unpin(10),
        manager.become_writer,
    ):
        with pytest.raises(CheckpointerClosedError, match=r"was closed, so .* Open another manager"):
            refused()
    processes.run("save_checkpoint(arguments['root'], tree(30), step=30)", root=str(tmp_path))
    assert not manager.info(10).pinned
    assert manager.all_steps() == [10, 30]


@pytest.mark.parametrize("step", [-1, True, 1.0, "5", None, np.float32(1), jnp.float32(5), np.array(5.0)])
def test_a_step_that_is_no_whole_number_from_zero_up_is_refused(tmp_path: Path, step: Any) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(InvalidValueError, match="A step is"):
        manager.save(step, {})
    if step is not None:
        with pytest.raises(InvalidValueError, match="A step is"):
            manager.restore(step, {})


@pytest.mark.parametrize("step", [np.int64(7), jnp.asarray(7), 7])
def test_whole_numbers_of_numpy_and_jax_are_steps(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save(step, {"a": 1})
        assert manager.all_steps() == [7]


@pytest.mark.parametrize("value", ["5", b"5", True, None, [1.0], {}, 1j, 10**400, np.zeros(2)], ids=repr)
def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidValueError, match="The metric 'loss' is"):
        CheckpointManager(tmp_path).save(1, {}, metrics={"loss": value})


@pytest.mark.parametrize("metrics", [[1.0], 5, "loss"])
def test_metrics_that_are_no_dict_are_refused(tmp_path: Path, metrics: Any) -> None:
    with pytest.raises(InvalidValueError, match="metrics is a dict of numbers by name"):
        CheckpointManager(tmp_path).save(1, {}, metrics=metrics)


@pytest.mark.parametrize(
    ("metadata", "path"),
    [
        ({"a": {"b": [0, math.nan]}}, r"metadata\['a'\]\['b'\]\[1\] is nan"),
        ({"a": math.inf}, r"metadata\['a'\] is inf"),
        ({"a": {5: 1}}, r"metadata\['a'\] has the key 5"),
        ({"a": [object()]}, r"metadata\['a'\]\[0\] is <object"),
        ({"a": np.float32(1)}, r"metadata\['a'\] is .* of type float32"),
        ({"a": [10**5000]}, r"metadata\['a'\]\[0\] is a whole number of more than 4300 digits"),
        ([1], "metadata is a dict"),
    ],
)
def test_metadata_that_is_no_json_is_refused_by_path(tmp_path: Path, metadata: Any, path: str) -> None:
    with pytest.raises(InvalidValueError, match=path):
        CheckpointManager(tmp_path).save(1, {}, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def test_metadata_that_contains_itself_is_refused(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {}
    metadata["a"] = metadata
    with pytest.raises(InvalidValueError, match="contains itself"):
        CheckpointManager(tmp_path).save(1, {}, metadata=metadata)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_to_keep": 0}, "max_to_keep .* 1 or more; got 0"),
        ({"keep_period": 0}, "keep_period .* got 0"),
        ({"keep_period": np.array(2.0)}, r"keep_period .* got array\(2\.\)"),
        ({"save_interval_steps": 0}, "save_interval_steps .* got 0"),
        ({"save_interval_steps": 1.5}, r"save_interval_steps .* got 1\.5"),
        ({"async_timeout_secs": 0}, "async_timeout_secs .* got 0"),
        ({"async_timeout_secs": "1"}, "async_timeout_secs .* got '1'"),
        ({"best_fn": "loss"}, "best_fn is a function .* got 'loss'"),
        ({"best_mode": "best"}, "best_mode .* got 'best'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        CheckpointManager(tmp_path, **options)


@pytest.mark.parametrize(
    ("directory", "options"),
    [("x", {"serializer": "pickle"}), ("x", {"retention": "none"}), ("nosuch://x", {})],
)
def test_an_unknown_serializer_policy_or_scheme_is_named(directory: str, options: dict[str, Any]) -> None:
    with pytest.raises(UnknownProviderError):
        CheckpointManager(directory, **options)


def test_a_relative_directory_stays_the_same_after_a_change_of_folder(
    tmp_path: Path, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("checkpoints") as manager:
        manager.save(1, scenarios.tree(1))
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        manager.save(2, scenarios.tree(2))
        assert manager.all_steps() == [1, 2]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_names_that_only_look_like_steps_are_no_steps(tmp_path: Path, scenarios: ModuleType) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    for name in ("step_007", "step_-1", "step_", "step_1x", "Step_8", "xstep_1", "step_\u0665"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes((tmp_path / "step_1" / "manifest.json").read_bytes())
    assert CheckpointManager(tmp_path).all_steps() == [1, 2, 3]


def test_leaving_the_block_waits_for_the_last_save_and_does_not_hide_the_bodys_own_error(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    faulty = FaultyStorage(LocalStorage(str(tmp_path)), Fault(lambda call: call.method == "put", seconds=0.1))
    with pytest.raises(KeyError, match="own") as caught, CheckpointManager(faulty) as manager:  # noqa: PT012 - the block is what is tested
        manager.save(1, scenarios.tree(1))
        raise KeyError("own")
    assert any("The save of step 1 failed" in note for note in caught.value.__notes__)


def test_a_read_only_directory_restores_and_a_save_there_says_what_to_do(
    fast_path: Path, scenarios: ModuleType, processes: Any
) -> None:
    scenarios.prepare(LocalStorage(str(fast_path)))
    for path in [fast_path, *fast_path.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code = """
    import os
    if os.geteuid() == 0:
        os.setgid(65534), os.setuid(65534)
    manager = CheckpointManager(arguments["root"])
    assert same(manager.restore(None, tree(0)), tree(3))
    try:
        manager.save(4, tree(4))
    except PermissionError as error:
        print(error)
    """
    try:
        output = processes.run(code, root=str(fast_path))
    finally:
        for path in [fast_path, *fast_path.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert f"Could not write to '{fast_path}'" in output
    assert "Check the permissions" in output


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path, scenarios: ModuleType) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"is, or lies below, a file\. Choose a folder"):
        CheckpointManager(tmp_path / "file").save(1, scenarios.tree(1))
    with pytest.raises(NotADirectoryError, match="Choose a folder"):
        CheckpointManager(tmp_path / "file" / "below").all_steps()
    assert (tmp_path / "file").read_text() == "mine"


def test_of_equals_the_earliest_is_best_and_a_metric_may_be_nan(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: math.nan, 4: 1.0}
    with CheckpointManager(tmp_path, best_fn=lambda metrics: metrics["loss"], max_to_keep=9) as manager:
        for step, loss in losses.items():
            manager.save(step, {}, metrics={"loss": loss})
        assert manager.best_step() == 2
        metrics = manager.info(3).metrics
        assert metrics is not None
        assert math.isnan(metrics["loss"])


@pytest.mark.parametrize("rank", [None, "high", [1], object()])
def test_a_best_fn_that_returns_no_number_is_refused_at_the_save(tmp_path: Path, rank: Any) -> None:
    manager = CheckpointManager(tmp_path, best_fn=lambda _: rank)
    with pytest.raises(InvalidValueError, match="best_fn returned"):
        manager.save(1, {}, metrics={"loss": 1.0})
    assert manager.all_steps() == []


def test_a_best_fn_that_raises_is_told_with_its_metrics_at_the_save(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, best_fn=lambda metrics: 1 / metrics["loss"])
    said = r"best_fn raised ZeroDivisionError for the metrics \{'loss': 0\.0\}"
    with pytest.raises(InvalidValueError, match=said):
        manager.save(1, {}, metrics={"loss": 0.0})
    assert manager.all_steps() == []
