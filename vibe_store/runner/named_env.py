"""From what a checkpoint says of its environment back to the environment, where gymnax knows it by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vibe_store.errors import InvalidValueError, MissingDependencyError
from vibe_store.runner.envs import VectorEnv

__all__ = ["named_env"]


def named_env(metadata: Mapping[str, Any]) -> VectorEnv:
    """Return the environment that a checkpoint was trained on, with the parameters that it had.

    Args:
        metadata: what is stored with the checkpoint: ``env``, ``env_params`` and ``spaces``.

    Raises:
        MissingDependencyError: gymnax cannot be imported.
        InvalidValueError: gymnax has no environment of this name, that one is another, or the checkpoint
            does not hold all of its parameters.
    """
    name = metadata["env"]
    try:
        import gymnax
    except ImportError as error:
        raise MissingDependencyError(
            f'{name} needs gymnax, which cannot be imported ({error}): pip install "vibe-store[rl]"'
        ) from error
    if name not in gymnax.registered_envs:
        raise InvalidValueError(
            f"gymnax has no environment {name!r}, on which this checkpoint was trained. Play it from Python: "
            "load_policy returns what acts."
        )
    env, params = gymnax.make(name)
    saved = metadata["env_params"]
    values = _like_defaults(params, saved, name)
    missing = sorted(set(VectorEnv(env, params).plain_params()) - set(saved))
    if missing:
        raise InvalidValueError(
            f"The checkpoint was trained on {name} with values of {', '.join(missing)} that are no numbers, "
            "so it does not hold them. Play it from Python: load_policy returns what acts."
        )
    envs = VectorEnv(env, params.replace(**values))
    if envs.spaces() != metadata["spaces"]:
        raise InvalidValueError(
            f"{name} as gymnax makes it has {envs.spaces()}, but the checkpoint was trained on "
            f"{metadata['spaces']}: on a wrapped environment, say. Play it from Python: load_policy returns "
            "what acts."
        )
    return envs


def _like_defaults(defaults: Any, saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return saved parameters as the kinds of the defaults: arrays of their dtype, or plain numbers."""
    unknown = sorted(set(saved) - {field.name for field in dataclasses.fields(defaults)})
    if unknown:
        raise InvalidValueError(
            f"The checkpoint was trained on {name} with the parameters {', '.join(unknown)}, which this "
            "version of gymnax does not have. Install the version that it was trained with."
        )
    return {
        key: jnp.asarray(value, getattr(defaults, key).dtype)
        if hasattr(getattr(defaults, key), "dtype")
        else value
        for key, value in saved.items()
    }
