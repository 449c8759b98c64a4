"""The exceptions and warnings."""

import inspect
import pickle
from typing import Any

import pytest

from vibe_store import errors

_GIVEN: dict[str, Any] = {"step": 7, "differences": ("a differs",), "paths": ("a",)}


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_comes_whole_out_of_another_process(name: str) -> None:
    kind = getattr(errors, name)
    parameters = inspect.signature(kind.__init__).parameters.values()
    keywords = {each.name: _GIVEN[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
    error = kind("What was wrong.", **keywords)
    error.add_note("While something was done.")
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - the bytes were made on this very line
    assert type(arrived) is kind
    assert str(arrived) == "What was wrong."
    assert arrived.__notes__ == error.__notes__
    assert {each: getattr(arrived, each) for each in keywords} == keywords
