"""The pages in docs/: their Python runs as it stands, and they name all that there is, and nothing else."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pluggy
import pytest

from vibe_store import builtins, hookspecs
from vibe_store.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)

PUBLIC = [
    "vibe_store",
    *(f"vibe_store.{name}" for name in ("checkpoint", "discovery", "errors", "hookspecs", "interfaces")),
    *(f"vibe_store.{name}" for name in ("metrics", "options", "registry", "retention", "run_dir")),
    *(f"vibe_store.{name}" for name in ("runner", "runner.wrappers", "serializers", "testing")),
    *(f"vibe_store.storage.{name}" for name in ("calls", "keys", "object_store", "redaction")),
    *(f"vibe_store.algorithms.{name}" for name in ("dqn", "networks", "ppo", "prioritized", "replay")),
    *(f"vibe_store.algorithms.{name}" for name in ("running_stats", "sac")),
]
"""The modules whose names users and plugins may rely on."""

INTERNAL = {
    *("vibe_store.builtins", "vibe_store.cli", "vibe_store.deadline", "vibe_store.durable_files"),
    *("vibe_store.algorithms", "vibe_store.algorithms.settings", "vibe_store.algorithms.shuffle"),
    *("vibe_store.provider_target", "vibe_store.storage", "vibe_store.temporary_folders"),
}
"""The other modules on the upper levels. Those below are internal, if not public."""

PRESETS = ["cartpole_dqn", "pendulum_sac", "cartpole_ppo"]
"""A preset of each algorithm: their options are those of all."""


def page_param(page: Path) -> object:
    """A page, marked as a proof where its code trains or asks a server."""
    text = page.read_text("utf-8")
    long = "s3://bucket" in text or "import gymnax" in text
    return pytest.param(page, marks=pytest.mark.proof if long else (), id=str(page.relative_to(DOCS)))


def expanded(text: str) -> str:
    """A page with the files that it includes."""
    return SNIPPET.sub(lambda found: (ROOT / found[1]).read_text("utf-8").rstrip(), text)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a page in a language, each with the line before it."""
    text = expanded(page.read_text("utf-8"))
    return [(text[: m.start(2)].count("\n"), m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def commands(page: Path) -> list[list[str]]:
    """The words after ``vibe-store`` of each command of a page."""
    lines = [
        line.partition("#")[0].split()
        for _, block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [words[1:] for words in lines if words[:1] == ["vibe-store"]]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.fixture(scope="module")
def helped() -> dict[tuple[str, ...], str]:
    """What commands say of themselves; each is asked once."""
    return {}


def help_of(
    command: tuple[str, ...], known: dict[tuple[str, ...], str], capsys: pytest.CaptureFixture[str]
) -> str:
    """What ``vibe-store COMMAND --help`` prints, in one line."""
    if command not in known:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "110")
            try:
                status: object = main([*command, "--help"])
            except SystemExit as stop:
                status = stop.code
        assert not status, command
        known[command] = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    return known[command]


# --- What a page says is so.


@pytest.mark.parametrize("page", [page_param(page) for page in WITH_PYTHON])
def test_the_python_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "plugins" / "vibe-store-template")  # which the guides include
    if "s3://bucket" in page.read_text("utf-8"):
        s3 = request.getfixturevalue("s3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.storage_options["key"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.storage_options["secret"])
    # Named as a module that there is: a dataclass looks its own up.
    namespace: dict[str, object] = {"__name__": __name__}
    for line, block in blocks(page, "python"):
        # The padding makes a traceback show the page's own line numbers.
        exec(compile("\n" * line + block, str(page), "exec"), namespace)  # noqa: S102 - it is our page


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_command_of_a_page_takes_the_options_that_it_is_given(
    page: Path, helped: dict[tuple[str, ...], str], capsys: pytest.CaptureFixture[str]
) -> None:
    for command, *arguments in commands(page):
        preset = arguments[:1] if command == "train" else []
        usage = help_of((command, *preset), helped, capsys)
        options = [word for word in arguments if word.startswith("--")]
        assert [option for option in options if f"{option} " not in usage] == [], command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_file_that_a_page_links_to_or_includes_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in SNIPPET.findall(text) if not (ROOT / name).exists()] == []
    assert SNIPPET.findall(text) == re.findall(r'8\s*<.*?"(.+)"', text)  # as a formatter may take it apart


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_the_readme_leads_to_the_docs() -> None:
    linked = set(re.findall(r"\]\(docs/([\w/]+\.md)\)", (ROOT / "README.md").read_text("utf-8")))
    assert linked >= {"index.md", "buckets.md", "training.md", "plugins/index.md", "format.md"}


# --- What there is stands on a page.


def undocumented(module: ModuleType, directives: Iterable[str]) -> list[str]:
    """The public names of a module that no page of the reference shows, or that say nothing of themselves.

    A page shows what it names itself, and of a module that it names what that module defines.
    """
    directives = set(directives)
    missing = []
    for name in getattr(module, "__all__", ()):
        home = home_of(module, name)
        if f"{module.__name__}.{name}" not in directives and not (
            module.__name__ in directives and home is module
        ):
            missing.append(f"{module.__name__}.{name} is on no page")
        if name.startswith("_"):
            missing.append(f"{module.__name__}.{name} looks private, and no page shows such a name")
        if not described(home).get(name):
            missing.append(f"{home.__name__}.{name} has no docstring, or, being a constant, none below it")
        value = getattr(module, name)
        missing += [f"{home.__name__}.{name}.{method} has no docstring" for method in silent_methods(value)]
    return missing


def silent_methods(value: object) -> list[str]:
    """The public methods and properties of a class that say nothing, nor does what they override."""
    own = vars(value).items() if inspect.isclass(value) else ()
    return [
        name
        for name, method in own
        if not name.startswith("_")
        and (isinstance(method, property | classmethod | staticmethod) or inspect.isfunction(method))
        and not inspect.getdoc(getattr(value, name))
    ]


def home_of(module: ModuleType, name: str) -> ModuleType:
    """The module that defines a name which another one offers."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}:
            return home_of(importlib.import_module(str(node.module)), name)
    return module


@cache
def described(module: ModuleType) -> dict[str, str]:
    """The docstrings of what a module defines; of a constant, the text below it."""
    body = ast.parse(inspect.getsource(module)).body
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name: ast.get_docstring(node) or "" for node in body if isinstance(node, kinds)}
    for one, other in pairwise(body):
        if isinstance(other, ast.Expr) and isinstance(other.value, ast.Constant):
            targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", None)]
            found |= {target.id: str(other.value.value) for target in targets if isinstance(target, ast.Name)}
    return found


def all_directives() -> list[str]:
    return [name for page in PAGES for name in DIRECTIVE.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "vibe_store"])
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert undocumented(importlib.import_module(name), all_directives()) == []


def test_what_the_package_itself_offers_is_what_the_reference_says() -> None:
    import vibe_store

    page = (DOCS / "reference" / "checkpoint.md").read_text("utf-8").partition(":::")[0]
    names = set(re.findall(r"`(\w+)`", page)) - {"vibe_store", "directory"}
    assert names == set(vibe_store.__all__)


def test_every_directive_of_the_reference_names_something() -> None:
    for name in all_directives():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_module_is_public_or_internal() -> None:
    source = ROOT / "vibe_store"
    found = {f"vibe_store.{path.stem}" for path in source.glob("[!_]*.py")}
    found |= {f"vibe_store.{path.parent.name}" for path in source.glob("*/__init__.py")}
    found |= {f"vibe_store.algorithms.{path.stem}" for path in (source / "algorithms").glob("[!_]*.py")}
    assert found - set(PUBLIC) - INTERNAL == set()
    assert set(PUBLIC) & INTERNAL == set()


def hooks_without(module: object, text: str) -> list[str]:
    """What a page lacks of the hooks of a module: a hook as ``name(argument, ...)``."""
    manager = pluggy.PluginManager("vibe_store")
    manager.add_hookspecs(module)
    hooks = [hook for name, hook in sorted(vars(manager.hook).items()) if not name.startswith("_")]
    signatures = [f"`{hook.name}({', '.join(arguments_of(hook.spec.function))})`" for hook in hooks]
    return [signature for signature in signatures if signature not in text]


def arguments_of(function: Callable[..., object]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_every_hook_is_on_the_page_on_plugins_with_its_arguments() -> None:
    text = (DOCS / "plugins" / "index.md").read_text("utf-8")
    assert "vibe_store_storage()" in text
    assert hooks_without(hookspecs, text) == []
    for field in inspect.signature(hookspecs.Provider).parameters:
        assert f"| `{field}` |" in text


def test_a_hook_without_its_arguments_would_be_noticed() -> None:
    class Specs:
        @hookspecs.hookspec
        def vibe_store_made_up(self, first: int, second: int = 2) -> None:
            """Take two arguments."""

    assert hooks_without(Specs, "`vibe_store_made_up()` and `vibe_store_made_up(first)`")
    assert hooks_without(Specs, "`vibe_store_made_up(first, second)`") == []


def test_every_storage_of_ours_is_in_the_table_of_guarantees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "plugins" / "vibe-store-obstore")
    obstore = importlib.import_module("vibe_store_obstore")
    schemes = {provider.name for hooks in (builtins, obstore) for provider in hooks.vibe_store_storage()}
    table = (DOCS / "guarantees.md").read_text("utf-8").partition("\n\nAnd what follows")[0]
    rows = re.findall(r"^\| (`.*?|a path.*?) \|", table, re.MULTILINE)
    named = {"fsspec", *(scheme for row in rows for scheme in re.findall(r"`([\w+]+)://`", row))}
    assert len(schemes) > 5
    assert schemes - named == set()


def command_sections() -> dict[str, str]:
    """The section of each command on the page on the command line."""
    _, *parts = re.split(r"^## vibe-store (\S+)$", (DOCS / "cli.md").read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows_of(section: str) -> dict[str, str]:
    """What a section says of each option that it has a row on."""
    rows = re.findall(r"^\| `(-*[\w.-]+)[^`]*` \| (.*?) \|", section, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    return dict(rows)


def test_every_command_has_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    there = re.findall(r"^  ([a-z-]+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(there) == sorted(command_sections())


@pytest.mark.parametrize("command", sorted(command_sections()))
def test_every_option_of_a_command_is_on_the_page_with_what_it_does(
    command: str, helped: dict[tuple[str, ...], str], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [(command, preset) for preset in PRESETS] if command == "train" else [(command,)]
    usage = " ".join(help_of(call, helped, capsys) for call in calls)
    rows = rows_of(command_sections()[command])
    options = {name for name in rows if name.startswith("--")}
    there = set(re.findall(r"(?<![\w.-])--[a-z][\w.-]*[a-z0-9]", usage)) - {"--help"}
    if command == "verify-resume":  # which has no options but one of its own, and writes its help by hand
        assert options == there - {"--runner.total-timesteps"} == {"--kill"}
        return
    assert options == there
    assert [name for name, text in rows.items() if text not in usage] == []
