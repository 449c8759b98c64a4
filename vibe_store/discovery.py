"""Finds the plugins that are installed, and collects and checks what each of them registers.

This imports the modules that the entry points of the group ``vibe_store`` name, one by one, so that a broken
one takes no other down; nothing that a provider names is imported.
"""

import difflib
import importlib.metadata
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import pluggy

from vibe_store import builtins, hookspecs
from vibe_store.errors import PluginError
from vibe_store.hookspecs import API_VERSION, ENTRY_POINT_GROUP, Provider

__all__ = [
    "DISABLE_VARIABLE",
    "SCHEME",
    "Kind",
    "Plugin",
    "Registration",
    "Unavailable",
    "collect",
    "installed_plugins",
    "is_disabled",
    "kind_text",
    "listed",
]

DISABLE_VARIABLE = "VIBE_STORE_DISABLE_PLUGINS"
"""The environment variable that names, separated by commas, the plugins which are not to be imported."""

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+._-]*")
"""What the scheme of a storage URL looks like; the underscore is for a few names of fsspec."""

Kind: TypeAlias = Literal["storage", "serializer", "retention"]
"""What a provider provides."""

_HOOKS: dict[str, Kind] = {
    "vibe_store_storage": "storage",
    "vibe_store_serializers": "serializer",
    "vibe_store_retention": "retention",
}
_NAME = re.compile(r"[\w.+-]{1,100}")  # as manifests name serializers; a colon begins options
_TARGET = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_logger = logging.getLogger("vibe_store")


@dataclass(frozen=True, slots=True)
class Plugin:
    """Something that may register providers, before it is imported.

    Attributes:
        name: the name of its entry point.
        load: imports it and returns it: a module or an object with functions marked ``@hookimpl``.
        distribution: the installed distribution that it comes from, as ``pip`` names it.
        version: the version of that distribution, where it is known.
        builtin: whether it is part of vibe_store itself, so that it cannot be disabled.
    """

    name: str
    load: Callable[[], object]
    distribution: str
    version: str | None = None
    builtin: bool = False

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"plugin {self.name!r} of {self.distribution}{version}"


@dataclass(frozen=True, slots=True)
class Registration:
    """A provider that a plugin registered.

    Attributes:
        plugin: where it comes from.
        kind: what it provides.
        provider: the record that the plugin's hook returned.
        status: ``"ok"``; ``"broken"`` where this vibe_store is too old for it; ``"conflict"`` where another
            registration has the same kind and name.
        reason: a sentence that says why and what to do, where the status is not ``"ok"``.
    """

    plugin: Plugin
    kind: Kind
    provider: Provider
    status: Literal["ok", "broken", "conflict"] = "ok"
    reason: str = ""

    def __str__(self) -> str:
        return f"{kind_text(self.kind)} {self.provider.name!r} ({self.provider.target}, {self.plugin})"


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A whole plugin that provides nothing.

    Attributes:
        plugin: the plugin.
        status: ``"blocked"`` where it is disabled, so not imported; ``"broken"``.
        reason: a sentence that says why.
    """

    plugin: Plugin
    status: Literal["blocked", "broken"]
    reason: str


def installed_plugins() -> list[Plugin]:
    """Return the built-ins, then every plugin with an entry point, sorted; none is imported yet."""
    try:
        version = importlib.metadata.version("vibe-store")
    except importlib.metadata.PackageNotFoundError:  # the source tree is on the path without being installed
        version = None
    own = Plugin("builtins", lambda: builtins, "vibe-store", version, builtin=True)
    others = [
        Plugin(
            entry_point.name,
            entry_point.load,
            entry_point.dist.name if entry_point.dist else "an unnamed distribution",
            entry_point.dist.version if entry_point.dist else None,
        )
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
    return [own, *sorted(others, key=lambda plugin: (plugin.distribution, plugin.name))]


def is_disabled(plugin: Plugin, disabled: Iterable[str]) -> bool:
    """Whether ``disabled`` names the plugin or its distribution, or is ``"*"``; never a built-in."""
    names = {"*", _normalised(plugin.name), _normalised(plugin.distribution)}
    return not plugin.builtin and not names.isdisjoint(map(_normalised, disabled))


def collect(
    plugins: Iterable[Plugin], disabled: Sequence[str] = ()
) -> tuple[tuple[Registration, ...], tuple[Unavailable, ...]]:
    """Import the plugins that are not disabled.

    Returns:
        What they register, and the plugins that are blocked or broken, both in the order of ``plugins``.
    """
    registrations: list[Registration] = []
    unavailable: list[Unavailable] = []
    for plugin in plugins:
        if is_disabled(plugin, disabled):
            reason = f"It is disabled by the environment variable {DISABLE_VARIABLE}."
            unavailable.append(Unavailable(plugin, "blocked", reason))
            continue
        found = _registered_by(plugin)
        if isinstance(found, Unavailable):
            unavailable.append(found)
        else:
            registrations += found
    return _with_conflicts(registrations), tuple(unavailable)


def kind_text(kind: Kind) -> str:
    """Return what a sentence calls a provider of this kind."""
    return "retention policy" if kind == "retention" else kind


def listed(names: Sequence[str], joint: str = "and") -> str:
    """Return names as a sentence enumerates them: ``"a, b and c"``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {joint} {names[-1]}"


