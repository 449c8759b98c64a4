"""What plugins and stored checkpoints rely on stays as it was recorded, or a version is raised."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vibe_store import interfaces
from vibe_store.checkpoint.manifest import FORMAT
from vibe_store.hookspecs import API_VERSION

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOOKS, INTERFACES = "vibe_store/hookspecs.py", "vibe_store/interfaces.py"
SCHEMA = "docs/manifest.schema.json"

BREAKING = {
    "a hook that is gone": (
        HOOKS,
        "def vibe_store_storage() ->",
        "def _old() ->",
        "vibe_store_storage is gone",
    ),
    "a hook that returns something else": (
        HOOKS,
        "vibe_store_retention() -> Sequence[Provider]",
        "vibe_store_retention() -> Mapping[str, Provider]",
        "-> Map",
    ),
    "a field of Provider that has to be given": (
        HOOKS,
        "    target: str\n",
        "    target: str\n    summary: str\n",
        "summary",
    ),
    "a field of Provider in another place": (
        HOOKS,
        '    install: str = ""\n    api: int = 1\n',
        '    api: int = 1\n    install: str = ""\n',
        "in another order",
    ),
    "another default": (HOOKS, '    install: str = ""\n', '    install: str = "vibe-store"\n', "vibe-store"),
    "a field of a record that is gone": (
        INTERFACES,
        "    modified: float\n",
        "",
        "Blob no longer has ['modified: float']",
    ),
    "a field of a record of another type": (
        INTERFACES,
        "    modified: float\n",
        "    modified: datetime\n",
        "datetime",
    ),
    "a field within a record": (
        INTERFACES,
        "    size: int\n    modified",
        "    size: int\n    owner: str = ''\n    modified",
        "owner",
    ),
    "an abstract method that no plugin has": (
        INTERFACES,
        "    def sweep(self)",
        "    @abstractmethod\n    def rename(self, key: str, to: str) -> None: ...\n\n    def sweep(self)",
        "StorageBackend.rename is new, and no plugin has it",
    ),
    "a method that becomes abstract": (
        INTERFACES,
        "    def sweep(self)",
        "    @abstractmethod\n    def sweep(self)",
        "sweep",
    ),
    "a method that is gone": (
        INTERFACES,
        "    def sweep(self)",
        "    def _sweep(self)",
        "StorageBackend.sweep is gone",
    ),
    "an argument that plugins do not take": (
        INTERFACES,
        "def put(self, source: Path, key: str, *, move",
        "def put(self, source: Path, key: str, *, progress: object = None, move",
        "progress",
    ),
    "an argument of another name": (
        INTERFACES,
        "def get(self, key: str, target",
        "def get(self, name: str, target",
        "name: str",
    ),
    "a method that returns something else": (
        INTERFACES,
        'def list(self, prefix: str = "") -> Iterator[Blob]',
        'def list(self, prefix: str = "") -> list[Blob]',
        "list[Blob]",
    ),
    "an argument that callers of Source do not give": (
        INTERFACES,
        "def path(self, name: str) -> Path",
        "def path(self, name: str, level: str) -> Path",
        "level",
    ),
    "a policy that is called with more": (
        INTERFACES,
        "checkpoints: Sequence[CheckpointInfo], /)",
        "checkpoints: Sequence[CheckpointInfo], now: float, /)",
        "now",
    ),
    "a kind of leaf that is gone": (
        INTERFACES,
        '"bytes", "callable"',
        '"bytes"',
        "LeafKind no longer has ['callable']",
    ),
    "a field of the manifest that has to be there": (
        SCHEMA,
        '"metadata", "items"]',
        '"metadata", "items", "host"]',
        "format 1",
    ),
    "a field of the manifest that is gone": (SCHEMA, '"attempt": {"type": "string"},', "", "format 1"),
    "a field of a row, which older readers refuse": (
        SCHEMA,
        '"path": {"type": "string"},',
        '"path": {"type": "string"}, "unit": {"type": "string"},',
        "has got unit",
    ),
    "a field of the manifest of another type": (
        SCHEMA,
        '"attempt": {"type": "string"}',
        '"attempt": {"type": "integer"}',
        "format 1",
    ),
    "a new kind of leaf in the manifest": (
        SCHEMA,
        '"bytes", "callable"\n',
        '"bytes", "callable", "text"\n',
        "format 1",
    ),
    "a checksum of another form": (SCHEMA, "^[0-9a-f]{32}$", "^[0-9a-f]{64}$", "format 1"),
}
"""Changes that are refused: of which file, what is replaced, by what, and what the sentence has to say."""

ADDITIVE = {
    "a new hook": (
        HOOKS,
        "@hookspec\ndef vibe_store_storage",
        "@hookspec\ndef vibe_store_metrics() -> None: ...\n\n\n@hookspec\ndef vibe_store_storage",
        "the hook vibe_store_metrics is new",
    ),
    "an argument of a hook": (
        HOOKS,
        "vibe_store_storage() ->",
        "vibe_store_storage(registry: object) ->",
        "registry",
    ),
    "a field of Provider with a default": (
        HOOKS,
        "    api: int = 1\n",
        "    api: int = 1\n    summary: str = ''\n",
        "summary",
    ),
    "a field of a record with a default": (
        INTERFACES,
        "    version: str | None = None\n",
        "    version: str | None = None\n    owner: str = ''\n",
        "owner",
    ),
    "a method that has a default": (
        INTERFACES,
        "    def sweep(self)",
        "    def close(self) -> None: ...\n\n    def sweep(self)",
        "StorageBackend.close is new",
    ),
    "a method of Source": (
        INTERFACES,
        "    def path(self, name: str) -> Path",
        "    def size(self) -> int: ...\n\n    @abstractmethod\n    def path(self, name: str) -> Path",
        "Source.size is new",
    ),
    "an argument of Source with a default": (
        INTERFACES,
        "def path(self, name: str) -> Path",
        "def path(self, name: str, *, level: str = '') -> Path",
        "level",
    ),
    "a method that is abstract no more": (
        INTERFACES,
        "    @abstractmethod\n    def best_step",
        "    def best_step",
        "Checkpointer.best_step",
    ),
    "a level of verification": (INTERFACES, '"sizes", "off"]', '"sizes", "tree", "off"]', "Verify"),
    "a new record": (
        INTERFACES,
        "@dataclass(frozen=True, slots=True)\nclass SavedItem",
        "@dataclass\nclass Owner:\n    name: str\n\n\n@dataclass(frozen=True, slots=True)\nclass SavedItem",
        "the record Owner is new",
    ),
    "a field of the manifest that may be missing": (
        SCHEMA,
        '"attempt": {"type": "string"},',
        '"attempt": {"type": "string"}, "host": {"type": "string"},',
        "has got host",
    ),
}
"""Changes that may be, in the same form."""


@pytest.fixture(scope="module")
def interface(load: Callable[[Path], ModuleType]) -> ModuleType:
    return load(HERE / "interface.py")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((HERE / "recorded.json").read_text("utf-8"))


def with_change(interface: ModuleType, file: str, old: str, new: str) -> dict[str, Any]:
    """The record of a tree in which one text of one file is another."""

    def read(name: str) -> str:
        text = (ROOT / name).read_text("utf-8")
        assert name != file or old in text, f"{file} has no {old!r} any more: change the test"
        return text.replace(old, new, 1) if name == file else text

    return interface.current(read=read)


def test_nothing_has_changed_since_it_was_recorded(interface: ModuleType, recorded: dict[str, Any]) -> None:
    problem = interface.forbidden(recorded, interface.current()) or interface.unrecorded(
        recorded, interface.current()
    )
    assert problem is None, problem


def test_everything_that_plugins_see_is_in_the_record(recorded: dict[str, Any]) -> None:
    names = {*recorded["interfaces"], *recorded["records"], *recorded["literals"]}
    assert names == {*interfaces.__all__, "Provider"} - {"PyTree"}
    assert {"vibe_store_storage", "vibe_store_serializers", "vibe_store_retention"} <= set(recorded["hooks"])
    assert (recorded["api_version"], recorded["format"]) == (API_VERSION, FORMAT)
    assert all(methods["methods"] for methods in recorded["interfaces"].values())
    assert all(recorded["records"].values())


@pytest.mark.parametrize("change", BREAKING, ids=list(BREAKING))
def test_what_breaks_is_refused_with_what_to_do(
    change: str, interface: ModuleType, recorded: dict[str, Any]
) -> None:
    file, old, new, says = BREAKING[change]
    changed = with_change(interface, file, old, new)
    problem = interface.forbidden(recorded, changed)
    assert problem is not None
    assert says in problem
    assert ("raise FORMAT" if file == SCHEMA else "raise API_VERSION") in problem
    raised = {**changed, "api_version": API_VERSION + 1, "format": FORMAT + 1}
    assert interface.forbidden(recorded, raised) is None
    assert interface.unrecorded(recorded, raised) is not None
    other = {**changed, ("api_version" if file == SCHEMA else "format"): 99}
    assert interface.forbidden(recorded, other) is not None  # the wrong version was raised


@pytest.mark.parametrize("change", ADDITIVE, ids=list(ADDITIVE))
def test_what_is_additive_only_has_to_be_recorded(
    change: str, interface: ModuleType, recorded: dict[str, Any]
) -> None:
    file, old, new, says = ADDITIVE[change]
    changed = with_change(interface, file, old, new)
    assert interface.forbidden(recorded, changed) is None
    problem = interface.unrecorded(recorded, changed)
    assert problem is not None
    assert says in problem
    assert "python tests/stability/interface.py" in problem


def test_words_for_people_are_no_change(interface: ModuleType, recorded: dict[str, Any]) -> None:
    for file, old, new in (
        (SCHEMA, '"One row of the leaf table."', '"A row."'),
        (INTERFACES, '"""Objects under one root URL', '"""The objects under one root URL'),
        (INTERFACES, "    key: str\n    size", "    key: str  # relative to the root\n    size"),
    ):
        assert with_change(interface, file, old, new) == recorded


def test_a_version_is_never_lowered(interface: ModuleType, recorded: dict[str, Any]) -> None:
    for version in ("api_version", "format"):
        assert "never lowered" in interface.forbidden(recorded, {**recorded, version: 0})


def test_the_command_records_what_may_be_and_nothing_else(
    interface: ModuleType, recorded: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "recorded.json"
    assert interface.record(path, recorded) is None
    assert json.loads(path.read_text("utf-8")) == recorded
    file, old, new, _ = BREAKING["a method that is gone"]
    assert "raise API_VERSION" in interface.record(path, with_change(interface, file, old, new))
    assert json.loads(path.read_text("utf-8")) == recorded
    file, old, new, _ = ADDITIVE["a new hook"]
    more = with_change(interface, file, old, new)
    assert interface.record(path, more) is None
    assert json.loads(path.read_text("utf-8")) == more
