"""Saving and loading one checkpoint outside a training loop."""

import inspect
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.checkpoint import (
    CheckpointManager,
    find_checkpoint,
    initialize_checkpoint_dir,
    list_checkpoints,
    load_checkpoint,
    load_eqx,
    load_manifest,
    load_metadata,
    save_checkpoint,
    save_eqx,
    verify_checkpoint,
)
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    InvalidValueError,
    TemplateMismatchError,
    UnsupportedLeafError,
    UnverifiedCheckpointWarning,
)
from vibe_store.interfaces import StorageBackend
from vibe_store.run_dir import RunDir
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.url_path import UrlPath
from vibe_store.testing import Call, Fault, FaultyStorage


def test_the_parameters_have_the_promised_names_and_defaults() -> None:
    save = inspect.signature(save_checkpoint).parameters
    assert list(save)[:5] == ["directory", "pytree", "step", "metadata", "unreplicate"]
    assert [save[name].default for name in ("step", "metadata", "unreplicate")] == [None, None, False]
    load = inspect.signature(load_checkpoint).parameters
    assert list(load)[:4] == ["directory", "like", "step", "replicate_to"]
    assert [load[name].default for name in ("step", "replicate_to")] == [None, None]
    for parameters, positional in ((save, 2), (load, 2), (inspect.signature(load_metadata).parameters, 1)):
        kinds = [p.kind for p in parameters.values()]
        assert kinds[positional:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - positional)


@pytest.mark.parametrize("step", [None, 0, 1000])
def test_what_was_saved_comes_back_with_its_metadata(
    storage: StorageBackend, scenarios: ModuleType, step: int | None
) -> None:
    save_checkpoint(
        storage, scenarios.tree(1), step=step, metadata={"env": "CartPole-v1", "n": [1, None, 0.5]}
    )
    assert scenarios.same(load_checkpoint(storage, scenarios.tree(0), step=step), scenarios.tree(1))
    assert load_metadata(storage, step=step) == {"env": "CartPole-v1", "n": [1, None, 0.5]}


def test_the_files_are_where_the_layout_says(tmp_path: Path, scenarios: ModuleType) -> None:
    save_checkpoint(tmp_path / "new" / "folder", scenarios.tree(1), step=1000, metadata={})
    save_checkpoint(tmp_path / "root", scenarios.tree(1))
    names = {path.name for path in (tmp_path / "new" / "folder" / "step_1000").iterdir()}
    assert names == {"state.eqx", "metadata.json", "manifest.json"}
    assert {path.name for path in (tmp_path / "root").iterdir()} == {
        "state.eqx",
        "manifest.json",
        ".vibe_store",
    }


