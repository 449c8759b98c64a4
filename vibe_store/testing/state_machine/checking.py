"""Runs the state machine: all its rules, on one storage after another, in any order."""

import math
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.interfaces import StorageBackend
from vibe_store.testing.state_machine.one_at_a_time import OneAtATime
from vibe_store.testing.state_machine.two_at_once import TwoAtOnce

__all__ = ["Directory", "check_directory"]

_RULES_AT_A_TIME = 50


class Directory(OneAtATime, TwoAtOnce):
    """All the rules together."""


def check_directory(make: Callable[[], StorageBackend], *, rules: int = 500, vary: bool = False) -> None:
    """Check that directories of checkpoints in a storage hold what a model says, whatever is done to them.

    Two writers save, overwrite, restore, pin, mark the best and prune, one after another and at the same
    time, while calls to the storage fail and processes end in the middle; what is stored is compared with
    the model after each of that. A storage that keeps the promises of
    :class:`~vibe_store.testing.StorageContract` passes.

    Args:
        make: opens a storage at a new, empty root each time. A storage on a local disk needs a root of the
            form ``<new folder>/checkpoints``, where :class:`~vibe_store.RunDir` expects it.
        rules: how many things at least to do in all; some thousand a minute, on a storage in memory.
        vary: do other things at each run, instead of the same ones.
    """

    class Machine(Directory):
        rules_run = 0

    setattr(Machine, "make", staticmethod(make))  # noqa: B010 - mypy takes it for a method otherwise
    with pytest.MonkeyPatch.context() as patch:
        # What a dead writer left goes after a day where there is no lock. Here nobody else writes.
        patch.setattr(
            "vibe_store.checkpoint.manager.sweep_unnamed",
            lambda storage, **_: sweep_unnamed(storage, older_than=0.0),
        )
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=math.ceil(rules / _RULES_AT_A_TIME * 1.3),
                stateful_step_count=_RULES_AT_A_TIME,
                derandomize=not vary,
                database=None,
                deadline=None,
                print_blob=True,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert Machine.rules_run >= rules