def _normalised(name: str) -> str:
    """Return a name as package indexes compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _registered_by(plugin: Plugin) -> list[Registration] | Unavailable:
    """Import one plugin and call its hooks, in a plugin manager of its own."""
    step = "Importing it"
    try:
        module: Any = plugin.load()
        step = "Registering it"
        manager = pluggy.PluginManager("vibe_store")
        manager.add_hookspecs(hookspecs)
        manager.register(module, name=plugin.name)
        _check_hooks(manager, module)
        found: list[Registration] = []
        for hook, kind in _HOOKS.items():
            step = f"Calling its {hook}"
            found += [_registration(plugin, kind, provider) for provider in _providers(manager, hook)]
    except PluginError as error:
        return Unavailable(plugin, "broken", str(error))
    except (Exception, SystemExit) as error:  # whatever one plugin does, the others must go on
        _logger.debug("The %s is broken.", plugin, exc_info=error)
        return Unavailable(plugin, "broken", f"{step} raised {type(error).__name__}: {error}.")
    return found


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    hooks = list(_HOOKS)
    if unmarked := [hook for hook in hooks if _is_unmarked(manager, module, hook)]:
        raise PluginError(
            f"It defines {listed(unmarked)} without the decorator vibe_store.hookspecs.hookimpl."
        )
    callers = manager.get_hookcallers(module)
    if not callers:
        raise PluginError(
            "It implements no hook: nothing in what its entry point names is decorated with "
            f"vibe_store.hookspecs.hookimpl and called {listed(hooks, 'or')}."
        )
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        unknown = [caller.name for caller in callers if not caller.has_spec()]
        close = [match for name in unknown for match in difflib.get_close_matches(name, hooks, n=1)]
        hint = f"did you mean {listed(close, 'or')}?" if close else f"the hooks are {listed(hooks)}."
        raise PluginError(
            f"It implements {listed(unknown)}, which is no hook of vibe_store: {hint}"
        ) from error


def _is_unmarked(manager: pluggy.PluginManager, module: Any, hook: str) -> bool:
    """Whether a function has the name of a hook but is neither an implementation nor our specification."""
    if not inspect.isroutine(getattr(module, hook, None)):
        return False
    marks = (manager.parse_hookimpl_opts(module, hook), manager.parse_hookspec_opts(module, hook))
    return marks == (None, None)


def _providers(manager: pluggy.PluginManager, hook: str) -> list[Provider]:
    caller = getattr(manager.hook, hook)
    results = caller()
    # pluggy leaves out each None that an implementation returns.
    if len(results) < sum(not (impl.wrapper or impl.hookwrapper) for impl in caller.get_hookimpls()):
        raise PluginError(f"Its {hook} returned None instead of a list of Provider.")
    found: list[Provider] = []
    for result in results:
        if isinstance(result, str | bytes) or not isinstance(result, Iterable):
            raise PluginError(f"Its {hook} returned {result!r} instead of a list of Provider.")
        found += [_checked(item, hook) for item in result]
    names = Counter(provider.name for provider in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise PluginError(f"Its {hook} registers {listed(twice)} more than once.")
    return found


def _checked(item: object, hook: str) -> Provider:
    """Return the provider, every field of which is checked, since a dataclass takes anything."""
    where = f"Its {hook} returned a list with {item!r}"
    if not isinstance(item, Provider):
        raise PluginError(f"{where}, which is no Provider.")
    name: object = item.name
    if not isinstance(name, str) or not name:
        raise PluginError(f"{where}, whose name is no text.")
    if hook != "vibe_store_storage" and not _NAME.fullmatch(name):
        raise PluginError(f"{where}, whose name holds other characters than letters, digits and any of ._+-")
    if hook == "vibe_store_storage" and not (SCHEME.fullmatch(name) and name == name.lower()):
        raise PluginError(f"{where}, whose name is no URL scheme in lower case.")
    target: object = item.target
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise PluginError(f"{where}, whose target is not of the form 'package.module:Attribute'.")
    install: object = item.install
    if not isinstance(install, str):
        raise PluginError(f"{where}, whose install is no text.")
    api: object = item.api
    if not isinstance(api, int) or api < 1:
        raise PluginError(f"{where}, whose api is no positive integer.")
    return item


def _registration(plugin: Plugin, kind: Kind, provider: Provider) -> Registration:
    if provider.api <= API_VERSION:
        return Registration(plugin, kind, provider)
    reason = (
        f"The {plugin} was written for version {provider.api} of the plugin interface, and this vibe_store "
        f"has version {API_VERSION}: upgrade it with `pip install --upgrade vibe-store`."
    )
    return Registration(plugin, kind, provider, "broken", reason)


def _with_conflicts(registrations: Sequence[Registration]) -> tuple[Registration, ...]:
    claims: dict[tuple[Kind, str], list[Plugin]] = {}
    for row in registrations:
        claims.setdefault((row.kind, row.provider.name), []).append(row.plugin)
    marked = []
    for row in registrations:
        plugins = claims[row.kind, row.provider.name]
        conflict = len(plugins) > 1
        marked.append(replace(row, status="conflict", reason=_conflict_text(plugins)) if conflict else row)
    return tuple(marked)


def _conflict_text(plugins: Sequence[Plugin]) -> str:
    others = [plugin for plugin in plugins if not plugin.builtin]
    distinct = len({_normalised(plugin.name) for plugin in others}) == len(others)
    tokens = [plugin.name if distinct else plugin.distribution for plugin in others]
    return (
        f"Several plugins claim this name: {listed([f'the {plugin}' for plugin in plugins])}. Uninstall one, "
        f"or disable it by putting {listed(tokens, 'or')} into the environment variable {DISABLE_VARIABLE}."
    )
