"""Each of these policies breaks one promise, and the contract of retention policies catches it."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from vibe_store.interfaces import RetentionPolicy
from vibe_store.retention import latest
from vibe_store.testing import RetentionContract

pytestmark = [pytest.mark.proof, pytest.mark.xdist_group("retention_mutants")]


class Latest(RetentionContract):
    """The contract, of the policy that keeps the latest three."""

    make: ClassVar[Callable[[], Any]] = lambda: latest(3)
    examples = 20

    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        return type(self).make()


def test_a_mutant_is_caught_by_the_test_of_what_it_breaks(
    mutant: type[Any], assert_caught: Callable[[type[Any]], None]
) -> None:
    assert_caught(mutant)


class DeletesAStepThatItWasNotShown(Latest):
    unmutated = Latest
    caught_by = "test_only_steps_that_were_shown_are_deleted"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            return latest(3)(checkpoints) | ({checkpoints[-1].step - 1} if len(checkpoints) > 5 else set())


class DeletesEverythingButWhatItSawOnce(Latest):
    unmutated = Latest
    caught_by = "test_a_policy_has_no_side_effects"

    class make:  # noqa: N801 - it stands for a function
        def __init__(self) -> None:
            self.seen: set[int] = set()

        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            new = {info.step for info in checkpoints} - self.seen
            self.seen |= new
            return frozenset(new)


class SortsWhatItIsShown(Latest):
    unmutated = Latest
    caught_by = "test_a_policy_has_no_side_effects"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            if isinstance(checkpoints, list):
                checkpoints.sort(key=lambda info: info.created)
            return frozenset()


class DeletesTheOlderHalfOfWhatIsLeft(Latest):
    unmutated = Latest
    caught_by = "test_a_policy_deletes_nothing_more_of_what_it_left"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            return frozenset(info.step for info in checkpoints[: len(checkpoints) // 2])


class ReturnsWhatIsToBeKept(Latest):
    unmutated = Latest
    caught_by = "test_a_policy_deletes_nothing_more_of_what_it_left"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            return frozenset(info.step for info in checkpoints) - latest(3)(checkpoints)


class ReturnsAList(Latest):
    unmutated = Latest
    caught_by = "test_only_steps_that_were_shown_are_deleted"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> Any:
            return sorted(latest(3)(checkpoints))


class ReturnsRecords(Latest):
    unmutated = Latest
    caught_by = "test_only_steps_that_were_shown_are_deleted"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> Any:
            return frozenset(str(info.step) for info in checkpoints[:-3])


class NeedsAMetric(Latest):
    unmutated = Latest
    caught_by = "test_only_steps_that_were_shown_are_deleted"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            return frozenset(info.step for info in checkpoints if info.metrics["loss"] > 10)


class NeedsACheckpoint(Latest):
    unmutated = Latest
    caught_by = "test_of_no_checkpoints_none_is_deleted"

    class make:  # noqa: N801 - it stands for a function
        def __call__(self, checkpoints: Any, /) -> frozenset[int]:
            newest = max(info.step for info in checkpoints)
            return latest(3)(checkpoints) - {newest}
