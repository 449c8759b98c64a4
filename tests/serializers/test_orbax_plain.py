"""Plain Orbax, with no vibe_store installed, reads what the serializer ``orbax`` wrote."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store import save_checkpoint

pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')

_WITHOUT_US = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vibe_store":
            raise ImportError("vibe_store is not installed here")

sys.meta_path.insert(0, Blocked())
import jax, jax.numpy as jnp, numpy as np
from orbax.checkpoint import v1 as ocp
folder = sys.argv[1]
"""


def plain(code: str, *arguments: object, warnings: str = "error") -> str:
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", _WITHOUT_US + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, nodes: Any) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tree = {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)},
        "layers": [nodes["Point"](np.arange(3), None), (np.float32(2), "text", jnp.sin, 7)],
        "key": jax.random.key(5),
        "flag": True,
        "rate": 0.5,
        "complex": np.array([1 - 2j]),
        "odd": np.array([1, 2], ">i4"),
        "empty": np.zeros((0, 3)),
    }
    runner = {"a": np.arange(4), "b": [1, 2]}
    save_checkpoint(folder, tree, step=5, serializer="orbax", items={"runner": runner, "texts": ["a", "b"]})
    save_checkpoint(folder / "bare", tree, serializer="orbax")
    for _ in range(2):
        save_checkpoint(folder, runner, step=6, serializer="orbax")
    return folder


def test_the_step_folder_is_a_checkpoint_of_the_natural_tree(checkpoints: Path) -> None:
    code = """
for place in (folder + "/step_5", folder + "/bare"):
    state = ocp.load(place)
    assert set(state) == {"complex", "empty", "flag", "key", "layers", "odd", "params", "rate"}
    assert state["params"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and state["params"]["w"].dtype == "float32"
    assert state["params"]["half"].dtype == jnp.bfloat16
    point, (number, *texts, seven) = state["layers"]
    assert point["x"].tolist() == [0, 1, 2] and point["x"].dtype == "int64"
    assert number == np.float32(2) and number.dtype == "float32" and texts == [None, None]
    assert seven == 7 and type(seven) is int and state["flag"] == np.array(True) and state["rate"] == 0.5
    assert state["complex"].tolist() == [1 - 2j]
    key = jax.random.wrap_key_data(state["key"])
    assert jax.random.bits(key) == jax.random.bits(jax.random.key(5))
    assert state["odd"].view(">i4")[..., 0].tolist() == [1, 2]
    assert state["empty"] is None
"""
    assert plain(code, checkpoints) == ""


def test_further_items_are_checkpointables_by_name(checkpoints: Path) -> None:
    code = """
runner = {"a": np.zeros(4, np.int64), "b": [0, 0]}
loaded = ocp.load_checkpointables(folder + "/step_5", {"runner": runner})
assert loaded["runner"]["a"].tolist() == [0, 1, 2, 3] and loaded["runner"]["b"] == [1, 2]
loaded = ocp.load(folder + "/step_5", runner, checkpointable_name="runner")
assert loaded["a"].tolist() == [0, 1, 2, 3]
"""
    assert plain(code, checkpoints) == ""
    code = """
everything = ocp.load_checkpointables(folder + "/step_5")
assert set(everything) == {"state", "runner", "texts"}
assert everything["runner"]["b"] == [1, 2] and everything["texts"] == {"nothing_stored": 1}
"""
    plain(code, checkpoints)  # Orbax logs that it has no handler by these names, and takes the right one


def test_orbax_makes_jax_arrays_of_them_with_a_sharding_where_its_template_says_so(checkpoints: Path) -> None:
    code = """
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = ocp.metadata(folder + "/step_5").metadata
like = jax.tree.map(lambda leaf: ocp.PLACEHOLDER, like)
like["params"]["w"] = jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=place)
state = ocp.load(folder + "/step_5", like)
assert isinstance(state["params"]["w"], jax.Array) and state["params"]["w"].sharding == place
assert state["params"]["half"] is ocp.PLACEHOLDER
"""
    plain(code, checkpoints)


def test_a_step_that_was_replaced_is_read_from_its_own_folder(checkpoints: Path) -> None:
    code = """
import glob
(item,) = glob.glob(folder + "/step_6/state.*")
assert ocp.load(item, checkpointable_name=None)["a"].tolist() == [0, 1, 2, 3]
"""
    plain(code, checkpoints)
