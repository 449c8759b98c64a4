"""Where each leaf is in a tree of dicts and lists, found from the paths of a leaf table alone."""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

__all__ = ["Place", "natural_places", "nest"]

Place: TypeAlias = tuple[str | int, ...]
"""The way to a leaf from the root: names of dicts and indices of lists."""

_MOST_LEVELS = 64
_MOST_GAPS = 16

# What repr writes in a text for a character that cannot stand there itself.
_ESCAPED = r"""\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})"""

# One level of a path: an attribute, an index, a text as repr writes it, or another key without quotes.
_LEVEL = re.compile(
    rf"""\.(?P<attribute>[^\W\d]\w*)
    | \[(?:<flat\ index\ )?(?P<index>0|[1-9][0-9]{{0,8}})>?\]
    | \[(?P<text>'(?:[^'\\]|{_ESCAPED})*'|"(?:[^"\\]|{_ESCAPED})*")\]
    | \[(?P<other>[^\[\]'"]+)\]""",
    re.VERBOSE,
)


def natural_places(paths: Iterable[str]) -> dict[str, Place] | None:
    """Return the place of each leaf, given the paths of all leaves of a tree, or None where there are none.

    Attributes and dict keys become names, and a node whose keys are all whole numbers becomes a list (unless
    most of it would be gaps). None is returned where a path cannot be taken apart, or where two leaves could
    be taken for each other that way (``{"a.b": 1, "a": {"b": 2}}`` is one name to Orbax).
    """
    paths = tuple(paths)
    found = {path: place for path in paths if (place := _levels(path)) is not None}
    if len(found) < len(paths) or not _is_unambiguous(found.values()):
        return None
    return _with_lists(found)


def nest(leaves: Mapping[Place, Any]) -> Any:
    """Return the tree that has these leaves at their places, and None in the gaps of its lists."""
    if () in leaves:
        return leaves[()]
    groups: dict[str | int, dict[Place, Any]] = {}
    for (first, *rest), leaf in leaves.items():
        groups.setdefault(first, {})[tuple(rest)] = leaf
    children = {first: nest(group) for first, group in groups.items()}
    indices = [first for first in children if isinstance(first, int)]
    return [children.get(index) for index in range(max(indices) + 1)] if indices else children


def _levels(path: str) -> Place | None:
    """Take a path apart, or return None where that is not certain to be right."""
    if not path.isprintable():
        return None
    levels: list[str | int] = []
    position = 0
    while position < len(path):
        match = _LEVEL.match(path, position)
        if match is None or len(levels) == _MOST_LEVELS:
            return None
        kind = match.lastgroup or ""
        levels.append(_READ.get(kind, str)(match[kind]))
        position = match.end()
    return tuple(levels)


def _unquoted(text: str) -> str:
    """Return the text of a literal, which is the key itself."""
    return str(ast.literal_eval(text)) if "\\" in text else text[1:-1]


_READ: dict[str, Callable[[str], str | int]] = {"index": int, "text": _unquoted}


def _is_unambiguous(found: Iterable[Place]) -> bool:
    """Whether each place has a name of its own in Orbax, and none is, or looks like, a folder of another."""
    found = tuple(found)
    names = {_name(place) for place in found}
    inner = {place[:depth] for place in found for depth in range(len(place))}
    folders = {name[:end] for name in names for end, character in enumerate(name) if character == "/"}
    return len(names) == len(found) and inner.isdisjoint(found) and folders.isdisjoint(names)


def _name(place: Place) -> str:
    return ".".join(map(str, place))


def _with_lists(found: Mapping[str, Place]) -> dict[str, Place]:
    """Make the indices of nodes that cannot be lists names."""
    keys: dict[Place, set[str | int]] = {}
    for place in found.values():
        for depth, level in enumerate(place):
            keys.setdefault(place[:depth], set()).add(level)
    lists = {node for node, levels in keys.items() if _is_list(levels)}
    return {
        path: tuple(level if place[:depth] in lists else str(level) for depth, level in enumerate(place))
        for path, place in found.items()
    }


def _is_list(levels: set[str | int]) -> bool:
    indices = [level for level in levels if isinstance(level, int)]
    return len(indices) == len(levels) and max(indices) < 2 * len(indices) + _MOST_GAPS
