"""A checkpointer in memory, an environment and small configurations for the tests of the runners."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.errors import CheckpointNotFoundError, StepAlreadyExistsError, TemplateMismatchError
from vibe_store.interfaces import Checkpointer, CheckpointInfo
from vibe_store.runner import RunnerConfig


class MemoryCheckpointer(Checkpointer):
    """Keeps every step as NumPy arrays by path."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, dict[str, Any]]] = {}
        self.infos: dict[int, CheckpointInfo] = {}
        self.stored_metadata: dict[int, Any] = {}
        self.closed = False

    def save(
        self,
        step: int,
        pytree: Any,
        *,
        items: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        del force
        if step in self.steps:
            raise StepAlreadyExistsError(f"step {step} exists")
        self.steps[step] = {name: _to_host(tree) for name, tree in {"state": pytree, **(items or {})}.items()}
        self.infos[step] = CheckpointInfo(
            step=step, created=datetime.now(UTC), size=1, serializer="memory", metrics=metrics
        )
        self.stored_metadata[step] = metadata
        return True

    def restore(
        self, step: int | None, like: Any, *, items: Mapping[str, Any] | None = None, partial: bool = False
    ) -> Any:
        del partial
        if step is None or step not in self.steps:
            raise CheckpointNotFoundError(f"no step {step}")
        stored = self.steps[step]
        state = _from_host(stored["state"], like)
        return state, {name: _from_host(stored[name], tree) for name, tree in (items or {}).items()}

    def info(self, step: int) -> CheckpointInfo:
        return self.infos[step]

    def metadata(self, step: int) -> dict[str, Any] | None:
        return self.stored_metadata[step]

    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    def best_step(self) -> int | None:
        ranked = {s: i.metrics["eval_return"] for s, i in self.infos.items() if i.metrics}
        return max(ranked, key=lambda step: ranked[step], default=None)

    def all_steps(self) -> list[int]:
        return sorted(self.steps)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _to_host(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        for path, leaf in leaves
    }


def _from_host(stored: dict[str, np.ndarray], like: Any) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    wrong = [
        name
        for name, (_, leaf) in zip(names, leaves, strict=True)
        if name not in stored or (not _is_key(leaf) and stored[name].shape != leaf.shape)
    ]
    wrong += [name for name in stored if name not in names]
    if wrong:
        raise TemplateMismatchError(f"differs: {wrong}", differences=wrong, paths=wrong)
    values = [
        jax.random.wrap_key_data(stored[name]) if _is_key(leaf) else jnp.array(stored[name])
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return structure.unflatten(values)


@pytest.fixture(scope="session", autouse=True)
def compile_each_program_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Most tests here train the same program, and compiling it takes longer than running it."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def cartpole() -> tuple[Any, Any]:
    return gymnax.make("CartPole-v1")


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    """Configurations of a run of 480 steps that learns, evaluates, saves and logs along the way."""
    dqn = DQNConfig(
        hidden_sizes=(8,),
        buffer_size=96,
        batch_size=8,
        learning_starts=48,
        train_interval=12,
        target_update_interval=3,
        exploration_steps=200,
    )
    runner = RunnerConfig(
        total_timesteps=480,
        num_envs=16,
        checkpoint_interval=100,
        eval_interval=160,
        eval_episodes=2,
        log_interval=50,
    )
    return SimpleNamespace(dqn=dqn, runner=runner, replace=replace)


@pytest.fixture
def memory() -> MemoryCheckpointer:
    return MemoryCheckpointer()


@pytest.fixture(scope="session")
def new_memory() -> type[MemoryCheckpointer]:
    return MemoryCheckpointer
