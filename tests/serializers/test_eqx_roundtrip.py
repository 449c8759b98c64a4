"""What is saved to one ``.eqx`` file comes back, bit for bit, and the file says what is in it."""

import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash

from vibe_store.errors import InvalidValueError, TemplateMismatchError
from vibe_store.serializers.eqx import EqxSerializer, load_eqx, save_eqx
from vibe_store.serializers.tree import describe

Same = Callable[[Any, Any], None]


def through_file(tree: Any, tmp_path: Path, like: Any = None) -> Any:
    save_eqx(tmp_path / "tree.eqx", tree)
    return load_eqx(tmp_path / "tree.eqx", tree if like is None else like)


def test_every_tree_comes_back_through_a_file(tree: Any, tmp_path: Path, assert_same: Same) -> None:
    assert_same(through_file(tree, tmp_path), tree)


def test_a_leaf_of_many_chunks_and_a_tree_of_many_leaves_come_back(tmp_path: Path, assert_same: Same) -> None:
    rng = np.random.default_rng(0)
    tree = {
        "large": jnp.asarray(rng.integers(0, 255, (9 << 20) + 13, np.uint8)),
        "many": [np.full((i % 3,), i) for i in range(3000)],
    }
    assert_same(through_file(tree, tmp_path), tree)


def test_the_serializer_returns_what_it_wrote_and_loads_it(
    tmp_path: Path, assert_same: Same, folder_source: Any
) -> None:
    serializer = EqxSerializer()
    tree = {"a": jnp.arange(3), "key": jax.random.key(1), "s": "x", "b": b"y", "n": np.ones(2), "f": jnp.sin}
    saved = serializer.save(serializer.snapshot(tree), tmp_path, "state")
    assert [entry.name for entry in saved.files] == ["state.eqx"]
    assert [path.name for path in tmp_path.iterdir()] == ["state.eqx"]
    assert [leaf.path for leaf in saved.leaves] == [leaf.path for leaf in describe(tree)]
    source = folder_source(tmp_path, saved)
    source.path("state.eqx")  # checks the size and the checksum that were computed while writing
    assert_same(serializer.load(source, "state", tree), tree)


def test_each_row_says_where_the_data_of_its_leaf_begins_and_what_its_checksum_is(tmp_path: Path) -> None:
    tree = [jnp.arange(3), np.arange(9 << 20, dtype=np.uint8), 0.5, "text", np.asfortranarray(np.eye(3)[:2])]
    saved = EqxSerializer().save(tree, tmp_path, "state")
    data = (tmp_path / "state.eqx").read_bytes()
    for leaf, row in zip(tree, saved.leaves, strict=True):
        if isinstance(leaf, str):
            assert row.offset is row.checksum is None
            continue
        raw = np.asarray(leaf).tobytes()
        assert row.offset is not None
        assert data[row.offset : row.offset + len(raw)] == raw
        assert row.checksum == xxhash.xxh3_128_hexdigest(raw)


def test_a_live_tree_and_its_snapshot_are_stored_alike(tmp_path: Path) -> None:
    serializer = EqxSerializer()
    tree = {"a": jnp.arange(3), "key": jax.random.key(1), "n": np.asfortranarray(np.ones((2, 3)))}
    live = serializer.save(tree, tmp_path, "live")
    snapshot = serializer.save(serializer.snapshot(serializer.snapshot(tree)), tmp_path, "snapshot")
    assert live.leaves == snapshot.leaves
    assert (tmp_path / "live.eqx").read_bytes() == (tmp_path / "snapshot.eqx").read_bytes()


def test_a_partial_template_gets_its_leaves_and_the_rest_is_still_verified(
    tmp_path: Path, assert_same: Same, folder_source: Any
) -> None:
    serializer = EqxSerializer()
    tree = {
        "a": jnp.arange(3),
        "big": np.ones(6 << 20, np.uint8),
        "c": {"d": jnp.ones(2), "e": "text"},
        "z": 1,
    }
    saved = serializer.save(tree, tmp_path, "state")
    like = {"a": jnp.zeros(3, jnp.int32), "c": {"d": jnp.zeros(2)}}
    loaded = serializer.load(folder_source(tmp_path, saved), "state", like, partial=True)
    assert_same(loaded, {"a": tree["a"], "c": {"d": tree["c"]["d"]}})


def test_save_eqx_makes_folders_and_replaces_a_file_through_a_link_keeping_its_permissions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a" / "b" / "tree"
    save_eqx(path, jnp.arange(3))
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    save_eqx(str(link), jnp.arange(4))
    assert link.is_symlink()
    assert load_eqx(path, jnp.zeros(4, jnp.int32)).tolist() == [0, 1, 2, 3]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["tree"]


def test_a_template_that_differs_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    save_eqx(tmp_path / "tree.eqx", {"a": np.ones(2)})
    with pytest.raises(TemplateMismatchError, match=rf"(?s){tmp_path}/tree\.eqx.*\['a'\]: dtype float64"):
        load_eqx(tmp_path / "tree.eqx", {"a": np.ones(2, np.float32)})


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_eqx(tmp_path / "tree.eqx", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "tree.eqx").stat().st_mode) == 0o640


@pytest.mark.parametrize("function", [save_eqx, load_eqx])
def test_a_folder_is_refused(function: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=f"{tmp_path} is a folder"):
        function(tmp_path, 1)


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        NotADirectoryError, match=r"Could not write '.*/file/x/m\.eqx': Not a directory\. A part"
    ):
        save_eqx(tmp_path / "file" / "x" / "m.eqx", 1)


def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, np.arange(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{path}.*too large"):
            save_eqx(path, np.ones(9_000_000, np.uint8))
        with pytest.raises(OSError, match="too large"):
            EqxSerializer().save(np.ones(9_000_000, np.uint8), tmp_path, "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_eqx(path, np.zeros(3, np.int64)).tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_an_item_whose_file_is_there_already_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "state.eqx").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match=r"state\.eqx"):
        EqxSerializer().save(np.arange(3), tmp_path, "state")
    assert (tmp_path / "state.eqx").read_bytes() == b"somebody's"


def test_what_a_killed_writer_left_goes_with_the_next_save_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "tree.eqx"
    save_eqx(path, np.arange(3))
    dying = """if True:
        import os, signal, sys, numpy
        from vibe_store import save_eqx
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        save_eqx(sys.argv[1], numpy.zeros(1000))
    """
    assert subprocess.run([sys.executable, "-c", dying, path], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert load_eqx(path, np.zeros(3, np.int64)).tolist() == [0, 1, 2]
    save_eqx(tmp_path / "another.eqx", np.arange(4))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "another.eqx", path]


def test_int64_comes_back_when_x64_is_enabled(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        tree = {"i": jnp.asarray([2**40]), "f": jnp.asarray([1 + 2**-50])}
        loaded = through_file(tree, tmp_path, jax.eval_shape(lambda: tree))
        assert loaded["i"].dtype == jnp.int64
        assert int(loaded["i"][0]) == 2**40
        assert float(loaded["f"][0]) == 1 + 2**-50
