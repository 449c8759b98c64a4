"""What one save is to store, and the draft of a checkpoint that is made of it."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from vibe_store.checkpoint.commit import Draft, StagedItem
from vibe_store.checkpoint.manifest import Distribution, is_distribution
from vibe_store.interfaces import PyTree, Serializer
from vibe_store.registry import default_registry

__all__ = ["Content", "draft_of"]


@dataclass(frozen=True, slots=True)
class Content:
    """What one save is to store: pytrees (or snapshots of them) by item name, and what goes with them."""

    items: Mapping[str, PyTree]
    metadata: bytes | None = None
    metrics: Mapping[str, float] | None = None


def draft_of(step: int | None, content: Content, serializer: Serializer) -> Draft:
    """Return the draft of pytrees that are serialized once they are committed."""

    distribution = _distribution_of(serializer)

    def stage(folder: Path) -> Iterator[StagedItem]:
        for name, tree in content.items.items():
            saved = serializer.save(tree, folder, name)
            yield StagedItem(name, serializer.name, saved.files, saved.leaves, distribution)

    leaves = jax.tree.leaves(list(content.items.values()))
    return Draft(
        step=step,
        stage=stage,
        size=sum(getattr(leaf, "nbytes", 0) for leaf in leaves),
        created=datetime.now(UTC),
        versions=_versions(type(serializer).__module__.partition(".")[0]),
        metadata=content.metadata,
        metrics=content.metrics,
    )


def _distribution_of(serializer: Serializer) -> Distribution | None:
    """Return what has to be installed to load what a serializer wrote, where a plugin provides it."""
    plugin = default_registry().plugin_of(serializer)
    if plugin is None or not is_distribution(plugin.distribution):
        return None
    return Distribution(plugin.distribution, plugin.version)


@functools.cache
def _versions(package: str) -> dict[str, str]:
    """Return the versions of ours, of JAX and Equinox, and of the package that the serializer is from."""
    versions = {}
    for name in sorted({"vibe-store", "jax", "equinox", package.replace("_", "-")}):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
