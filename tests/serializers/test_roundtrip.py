"""What our serializers store besides what the contract asks of every one."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from vibe_store.errors import VibeStoreWarning


def test_the_states_of_optimisers_come_back_bit_for_bit(
    through: Any, optimisers: Any, assert_same: Callable[[Any, Any], None]
) -> None:
    assert_same(through(through.serializer.snapshot(optimisers), optimisers), optimisers)


def test_partials_and_bound_methods_are_the_templates_without_a_warning_when_the_names_agree(
    through: Any,
) -> None:
    tree = [functools.partial(jax.nn.leaky_relu, negative_slope=0.1), [].append]
    assert through(tree) == tree


def test_a_partial_with_another_argument_is_warned_about(through: Any) -> None:
    tree = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)
    like = functools.partial(jax.nn.leaky_relu, negative_slope=0.2)
    with pytest.warns(VibeStoreWarning, match=r"negative_slope=0\.1.*negative_slope=0\.2"):
        through(tree, like)


def test_another_callable_is_warned_about_by_both_names(through: Any) -> None:
    with pytest.warns(VibeStoreWarning, match=r"\['f'\] was the callable .*relu .*tanh"):
        assert through({"f": jax.nn.relu}, {"f": jax.nn.tanh}) == {"f": jax.nn.tanh}


@pytest.mark.parametrize("name", ["eqx", "orbax"])
def test_sharded_arrays_and_keys_come_back_where_the_template_wants_them(name: str, tmp_path: Path) -> None:
    if name == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    code = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vibe_store import CheckpointManager, load_checkpoint, save_checkpoint
from vibe_store.errors import InvalidValueError
folder, name = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
split, whole = NamedSharding(mesh, P("a", "b")), NamedSharding(mesh, P())
row = NamedSharding(mesh, P("a"))
x = jnp.arange(16.0).reshape(4, 4)
keys = jax.random.split(jax.random.key(0), 4)
tree = jax.device_put({"split": x, "whole": x, "keys": keys}, {"split": split, "whole": whole, "keys": row})
want = {name: np.asarray(x if name != "keys" else jax.random.key_data(keys)) for name in tree}
with CheckpointManager(folder, serializer=name) as manager:
    manager.save(0, tree)
    jax.jit(lambda t: jax.tree.map(lambda a: a, t), donate_argnums=0)(tree)
struct = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
like = {"split": struct((4, 4), jnp.float32, row), "whole": struct((4, 4), jnp.float32, None),
        "keys": struct((4,), keys.dtype, row)}
loaded = load_checkpoint(folder, like, step=0)
assert loaded["split"].sharding == row, loaded["split"].sharding
assert len(loaded["whole"].devices()) == 1 and not loaded["whole"].committed
assert loaded["keys"].sharding == row and loaded["keys"].dtype == keys.dtype
again = load_checkpoint(folder, loaded, step=0)
assert again["split"].sharding == row and again["keys"].sharding == row
two = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("a",)), P(None, "a"))
fewer = load_checkpoint(folder, dict(like, split=struct((4, 4), jnp.float32, two)), step=0)
assert fewer["split"].sharding == two
for tree in (loaded, again, fewer):
    for leaf_name, leaf in tree.items():
        data = jax.random.key_data(leaf) if leaf_name == "keys" else leaf
        assert np.asarray(data).tobytes() == want[leaf_name].tobytes(), leaf_name
save_checkpoint(folder, {"odd": jnp.arange(3.0)}, step=1, serializer=name)
for wanted in (row, NamedSharding(mesh.abstract_mesh, P())):
    try:
        load_checkpoint(folder, {"odd": struct((3,), jnp.float32, wanted)}, step=1)
    except InvalidValueError as error:
        assert "['odd'] cannot be placed" in str(error), error
    else:
        raise AssertionError("an impossible sharding was accepted")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "checkpoints", name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )
    assert done.returncode == 0, done.stderr  # JAX may print where an impossible sharding came from
