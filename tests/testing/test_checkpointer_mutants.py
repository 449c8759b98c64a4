"""Each of these checkpointers breaks one promise, and the contract of checkpointers catches it."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import numpy as np
import pytest

from vibe_store.checkpoint import CheckpointManager, save_checkpoint
from vibe_store.errors import (
    CheckpointNotFoundError,
    SaveFailedError,
    TemplateMismatchError,
    UnsupportedLeafError,
)
from vibe_store.interfaces import CheckpointInfo
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import CheckpointerContract, CheckpointerDirectory, Fault, FaultyStorage

pytestmark = [pytest.mark.proof, pytest.mark.xdist_group("checkpointer_mutants")]


class InMemory(CheckpointerContract):
    """The contract, of the manager of a directory in memory."""

    Manager: ClassVar[Callable[..., CheckpointManager]] = CheckpointManager

    @pytest.fixture
    def directory(self) -> CheckpointerDirectory:
        storage = FaultyStorage(MemoryStorage(f"memory://{uuid.uuid4().hex}/checkpoints"))

        @contextmanager
        def failing() -> Iterator[None]:
            storage.faults = (Fault(lambda call: call.method in {"write", "put"}),)
            yield
            storage.faults = ()

        def open_manager() -> CheckpointManager:
            return type(self).Manager(
                storage, max_to_keep=12, save_interval_steps=10, best_fn=lambda metrics: metrics["loss"]
            )

        return CheckpointerDirectory(open_manager, failing)


def test_a_mutant_is_caught_by_the_test_of_what_it_breaks(
    mutant: type[Any], assert_caught: Callable[[type[Any]], None]
) -> None:
    assert_caught(mutant)


# --- Saving.


class ReturnsBeforeTheSnapshot(InMemory):
    unmutated = InMemory
    caught_by = "test_donation_and_changes_in_place_after_a_save_do_not_change_what_is_stored"

    class Manager(CheckpointManager):
        thread: threading.Thread | None = None

        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            def later() -> None:
                time.sleep(0.05)
                with suppress(UnsupportedLeafError):
                    super(type(self), self).save(step, pytree, **options)

            self.thread = threading.Thread(target=later)
            self.thread.start()
            return True

        def _settle(self) -> None:
            if self.thread is not None and self.thread is not threading.current_thread():
                self.thread.join()
            super()._settle()


class KeepsTheCallersMetadata(InMemory):
    unmutated = InMemory
    caught_by = "test_donation_and_changes_in_place_after_a_save_do_not_change_what_is_stored"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, *, metadata: Any = None, **options: Any) -> bool:
            self.__dict__["given"] = metadata
            return super().save(step, pytree, metadata=metadata, **options)

        def metadata(self, step: int) -> dict[str, Any] | None:
            super().metadata(step)
            return self.__dict__["given"]


class RestoresTheNewestForEveryStep(InMemory):
    unmutated = InMemory
    caught_by = "test_saves_in_quick_succession_each_store_their_own_state"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, **options: Any) -> Any:
            super().restore(step, like, **options)
            return super().restore(None, like, **options)


class OverwritesAStepSilently(InMemory):
    unmutated = InMemory
    caught_by = "test_a_step_that_exists_is_refused_and_stays"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            if step not in self.all_steps():
                return super().save(step, pytree, **options)
            options.pop("force", None)
            save_checkpoint(self._storage, pytree, step=step, **options)
            return True


class LeavesAStepThatExistsWithoutAWord(InMemory):
    unmutated = InMemory
    caught_by = "test_a_step_that_exists_is_refused_and_stays"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            with suppress(FileExistsError):
                return super().save(step, pytree, **options)
            return False


class IgnoresForce(InMemory):
    unmutated = InMemory
    caught_by = "test_a_step_that_is_not_to_be_saved_is_saved_when_forced"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, *, force: bool = False, **options: Any) -> bool:
            del force
            return super().save(step, pytree, **options)


class SaysThatItSavesWhatItSkips(InMemory):
    unmutated = InMemory
    caught_by = "test_a_step_that_is_not_to_be_saved_is_saved_when_forced"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            super().save(step, pytree, **options)
            return True


class TakesAnyStep(InMemory):
    unmutated = InMemory
    caught_by = "test_a_step_that_is_none_is_refused"

    class Manager(CheckpointManager):
        def save(self, step: Any, pytree: Any, **options: Any) -> bool:
            return super().save(abs(int(step or 0)), pytree, **options)


class DropsALeafThatCannotBeStored(InMemory):
    unmutated = InMemory
    caught_by = "test_what_cannot_be_stored_is_refused_before_anything_is_written"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            kept = {name: leaf for name, leaf in pytree.items() if type(leaf) is not object}
            return super().save(step, kept, **options)


# --- Restoring.


class RestoresWhatWasSavedLast(InMemory):
    unmutated = InMemory
    caught_by = "test_no_step_means_the_newest"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, **options: Any) -> Any:
            self._settle()
            if step is None and self.last_committed is not None:
                step = self.last_committed.step
            return super().restore(step, like, **options)


class RestoresAnOlderStep(InMemory):
    unmutated = InMemory
    caught_by = "test_no_step_means_the_newest"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, **options: Any) -> Any:
            older = self.all_steps()[-2:-1] if step is None else []
            return super().restore(older[0] if older else step, like, **options)


class FallsBackToAStepThatFits(InMemory):
    unmutated = InMemory
    caught_by = "test_a_template_that_differs_is_refused_by_path"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, **options: Any) -> Any:
            if step is not None:
                return super().restore(step, like, **options)
            for one in reversed(self.all_steps()):
                with suppress(TemplateMismatchError):
                    return super().restore(one, like, **options)
            return super().restore(None, like, **options)


class ReturnsTheTemplateOfAnItemThatIsMissing(InMemory):
    unmutated = InMemory
    caught_by = "test_items_are_restored_apart"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, *, items: Any = None, **options: Any) -> Any:
            try:
                return super().restore(step, like, items=items, **options)
            except CheckpointNotFoundError:
                if not items:
                    raise
                return super().restore(step, like, **options), items


class NeedsATemplate(InMemory):
    unmutated = InMemory
    caught_by = "test_a_template_may_be_of_shapes_or_be_missing"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, **options: Any) -> Any:
            return super().restore(step, {} if like is None else like, **options)


class IsNeverPartial(InMemory):
    unmutated = InMemory
    caught_by = "test_a_part_is_restored_where_that_is_allowed"

    class Manager(CheckpointManager):
        def restore(
            self, step: int | None, like: Any = None, *, partial: bool = False, **options: Any
        ) -> Any:
            del partial
            return super().restore(step, like, **options)


class CastsWhatItRestores(InMemory):
    unmutated = InMemory
    caught_by = "test_what_was_saved_comes_back"

    class Manager(CheckpointManager):
        def restore(self, step: int | None, like: Any = None, **options: Any) -> Any:
            loaded = super().restore(step, like, **options)
            return {**loaded, "half": loaded["half"].astype(np.float32)} if "half" in loaded else loaded


# --- What is known of a step.


class SortsStepsAsText(InMemory):
    unmutated = InMemory
    caught_by = "test_steps_are_listed_as_numbers_in_order"

    class Manager(CheckpointManager):
        def all_steps(self) -> list[int]:
            return sorted(super().all_steps(), key=str)


class TakesTheLastForTheLatest(InMemory):
    unmutated = InMemory
    caught_by = "test_steps_are_listed_as_numbers_in_order"

    class Manager(CheckpointManager):
        def latest_step(self) -> int | None:
            latest = super().latest_step()
            return latest if self.last_committed is None else self.last_committed.step


class ListsAStepBeforeItIsCommitted(InMemory):
    unmutated = InMemory
    caught_by = "test_a_step_that_failed_is_seen_by_nobody"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            self.__dict__.setdefault("begun", set()).add(step)
            return super().save(step, pytree, **options)

        def all_steps(self) -> list[int]:
            return sorted({*super().all_steps(), *self.__dict__.get("begun", ())})


class LosesMetadata(InMemory):
    unmutated = InMemory
    caught_by = "test_metrics_metadata_and_the_record_of_a_step_come_back"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, *, metadata: Any = None, **options: Any) -> bool:
            del metadata
            return super().save(step, pytree, **options)


class RanksNaN(InMemory):
    unmutated = InMemory
    caught_by = "test_the_best_step_is_the_one_with_the_best_metric"

    class Manager(CheckpointManager):
        def best_step(self) -> int | None:
            ranks = {step: (self.info(step).metrics or {}).get("loss") for step in self.all_steps()}
            return min((step for step in ranks if ranks[step] is not None), key=ranks.get, default=None)


class FindsAnEmptyDirectoryAtFault(InMemory):
    unmutated = InMemory
    caught_by = "test_an_empty_directory_holds_no_step"

    class Manager(CheckpointManager):
        def latest_step(self) -> int | None:
            return self.all_steps()[-1]


# --- Waiting, closing and failing.


class ReadsWithoutWaiting(InMemory):
    unmutated = InMemory
    caught_by = "test_whoever_reads_sees_every_save_before"

    class Manager(CheckpointManager):
        def __init__(self, storage: Any, **options: Any) -> None:
            slow = Fault(lambda call: call.method in {"write", "put"}, "delay", seconds=0.05)
            super().__init__(FaultyStorage(storage, slow), **options)

        def all_steps(self) -> list[int]:
            return CheckpointManager(self._storage).all_steps()


class DoesNotWait(InMemory):
    unmutated = InMemory
    caught_by = "test_after_a_wait_everybody_sees_the_step"

    class Manager(CheckpointManager):
        def __init__(self, storage: Any, **options: Any) -> None:
            slow = Fault(lambda call: call.method in {"write", "put"}, "delay", seconds=0.05)
            super().__init__(FaultyStorage(storage, slow), **options)

        def wait(self) -> None:
            pass


class SavesAfterItWasClosed(InMemory):
    unmutated = InMemory
    caught_by = "test_a_close_waits_and_may_be_repeated"

    class Manager(CheckpointManager):
        def close(self) -> None:
            self.wait()


class DoesNotCloseAtTheEndOfABlock(InMemory):
    unmutated = InMemory
    caught_by = "test_the_end_of_a_block_closes"

    class Manager(CheckpointManager):
        def __init__(self, storage: Any, **options: Any) -> None:
            slow = Fault(lambda call: call.method in {"write", "put"}, "delay", seconds=0.05)
            super().__init__(FaultyStorage(storage, slow), **options)

        def __exit__(self, *_: object) -> None:
            pass


class SwallowsAFailureInTheBackground(InMemory):
    unmutated = InMemory
    caught_by = "test_a_failure_in_the_background_is_raised_once"

    class Manager(CheckpointManager):
        def wait(self) -> None:
            with suppress(SaveFailedError):
                super().wait()


class RaisesAFailureAgainAndAgain(InMemory):
    unmutated = InMemory
    caught_by = "test_a_failure_in_the_background_is_raised_once"

    class Manager(CheckpointManager):
        failure: SaveFailedError | None = None

        def wait(self) -> None:
            try:
                super().wait()
            except SaveFailedError as error:
                self.failure = error
            if self.failure is not None:
                raise self.failure


class ForgetsAFailureAtTheNextSave(InMemory):
    unmutated = InMemory
    caught_by = "test_a_failure_is_raised_by_the_next_save_or_by_the_close"

    class Manager(CheckpointManager):
        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            with suppress(SaveFailedError):
                self.wait()
            return super().save(step, pytree, **options)


class CountsAFailureAsCommitted(InMemory):
    unmutated = InMemory
    caught_by = "test_a_failure_in_the_background_is_raised_once"

    class Manager(CheckpointManager):
        begun: int | None = None

        def save(self, step: int, pytree: Any, **options: Any) -> bool:
            self.begun = step
            return super().save(step, pytree, **options)

        @property
        def last_committed(self) -> CheckpointInfo | None:
            last = super().last_committed
            return last and CheckpointInfo(self.begun, last.created, last.size, last.serializer)


class ListsAStepOfWhichFilesAreMissing(InMemory):
    unmutated = InMemory
    caught_by = "test_what_is_listed_can_be_restored"

    class Manager(CheckpointManager):
        def all_steps(self) -> list[int]:
            folders = {blob.key.partition("/")[0] for blob in self._storage.list("step_")}
            return sorted(int(folder.removeprefix("step_")) for folder in folders)

        def _settle(self) -> None:
            pass

        def __init__(self, storage: Any, **options: Any) -> None:
            slow = Fault(lambda call: call.method == "write", "delay", seconds=0.05)
            super().__init__(FaultyStorage(storage, slow), **options)
