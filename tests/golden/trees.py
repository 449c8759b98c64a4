"""The trees in ``tests/golden``: every kind of leaf and every dtype, from numbers that no library draws.

Run as a script it writes a version's folder: once, when that version's format is new, and never again::

    python tests/golden/trees.py tests/golden/v2
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

METADATA = {"algorithm": "golden", "nested": {"numbers": [1, 2.5, None, True], "text": "größer"}}
METRICS = {"eval_return": 12.5, "loss": float("nan")}
STEP = 7

NUMPY = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *(">i4", "datetime64[ns]", "timedelta64[s]"),
)
ML_DTYPES = (
    *("bfloat16", "int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
JAX = ("bool", "int8", "int32", "uint8", "uint32", "float16", "bfloat16", "float32", "complex64")
IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")


class Pair(NamedTuple):
    first: Any
    second: Any


def bits(dtype: Any) -> np.ndarray[Any, Any]:
    """Return twelve elements of a dtype, of bytes that count up."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if kind == np.bool_:
        return (np.arange(12) % 3 == 0).reshape(3, 4)
    if kind.name in {"int2", "int4", "uint2", "uint4"}:
        return (np.arange(12) % 2).astype(kind).reshape(3, 4)
    size = 12 * kind.itemsize
    mask = 0x0F if "float6" in str(dtype) or "float4" in str(dtype) else 0xFF
    data = (np.arange(1, size + 1) * 37 % 251 & (mask >> 1)).astype(np.uint8)
    return data.view(kind).reshape(3, 4)


def state() -> dict[str, Any]:
    """Return the item ``state``."""
    return {
        "numpy": {dtype: bits(dtype) for dtype in NUMPY},
        "ml_dtypes": {dtype: bits(dtype) for dtype in ML_DTYPES},
        "jax": {dtype: jnp.asarray(bits(dtype)) for dtype in JAX},
        "keys": {impl: key(impl) for impl in IMPLEMENTATIONS},
        "shapes": [np.float32(1.5), jnp.zeros((0, 3)), np.zeros((2, 0), np.int16), jnp.int32(3)],
        "python": Pair((True, -3, 2**63, 0.1, 1 - 2j), ["text ✓", b"\x00\xff", None, len]),
    }


def runner() -> tuple[Any, ...]:
    """Return the item ``runner``."""
    return ({"ring": jnp.arange(24, dtype=jnp.uint8).reshape(4, 6)}, 5)


def key(impl: str) -> jax.Array:
    """Return two typed keys of an implementation."""
    shape = jax.eval_shape(jax.random.key_data, jax.eval_shape(lambda: jax.random.key(0, impl=impl))).shape
    data = np.arange(2 * shape[0], dtype=np.uint32).reshape(2, *shape)
    return jax.random.wrap_key_data(data, impl=impl)


def write(folder: Path) -> None:
    from vibe_store import save_checkpoint, save_eqx

    for serializer in ("eqx", "orbax"):
        save_checkpoint(
            folder / serializer,
            state(),
            step=STEP,
            items={"runner": runner()},
            metadata=METADATA,
            metrics=METRICS,
            serializer=serializer,
        )
    save_eqx(folder / "single.eqx", state())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        raise SystemExit(f"{target} exists; what a version wrote is never written again.")
    write(target)
