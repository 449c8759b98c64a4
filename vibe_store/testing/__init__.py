"""What the authors of plugins need to test them: contracts to subclass, and a storage that fails on demand.

The contracts need ``pip install "vibe-store[testing]"``, and so are imported when they are first used; the
storage needs nothing.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from vibe_store.errors import MissingDependencyError
from vibe_store.testing.faulty_storage import EXIT_STATUS as EXIT_STATUS
from vibe_store.testing.faulty_storage import Call as Call
from vibe_store.testing.faulty_storage import Fault as Fault
from vibe_store.testing.faulty_storage import FaultyStorage as FaultyStorage

if TYPE_CHECKING:
    from vibe_store.testing.checkpointer_contract import CheckpointerContract, CheckpointerDirectory
    from vibe_store.testing.retention_contract import RetentionContract
    from vibe_store.testing.serializer_contract import SerializerContract
    from vibe_store.testing.state_machine import check_directory
    from vibe_store.testing.storage_contract import StorageContract, StorageRoot

__all__ = [
    "EXIT_STATUS",
    "Call",
    "CheckpointerContract",
    "CheckpointerDirectory",
    "Fault",
    "FaultyStorage",
    "RetentionContract",
    "SerializerContract",
    "StorageContract",
    "StorageRoot",
    "check_directory",
]

_HOME = {
    "CheckpointerContract": "checkpointer_contract",
    "CheckpointerDirectory": "checkpointer_contract",
    "RetentionContract": "retention_contract",
    "SerializerContract": "serializer_contract",
    "StorageContract": "storage_contract",
    "StorageRoot": "storage_contract",
    "check_directory": "state_machine",
}

# So that an assertion that fails shows its values. pytest rewrites what is imported after this only, and
# nobody but a pytest that runs already has a use for it.
if "pytest" in sys.modules:
    sys.modules["pytest"].register_assert_rewrite(
        *(
            f"{__name__}.{module}"
            for module in (*sorted({*_HOME.values()}), "generated_trees", "saving", "trees")
        )
    )


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name not in {"hypothesis", "pytest"}:
            raise
        raise MissingDependencyError(
            f"{__name__}.{name} needs {error.name}, which is not installed. "
            'Run `pip install "vibe-store[testing]"`.'
        ) from error
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