def test_without_a_step_the_directory_itself_is_read_be_it_a_root_or_a_step_folder(
    tmp_path: Path, scenarios: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir("run", base_dir=tmp_path)
    save_checkpoint(run.checkpoints, scenarios.tree(5), step=5, metadata={"seed": 5})
    save_checkpoint(run.checkpoints, scenarios.tree(1), metadata={"seed": 1})
    run.mark_best(5)
    (tmp_path / "link").symlink_to(run.checkpoints / "best")
    folder = run.checkpoints / "step_5"
    monkeypatch.chdir(run.checkpoints)
    absolute = [folder, f"{folder}/", run.checkpoints / "best", tmp_path / "link"]
    urls = [f"{scheme}{path}" for scheme in ("file://", "local://") for path in absolute]
    places = [run.best_checkpoint, str(folder), *absolute, *urls, UrlPath(f"file://{folder}")]
    for place in [*places, "step_5", "best", "best/", "./step_5/"]:
        assert place is not None
        assert scenarios.same(load_checkpoint(place, scenarios.tree(0)), scenarios.tree(5)), place
        assert load_metadata(place) == {"seed": 5}
    assert scenarios.same(load_checkpoint(run.checkpoints, scenarios.tree(0)), scenarios.tree(1))
    assert load_metadata(run.checkpoints) == {"seed": 1}


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_saving_into_a_step_folder_or_a_link_to_one_saves_that_step(
    tmp_path: Path, scenarios: ModuleType, scheme: str
) -> None:
    run = tmp_path / "run"
    save_checkpoint(f"{scheme}{run}/step_5", scenarios.tree(5))
    (run / "best").symlink_to("step_5")
    (tmp_path / "link").symlink_to(run / "best")
    assert CheckpointManager(run).all_steps() == [5]
    for seed, place in enumerate((run / "best", tmp_path / "link"), start=6):
        save_checkpoint(f"{scheme}{place}", scenarios.tree(seed))
        assert scenarios.same(load_checkpoint(run, scenarios.tree(0), step=5), scenarios.tree(seed))
        assert place.is_symlink()


def test_options_for_a_storage_that_is_open_already_are_refused(tmp_path: Path) -> None:
    options = {"endpoint_url": "http://localhost"}
    calls: list[Callable[[StorageBackend], object]] = [
        lambda storage: save_checkpoint(storage, {"a": 1}, storage_options=options),
        lambda storage: load_checkpoint(storage, {"a": 1}, step=5, storage_options=options),
        lambda storage: list_checkpoints(storage, storage_options=options),
        lambda storage: find_checkpoint(storage, storage_options=options),
        lambda storage: CheckpointManager(storage, storage_options=options),
        lambda storage: initialize_checkpoint_dir(storage, storage_options=options),
    ]
    for call in calls:
        with pytest.raises(InvalidValueError, match=r"is open already, so the .*\['endpoint_url'\] would"):
            call(LocalStorage(str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_step_folder_that_was_copied_elsewhere_loads(tmp_path: Path, scenarios: ModuleType) -> None:
    save_checkpoint(tmp_path / "run", scenarios.tree(5), step=5, metadata={"seed": 5})
    save_checkpoint(tmp_path / "run", scenarios.tree(55), step=5, metadata={"seed": 55})
    shutil.copytree(tmp_path / "run" / "step_5", tmp_path / "best_model")
    assert scenarios.same(load_checkpoint(tmp_path / "best_model", scenarios.tree(0)), scenarios.tree(55))
    assert load_metadata(tmp_path / "best_model") == {"seed": 55}
    assert scenarios.same(
        load_eqx(tmp_path / "best_model" / "state.eqx", scenarios.tree(0)), scenarios.tree(55)
    )
    assert verify_checkpoint(tmp_path / "best_model") == []
    save_checkpoint(tmp_path / "best_model", scenarios.tree(6))
    assert scenarios.same(load_checkpoint(tmp_path / "best_model", scenarios.tree(0)), scenarios.tree(6))
    assert len(list((tmp_path / "best_model").glob("*.eqx"))) == 1


def test_a_checkpoint_that_was_replaced_any_number_of_times_loads_every_way(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    for seed in range(4):
        save_checkpoint(tmp_path, scenarios.tree(seed), step=5, metadata={"seed": seed})
        assert scenarios.same(load_checkpoint(tmp_path, scenarios.tree(9), step=5), scenarios.tree(seed))
        assert scenarios.same(
            load_eqx(tmp_path / "step_5" / "state.eqx", scenarios.tree(9)), scenarios.tree(seed)
        )
        assert load_metadata(tmp_path, step=5) == {"seed": seed}
    assert scenarios.garbage(LocalStorage(str(tmp_path))) == set()
    save_checkpoint(tmp_path, scenarios.tree(7), step=5)
    assert load_metadata(tmp_path, step=5) is None


def test_a_replacement_that_could_not_clean_up_is_committed_all_the_same(
    tmp_path: Path, scenarios: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def cleans_up(call: Call) -> bool:
        return call.method == "delete" and "step_5/state.eqx" in call.keys

    save_checkpoint(tmp_path, scenarios.tree(1), step=5)
    faulty = FaultyStorage(LocalStorage(str(tmp_path)), Fault(cleans_up))
    save_checkpoint(faulty, scenarios.tree(2), step=5)
    assert "stays for now: [Errno 5] injected fault" in caplog.text
    assert scenarios.same(load_eqx(tmp_path / "step_5" / "state.eqx", scenarios.tree(0)), scenarios.tree(2))


def test_a_file_beside_a_damaged_manifest_is_read_with_a_warning(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    save_checkpoint(tmp_path, scenarios.tree(1), step=5)
    (tmp_path / "step_5" / "manifest.json").write_text("{}")
    with pytest.warns(DamagedCheckpointWarning, match="is read as it is") as warned:
        loaded = load_eqx(tmp_path / "step_5" / "state.eqx", scenarios.tree(0))
    assert scenarios.same(loaded, scenarios.tree(1))
    assert warned[0].filename == __file__


def test_load_eqx_reads_a_whole_file_while_its_checkpoint_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": 0}, step=5)

    def replace() -> None:
        for value in range(1, 200):
            save_checkpoint(tmp_path, {"a": value}, step=5)

    loaded = []
    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace)
        while not replacing.done():
            loaded.append(load_eqx(tmp_path / "step_5" / "state.eqx", {"a": 0})["a"])
        replacing.result()
    assert loaded == sorted(loaded)


def test_save_eqx_does_not_damage_a_checkpoint(tmp_path: Path) -> None:
    for value in (1, 2):
        save_checkpoint(tmp_path, {"a": value}, step=1, metadata={})
        (tmp_path / "link.eqx").unlink(missing_ok=True)
        (tmp_path / "link.eqx").symlink_to(tmp_path / "step_1" / "state.eqx")
        for path in [*(tmp_path / "step_1").iterdir(), tmp_path / "step_1/state.eqx", tmp_path / "link.eqx"]:
            with pytest.raises(InvalidValueError, match=r"belongs to the checkpoint .* Choose another name"):
                save_eqx(path, {"b": 0})
    save_eqx(tmp_path / "step_1" / "other.eqx", {"b": 0})
    assert verify_checkpoint(tmp_path) == []
    assert load_checkpoint(tmp_path, {"a": 0}, step=1) == {"a": 2}


def test_load_eqx_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no file .*state\.eqx"):
        load_eqx(tmp_path / "step_5" / "state.eqx", {})


def test_a_hand_written_checkpoint_loads_and_is_listed_and_no_manager_counts_or_replaces_it(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    run = RunDir("run", base_dir=tmp_path)
    folder = run.checkpoint_dir(step=5)
    eqx.tree_serialise_leaves(folder / "state.eqx", {"a": jnp.arange(3.0)})
    by_hand = (folder / "state.eqx").read_bytes()
    save_eqx(run.checkpoint_dir(step=6) / "state.eqx", scenarios.tree(6))
    like = {"a": jnp.zeros(3)}
    with pytest.warns(UnverifiedCheckpointWarning):
        assert np.array_equal(load_checkpoint(run.checkpoints, like, step=5)["a"], np.arange(3.0))
    assert scenarios.same(load_checkpoint(run.checkpoints / "step_6", scenarios.tree(0)), scenarios.tree(6))
    assert run.list_checkpoints() == [(5, folder), (6, run.checkpoints / "step_6")]
    assert [status.status for status in list_checkpoints(run.checkpoints)] == ["unverified"] * 2
    with CheckpointManager(run.checkpoints) as manager:
        assert manager.all_steps() == []
        manager.save(5, {"a": jnp.ones(3)})
        assert manager.all_steps() == [5]
    assert (folder / "state.eqx").read_bytes() == by_hand
    assert np.array_equal(load_checkpoint(run.checkpoints, like, step=5)["a"], np.ones(3))
    assert np.array_equal(load_eqx(folder / "state.eqx", like)["a"], np.ones(3))


def test_loading_what_is_not_there_says_what_is(storage: StorageBackend, scenarios: ModuleType) -> None:
    assert load_metadata(storage, step=7) is None
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 7"):
        load_checkpoint(storage, scenarios.tree(0), step=7)
    scenarios.prepare(storage)
    with pytest.raises(
        CheckpointNotFoundError, match=r"no checkpoint in .* It has the steps 1, 2, 3; pass one"
    ):
        load_checkpoint(storage, scenarios.tree(0))


def test_loading_into_another_template_names_every_difference(tmp_path: Path, scenarios: ModuleType) -> None:
    save_checkpoint(tmp_path, scenarios.tree(1))
    with pytest.raises(TemplateMismatchError) as caught:
        load_checkpoint(tmp_path, {"w": np.zeros((3, 4)), "n": np.zeros(5, int), "j": 0})
    assert sorted(caught.value.paths) == ["['j']", "['k']", "['w']"]


def test_unreplicate_takes_the_first_replica_and_leaves_what_is_no_array(tmp_path: Path) -> None:
    tree = {
        "a": jnp.arange(6.0).reshape(2, 3),
        "n": np.arange(4).reshape(2, 2),
        "key": jax.random.split(jax.random.key(0), 2),
        "f": jax.nn.relu,
        "s": "text",
        "i": 3,
    }
    save_checkpoint(tmp_path, tree, step=1, unreplicate=True)
    like = {**tree, "a": jnp.zeros(3), "n": np.zeros(2, int), "key": jax.random.key(1)}
    loaded = load_checkpoint(tmp_path, like, step=1)
    assert np.array_equal(loaded["a"], [0, 1, 2])
    assert np.array_equal(loaded["n"], [0, 1])
    assert jnp.array_equal(jax.random.key_data(loaded["key"]), jax.random.key_data(tree["key"][0]))
    assert (loaded["f"], loaded["s"], loaded["i"]) == (jax.nn.relu, "text", 3)


@pytest.mark.parametrize(
    "leaf", [jnp.asarray(1.0), np.asarray(1.0), jax.random.key(0)], ids=["jax", "numpy", "key"]
)
def test_unreplicate_refuses_an_array_without_axes_by_path(tmp_path: Path, leaf: Any) -> None:
    with pytest.raises(UnsupportedLeafError, match=r"\['deep'\]\['step'\] is a 0-d array"):
        save_checkpoint(tmp_path, {"deep": {"step": leaf}}, unreplicate=True)
    assert list(tmp_path.iterdir()) == []


def test_unreplicate_refuses_an_array_without_replicas_by_path(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match=r"\['a'\] has the shape \(0, 3\), so it has no first"):
        save_checkpoint(tmp_path, {"a": jnp.ones((0, 3))}, unreplicate=True)


def test_replicate_to_broadcasts_every_array_and_leaves_what_is_no_array(tmp_path: Path) -> None:
    tree = {"a": jnp.arange(3.0), "n": np.arange(2), "key": jax.random.key(0), "f": jax.nn.relu, "i": 3}
    save_checkpoint(tmp_path, tree)
    loaded = load_checkpoint(tmp_path, tree, replicate_to=4)
    assert np.array_equal(loaded["a"], np.tile(np.arange(3.0), (4, 1)))
    assert np.array_equal(loaded["n"], np.tile(np.arange(2), (4, 1)))
    loaded["n"][0] = 9
    assert np.array_equal(loaded["n"][1], [0, 1])
    assert loaded["key"].shape == (4,)
    assert (loaded["f"], loaded["i"]) == (jax.nn.relu, 3)
    for count in (0, -1, True, 2.0):
        with pytest.raises(InvalidValueError, match="replicate_to"):
            load_checkpoint(tmp_path, tree, replicate_to=count)  # type: ignore[arg-type]  # a wrong type, or any, is the point


def test_a_bad_argument_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options, message in (
        ({"step": -1}, "A step is"),
        ({"metadata": {"a": {1, 2}}}, r"metadata\['a'\]"),
        ({"metrics": {"loss": "low"}}, "The metric 'loss'"),
        ({"metrics": {"loss": 10**5000}}, "The metric 'loss' is a number too large"),
        ({"items": [1]}, "items is a dict"),
        ({"serializer": 123}, "serializer is the name of a serializer, or one, .* got 123"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            save_checkpoint(tmp_path, {}, **options)  # type: ignore[arg-type]  # a wrong type, or any, is the point
    assert list(tmp_path.iterdir()) == []


def test_one_flipped_bit_anywhere_in_any_file_is_noticed_and_the_step_before_is_restored(
    tmp_path: Path, scenarios: ModuleType
) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    random = np.random.default_rng(0)
    for path in sorted((tmp_path / "step_3").iterdir()):
        good = path.read_bytes()
        for position in random.choice(len(good) * 8, size=25, replace=False):
            bad = bytearray(good)
            bad[position // 8] ^= 1 << int(position % 8)
            path.write_bytes(bad)
            assert [fault.step for fault in verify_checkpoint(tmp_path)] == [3]
            if path.name in {"state.eqx", "manifest.json"}:
                with pytest.raises(CorruptCheckpointError):
                    load_checkpoint(tmp_path, scenarios.tree(0), step=3)
                with pytest.warns(DamagedCheckpointWarning, match="Step 3"):
                    restored = CheckpointManager(tmp_path).restore(None, scenarios.tree(0))
                assert scenarios.same(restored, scenarios.tree(2))
            if path.name == "metadata.json":
                with pytest.raises(CorruptCheckpointError, match=r"metadata\.json"):
                    load_metadata(tmp_path, step=3)
        path.write_bytes(good)
    assert verify_checkpoint(tmp_path) == []


@pytest.mark.parametrize("damage", ["removed", "cut", "lengthened", "emptied", "swapped", "a folder"])
def test_a_file_that_is_not_the_one_that_was_saved_is_noticed(
    tmp_path: Path, scenarios: ModuleType, damage: str
) -> None:
    scenarios.prepare(LocalStorage(str(tmp_path)))
    path, other = tmp_path / "step_3" / "state.eqx", tmp_path / "step_2" / "state.eqx"
    good = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "removed":
        changed = {
            "cut": good[:-1],
            "lengthened": good + b"\0",
            "emptied": b"",
            "swapped": other.read_bytes(),
        }
        path.write_bytes(changed[damage])
    with pytest.raises(CorruptCheckpointError, match=r"step_3/state\.eqx"):
        load_checkpoint(tmp_path, scenarios.tree(0), step=3)
    faults = verify_checkpoint(tmp_path)
    assert [(fault.step, fault.file) for fault in faults] == [(3, "step_3/state.eqx")]


def test_a_file_changed_on_a_storage_that_is_no_disk_is_noticed(
    storage: StorageBackend, scenarios: ModuleType
) -> None:
    scenarios.prepare(storage)
    key = f"step_3/{load_manifest(storage, step=3).items['state'].files['state.eqx'].key}"
    whole = storage.read(key)
    flipped = bytearray(whole)
    flipped[200] ^= 4
    for damaged in (bytes(flipped), whole[:-1], whole + b"more"):
        storage.write(key, damaged)
        with pytest.raises(CorruptCheckpointError, match=re.escape(key)):
            load_checkpoint(storage, scenarios.tree(0), step=3)
    storage.delete([key])
    with pytest.raises(CorruptCheckpointError, match=f"{re.escape(key)} is missing"):
        load_checkpoint(storage, scenarios.tree(0), step=3)


def test_an_unreadable_folder_is_an_error_and_not_passed_over(
    fast_path: Path, scenarios: ModuleType, processes: Any
) -> None:
    scenarios.prepare(LocalStorage(str(fast_path)))
    (fast_path / "step_3").chmod(0)
    code = """
    import os
    if os.geteuid() == 0:
        os.setgid(65534), os.setuid(65534)
    try:
        CheckpointManager(arguments["root"]).restore(None, tree(0))
    except PermissionError as error:
        print(error)
    """
    try:
        assert "step_3" in processes.run(code, root=os.fspath(fast_path))
    finally:
        (fast_path / "step_3").chmod(0o755)


def test_metadata_that_was_written_by_hand_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "step_10000"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"env": "CartPole-v1"}')
    assert load_metadata(tmp_path, step=10000) == {"env": "CartPole-v1"}
    assert load_metadata(folder) == {"env": "CartPole-v1"}
    (folder / "metadata.json").write_text("[1]")
    with pytest.raises(CorruptCheckpointError, match=r"metadata\.json holds no JSON object"):
        load_metadata(folder)


def test_a_serializer_is_named_with_its_options(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    tree = {"a": np.arange(100_000) // 1_000}
    for name in ("orbax", "orbax:compress=true"):
        save_checkpoint(tmp_path, tree, step=len(name), serializer=name)
        assert load_manifest(tmp_path, step=len(name)).items["state"].serializer == "orbax"
    plain, compressed = (load_manifest(tmp_path, step=step).size for step in (5, 19))
    assert compressed < plain / 10
    assert load_checkpoint(tmp_path, tree, step=19)["a"].shape == (100_000,)
    with pytest.raises(InvalidValueError, match="'orbax' takes compress; 'level' is none of them"):
        save_checkpoint(tmp_path, tree, serializer="orbax:level=1")
