"""Writes out what exists, for ``vibe-store plugins``, without importing anything that a provider names."""

import json
from typing import TypeAlias

from vibe_store.discovery import Plugin
from vibe_store.hookspecs import Provider
from vibe_store.registry import Registry, default_registry

__all__ = ["list_plugins", "plugins_json", "plugins_text"]

_Row: TypeAlias = dict[str, str | int | None]


def list_plugins(*, as_json: bool = False) -> str:
    """Return what the built-ins and the installed plugins provide, as a table or as JSON."""
    return plugins_json(default_registry()) if as_json else plugins_text(default_registry())


def plugins_json(registry: Registry) -> str:
    """Return a JSON list with one object for each provider, then one for each blocked or broken plugin.

    Every object has the same keys: ``kind`` (``"storage"``, ``"serializer"`` or ``"retention"``), ``name``,
    ``target``, ``install``, ``api``, ``plugin``, ``distribution``, ``version``, ``status`` (``"ok"``,
    ``"blocked"``, ``"broken"`` or ``"conflict"``) and ``reason``. The first five are null for a plugin that
    is blocked or broken as a whole; ``install``, ``version`` and ``reason`` are null where there is none.
    """
    return json.dumps(_rows(registry), indent=2)


def plugins_text(registry: Registry) -> str:
    """Return a table of the providers and of the blocked or broken plugins, then the reasons."""
    rows = _rows(registry)
    columns = ("kind", "name", "distribution", "version", "plugin", "status")
    table = [tuple(column.upper() for column in columns)]
    table += [tuple(str(row[column] or "-") for column in columns) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    reasons = [f"{row['name'] or row['plugin']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([*lines, "", *reasons] if reasons else lines)


def _rows(registry: Registry) -> list[_Row]:
    rows = [
        _row(entry.plugin, entry.status, entry.reason, entry.kind, entry.provider)
        for entry in registry.registrations
    ]
    return rows + [_row(entry.plugin, entry.status, entry.reason) for entry in registry.unavailable]


def _row(
    plugin: Plugin, status: str, reason: str, kind: str | None = None, provider: Provider | None = None
) -> _Row:
    return {
        "kind": kind,
        "name": provider.name if provider else None,
        "target": provider.target if provider else None,
        "install": provider.install or None if provider else None,
        "api": provider.api if provider else None,
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "status": status,
        "reason": reason or None,
    }
