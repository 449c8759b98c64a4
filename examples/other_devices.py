"""Saved on one device, resumed on four, and back: a checkpoint does not depend on the machine's shape.

python examples/other_devices.py

pretends that this computer's processor is four devices, and spreads the batch dimension of a state over them.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from vibe_store import load_checkpoint, save_checkpoint


def main() -> None:
    one = SingleDeviceSharding(jax.devices()[0])
    four = NamedSharding(Mesh(jax.devices(), ("batch",)), PartitionSpec("batch"))
    state = {"buffer": jnp.arange(32.0).reshape(8, 4), "key": jax.random.key(0)}
    save_checkpoint("checkpoints/devices", state, step=1)

    # A template says where each array goes; it holds no data, so nothing is allocated twice.
    spread = {
        "buffer": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=four),
        "key": jax.ShapeDtypeStruct((), state["key"].dtype),
    }
    on_four = load_checkpoint("checkpoints/devices", like=spread, step=1)
    print("on", len(on_four["buffer"].sharding.device_set), "devices")

    on_four["buffer"] = jax.jit(lambda buffer: buffer * 2)(on_four["buffer"])  # which stays on the four
    save_checkpoint("checkpoints/devices", on_four, step=2)

    back = {**spread, "buffer": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=one)}
    on_one = load_checkpoint("checkpoints/devices", like=back, step=2)
    print("back on", len(on_one["buffer"].sharding.device_set), "device")
    assert jnp.array_equal(on_one["buffer"], state["buffer"] * 2)


if __name__ == "__main__":
    main()
