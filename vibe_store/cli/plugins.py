"""Writes out what exists, for ``vibe-store plugins``, and what one provider says of itself.

The list imports nothing that a provider names; asked about one name, what it names is imported.
"""

import json
import math
import textwrap
from typing import Any, TypeAlias

from vibe_store.discovery import Plugin, Registration, kind_text
from vibe_store.errors import MissingDependencyError, PluginError
from vibe_store.hookspecs import Provider
from vibe_store.options import Option
from vibe_store.provider_target import Described, describe_target
from vibe_store.registry import Registry, default_registry

__all__ = ["describe_plugins", "list_plugins", "plugins_json", "plugins_text"]

_Row: TypeAlias = dict[str, str | int | None]


def list_plugins(*, as_json: bool = False) -> str:
    """Return what the built-ins and the installed plugins provide, as a table or as JSON."""
    return plugins_json(default_registry()) if as_json else plugins_text(default_registry())


def describe_plugins(
    name: str, *, as_json: bool = False, registry: Registry | None = None
) -> tuple[str, bool]:
    """Import every provider of a name, and return what each says of itself, and whether all of them can.

    Args:
        name: of a storage (a URL scheme), a serializer or a retention policy, or of several of them.
        as_json: return a JSON list with one object for each kind that has the name. It has the keys of
            :func:`plugins_json`, and ``options`` (a list of objects with ``name``, ``type``, ``required`` and
            ``default``, which is text where JSON has no such value) and ``help``, the docstring. A provider
            that cannot be imported has the status ``"broken"``, its ``reason``, and null for both.
        registry: where to look; that of the process by default.

    Raises:
        UnknownProviderError: nothing has this name.
    """
    rows = [(row, _described(row)) for row in (registry or default_registry()).named(name)]
    whole = all(isinstance(described, Described) for _, described in rows)
    if as_json:
        return json.dumps([_described_row(*each) for each in rows], indent=2), whole
    return "\n\n".join(_described_text(*each) for each in rows), whole


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


def _described(row: Registration) -> Described | Exception:
    try:
        return describe_target(row)
    except (PluginError, MissingDependencyError) as error:
        return error


def _described_row(row: Registration, described: Described | Exception) -> dict[str, Any]:
    listed = _row(row.plugin, row.status, row.reason, row.kind, row.provider)
    if isinstance(described, Exception):
        broken = {"status": "broken", "reason": str(described)} if row.status == "ok" else {}
        return {**listed, **broken, "options": None, "help": None}
    options = [
        {
            "name": option.name,
            "type": option.type,
            "required": option.required,
            "default": option.default if _is_json(option.default) else repr(option.default),
        }
        for option in described.options
    ]
    return {**listed, "options": options, "help": described.help}


def _described_text(row: Registration, described: Described | Exception) -> str:
    head = f"{kind_text(row.kind)} {row.provider.name}, of the {row.plugin} ({row.provider.target})"
    if isinstance(described, Exception):
        return f"{head}\n\n{textwrap.indent(str(described), '  ')}"
    parts = [head, textwrap.indent(described.help or "It has no help.", "  ")]
    if described.options:
        parts.append(
            "  options:\n" + "\n".join(f"    {_option_text(option)}" for option in described.options)
        )
    else:
        parts.append("  It takes no options.")
    return "\n\n".join(parts)


def _option_text(option: Option) -> str:
    annotation = f": {option.type}" if option.type else ""
    has_default = not option.required and not option.name.startswith("**")
    return f"{option.name}{annotation}" + (f" = {option.default!r}" if has_default else "")


def _is_json(value: object) -> bool:
    return (
        value is None
        or isinstance(value, bool | int | str)
        or (isinstance(value, float) and math.isfinite(value))
    )
