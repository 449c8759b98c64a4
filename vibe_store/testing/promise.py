"""Ties each test of a contract to the promise that it tries, so that a failure says which was broken."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

import pytest

__all__ = ["promised_by"]

_Arguments = ParamSpec("_Arguments")


def promised_by(*places: str) -> Callable[[Callable[_Arguments, None]], Callable[_Arguments, None]]:
    """Let a failing test say which promise was broken, which is its docstring, and where that is written.

    Args:
        places: names in ``vibe_store.interfaces``: ``"StorageBackend.write"``, say.

    Returns:
        A decorator. The test that it returns has the attributes ``promise``, a sentence, and ``places``, the
        full names.
    """
    full = tuple(f"vibe_store.interfaces.{place}" for place in places)

    def decorate(test: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
        promise = " ".join((inspect.getdoc(test) or "").split())

        @functools.wraps(test)
        def held(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
            __tracebackhide__ = True
            try:
                test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:
                error.add_note(f"The promise: {promise}\nIt is made by {' and '.join(full)}.")
                raise

        vars(held).update(promise=promise, places=full)
        return held

    return decorate
