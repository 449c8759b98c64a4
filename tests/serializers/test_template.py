"""What stands for a callable where there is no template has the name that was saved, whatever that is."""

from pathlib import Path
from typing import Any

import pytest

from vibe_store import load_checkpoint, save_checkpoint


class Nameless:
    """A callable that says it has no name, and is in no module."""

    def __init__(self) -> None:
        self.__qualname__ = self.__name__ = ""
        self.__module__ = None

    def __call__(self) -> None: ...


@pytest.mark.parametrize("serializer", ["eqx", "orbax"])
def test_a_callable_without_a_name_loads_without_a_template_and_without_a_warning(
    serializer: str, tmp_path: Path
) -> None:
    if serializer == "orbax":
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
    save_checkpoint(tmp_path, {"a": Nameless(), "b": 1}, step=1, serializer=serializer)
    loaded: Any = load_checkpoint(tmp_path, None, step=1)
    assert loaded["a"].name == ""
    assert loaded["b"] == 1
