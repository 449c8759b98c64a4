"""What plugins and stored checkpoints rely on, as a record; how two records differ, and what may.

Run as a script it records what there is now, unless that would break what was recorded before::

    python tests/stability/interface.py
"""

import ast
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDED = HERE / "recorded.json"
COMMAND = "python tests/stability/interface.py"

WITHOUT_MEANING = frozenset({"$comment", "description", "examples", "title"})
"""Words of a schema that say nothing of what is valid."""

GIVEN_TO_PLUGINS = frozenset({"Source"})
"""Classes that vibe_store implements and plugins call; the others are implemented by plugins."""


@dataclass(frozen=True)
class Change:
    """One difference from what was recorded.

    Attributes:
        what: a sentence without its full stop.
        additive: whether all that was written for what was recorded goes on working.
        of_manifest: whether it is one of what is stored, rather than of what plugins implement.
    """

    what: str
    additive: bool
    of_manifest: bool = False


def current(*, read: Callable[[str], str] = lambda name: (ROOT / name).read_text("utf-8")) -> dict[str, Any]:
    """Return the record of what there is; ``read`` returns the text of a file of the tree."""
    hookspecs = ast.parse(read("vibe_store/hookspecs.py"))
    interfaces = ast.parse(read("vibe_store/interfaces.py"))
    classes = {
        node.name: node for node in (*interfaces.body, *hookspecs.body) if isinstance(node, ast.ClassDef)
    }
    is_record = {
        name: any("dataclass" in ast.unparse(each) for each in node.decorator_list)
        for name, node in classes.items()
    }
    return {
        "api_version": _constant(hookspecs, "API_VERSION"),
        "format": _constant(ast.parse(read("vibe_store/checkpoint/manifest.py")), "FORMAT"),
        "hooks": {
            node.name: _signature(node)
            for node in hookspecs.body
            if isinstance(node, ast.FunctionDef) and "hookspec" in map(ast.unparse, node.decorator_list)
        },
        "interfaces": {name: _interface(node) for name, node in classes.items() if not is_record[name]},
        "records": {name: _fields(node) for name, node in classes.items() if is_record[name]},
        "literals": {
            node.target.id: list(ast.literal_eval(node.value.slice))
            for node in interfaces.body
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Subscript)
        },
        "manifest": _meaning(json.loads(read("docs/manifest.schema.json"))),
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """Yield every difference between two records, with whether it is additive."""
    yield from _hook_changes(old["hooks"], new["hooks"])
    for name, gone, came in _pairs(old["interfaces"], new["interfaces"]):
        if gone is None or came is None:
            yield Change(f"the interface {name} is {'new' if gone is None else 'gone'}", gone is None)
        else:
            yield from _field_changes(name, gone["fields"], came["fields"], ordered=False)
            yield from _method_changes(name, gone["methods"], came["methods"])
    for name, gone, came in _pairs(old["records"], new["records"]):
        if gone is None or came is None:
            yield Change(f"the record {name} is {'new' if gone is None else 'gone'}", gone is None)
        else:
            yield from _field_changes(name, gone, came, ordered=True)
    for name, gone, came in _pairs(old["literals"], new["literals"]):
        less = [value for value in gone or [] if value not in (came or [])]
        if less:
            yield Change(f"{name} no longer has {less}", additive=False)
        elif gone != came:
            yield Change(f"{name} has become {came}", additive=True)
    yield from _schema_changes("the manifest", old["manifest"], new["manifest"])


def forbidden(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return why a record may not take the place of another, and what to do; None where it may."""
    for version in ("api_version", "format"):
        if new[version] < old[version]:
            return f"{version} was {old[version]} and is {new[version]}: a version is never lowered."
    broken = [change for change in changes(old, new) if not change.additive]
    of_plugins = [change for change in broken if not change.of_manifest]
    of_manifest = [change for change in broken if change.of_manifest]
    if of_plugins and new["api_version"] == old["api_version"]:
        return (
            f"This breaks plugins that were written for version {old['api_version']} of the interface:\n"
            f"{_listed(of_plugins)}\n"
            "Make it additive, as docs/stability.md says. Where that cannot be, raise API_VERSION in "
            f"vibe_store/hookspecs.py to {old['api_version'] + 1}, see to it that plugins of the old version "
            f"are adapted or refused by name, and run `{COMMAND}`."
        )
    if of_manifest and new["format"] == old["format"]:
        return (
            f"This changes what format {old['format']} is, on which other readers and older releases rely:\n"
            f"{_listed(of_manifest)}\n"
            "Make it additive, as docs/stability.md says. Where that cannot be, raise FORMAT in "
            f"vibe_store/checkpoint/manifest.py to {old['format'] + 1}, go on reading the old format, write "
            f"a new folder of tests/golden, and run `{COMMAND}`."
        )
    return None


def unrecorded(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return what may be, but is not in the record; None where nothing is."""
    if old == new:
        return None
    found = list(changes(old, new))
    return (
        "This may be, and has to be recorded, so that it is not taken back unnoticed:\n"
        f"{_listed(found) if found else '  A version was raised.'}\n"
        f"Run `{COMMAND}`, and commit what it writes."
    )


def record(path: Path, new: Mapping[str, Any]) -> str | None:
    """Write a record in the place of one that it does not break; else return why not."""
    refusal = forbidden(json.loads(path.read_text("utf-8")), new) if path.exists() else None
    if refusal is None:
        path.write_text(f"{json.dumps(new, indent=1)}\n", "utf-8")
    return refusal


def _constant(module: ast.Module, name: str) -> int:
    return next(
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )


def _signature(node: ast.FunctionDef) -> str:
    return f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else 'None'}"


