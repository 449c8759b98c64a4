"""Many runs at once that differ by their seed: one program, whose arrays have one more axis in front."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from vibe_store.errors import InvalidValueError
from vibe_store.interfaces import PyTree
from vibe_store.runner.loop import Program

__all__ = ["alike", "of_seeds", "run_keys", "select_seed"]

_AXIS = "seeds"


def run_keys(seed: int, num_seeds: int) -> Array:
    """Return the key of a run, or of shape ``(num_seeds,)`` those of the runs with ``seed`` and on."""
    if num_seeds == 1:
        return jax.random.key(seed)
    return jax.vmap(jax.random.key)(jnp.arange(seed, seed + num_seeds))


def of_seeds(program: Program, num_seeds: int) -> Program:
    """Return the program of so many runs; they are the first axis of all that it carries and reports."""
    if num_seeds == 1:
        return program
    return replace(
        program,
        init=jax.vmap(program.init, axis_name=_AXIS),
        step=jax.vmap(program.step, axis_name=_AXIS),
        report=jax.vmap(program.report, axis_name=_AXIS),
        evaluate=jax.vmap(program.evaluate, in_axes=(0, 0, None), axis_name=_AXIS),
        replay=None
        if program.replay is None
        else replace(program.replay, renew=jax.vmap(program.replay.renew)),
    )


def alike(num_seeds: int) -> Callable[[Array], Array]:
    """Return what marks a value, a counter say, as the same in all runs.

    Without that, what depends on it (how often to learn, where to write) would be done for each run apart.
    """
    if num_seeds == 1:
        return lambda value: value
    return lambda value: jax.lax.pmax(value, _AXIS)


def select_seed(tree: PyTree, index: int) -> PyTree:
    """Return what one of many runs has of a state: its own part of each array.

    Args:
        tree: the state of a run with ``num_seeds`` above 1.
        index: which one, from 0 on; that with the seed ``seed + index``.

    Raises:
        InvalidValueError: there are not so many, or it is no such state.
    """
    counts = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(tree)}
    if len(counts) != 1 or 0 in counts:
        raise InvalidValueError("This is no state of many seeds: its arrays have no first axis in common.")
    (count,) = counts
    if not 0 <= index < count:
        raise InvalidValueError(
            f"There are {count} seeds, counted from 0, so there is none with the index {index}."
        )
    return jax.tree.map(lambda leaf: leaf[index], tree)