def _interface(node: ast.ClassDef) -> dict[str, Any]:
    methods = {}
    for method in (each for each in node.body if isinstance(each, ast.FunctionDef)):
        decorators = set(map(ast.unparse, method.decorator_list))
        if "overload" not in decorators:
            words = [word for word in ("abstractmethod", "property") if word in decorators]
            methods[method.name] = " ".join([*words, _signature(method)])
    return {"fields": _fields(node), "methods": methods}


def _fields(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)]


def _meaning(schema: Any) -> Any:
    """Return a schema without what is there for people only."""
    if isinstance(schema, list):
        return [_meaning(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name in ("properties", "$defs"):  # whose names are those of fields
            found[name] = {field: _meaning(each) for field, each in value.items()}
        elif name not in WITHOUT_MEANING:
            found[name] = _meaning(value)
    return found


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in {**old, **new}:
        yield name, old.get(name), new.get(name)


def _hook_changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Change]:
    for name, gone, came in _pairs(old, new):
        if gone is None or came is None:
            yield Change(f"the hook {name} is {'new' if gone is None else 'gone'}", gone is None)
        elif gone != came:
            # pluggy passes an implementation those arguments only that it names.
            before, now = _arguments(gone), _arguments(came)
            kept = {argument: now.get(argument) for argument in before} == before
            additive = kept and _returns(gone) == _returns(came)
            yield Change(f"the hook {name} was {gone} and is {came}", additive)


def _field_changes(name: str, old: list[str], new: list[str], *, ordered: bool) -> Iterator[Change]:
    if old == new:
        return
    stays = new[: len(old)] == old if ordered else set(old) <= set(new)
    more = [field for field in new if field not in old]
    additive = stays and all(" = " in field for field in more)
    less = [field for field in old if field not in new]
    parts = [f"no longer has {less}"] * bool(less) + [f"has got {more}"] * bool(more)
    yield Change(f"{name} {' and '.join(parts) or 'has its fields in another order'}", additive)


def _method_changes(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Change]:
    for method, gone, came in _pairs(old, new):
        full = f"{name}.{method}"
        if gone is None:
            needed = came.startswith("abstractmethod") and name not in GIVEN_TO_PLUGINS
            yield Change(f"{full} is new{', and no plugin has it' if needed else ''}", not needed)
        elif came is None:
            yield Change(f"{full} is gone", additive=False)
        elif gone != came:
            lighter = gone == f"abstractmethod {came}"
            additive = lighter or (name in GIVEN_TO_PLUGINS and _takes_all_of(gone, came))
            yield Change(f"{full} was {gone} and is {came}", additive)


def _takes_all_of(old: str, new: str) -> bool:
    """Whether every call that fits one signature fits another, which may have more arguments."""
    before, now = _arguments(old), _arguments(new)
    more = list(now)[len(before) :]
    return (
        old.partition("(")[0] == new.partition("(")[0]
        and _returns(old) == _returns(new)
        and list(now)[: len(before)] == list(before)
        and all(now[argument] == before[argument] for argument in before)
        and all("=" in now[argument] for argument in more)
    )


def _arguments(signature: str) -> dict[str, str]:
    """The arguments of a signature: by name, how each may be passed, its type and its default."""
    text = signature[signature.index("(") : signature.rindex(" -> ")]
    arguments = ast.parse(f"def f{text}: ...").body[0].args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found = {}
    for argument, default in zip(positional, defaults, strict=True):
        kind = "positional only" if argument in arguments.posonlyargs else "positional"
        found[argument.arg] = _described(argument, default, kind)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = _described(argument, default, "keyword")
    return found


def _described(argument: ast.arg, default: ast.expr | None, kind: str) -> str:
    return f"{kind} {ast.unparse(argument)}" + (f" = {ast.unparse(default)}" if default else "")


def _returns(signature: str) -> str:
    return signature[signature.rindex(" -> ") :]


def _schema_changes(place: str, old: Any, new: Any) -> Iterator[Change]:
    """A field that need not be there, of an object that may have any, is additive; nothing else is."""
    if old == new:
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        text = f"{place} was {json.dumps(old)} and is {json.dumps(new)}"
        yield Change(text, additive=False, of_manifest=True)
        return
    for name, gone, came in _pairs(old, new):
        if name in ("properties", "$defs") and gone is not None and came is not None:
            for field, one, other in _pairs(gone, came):
                if one is None:
                    is_open = name == "$defs" or (
                        new.get("additionalProperties", True) is True and field not in new.get("required", [])
                    )
                    yield Change(f"{place} has got {field}", is_open, of_manifest=True)
                else:
                    yield from _schema_changes(f"{place}, {field}", one, other)
        else:
            yield from _schema_changes(f"{place}, {name}", gone, came)


def _listed(found: Iterable[Change]) -> str:
    return "\n".join(f"  {change.what}." for change in found)


if __name__ == "__main__":
    refusal = record(RECORDED, current())
    if refusal is not None:
        raise SystemExit(refusal)
    sys.stdout.write(f"Recorded in {RECORDED.relative_to(ROOT)}.\n")
