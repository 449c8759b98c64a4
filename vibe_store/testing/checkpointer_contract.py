"""CheckpointerContract: every promise of Checkpointer, as tests that the author of one subclasses."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibe_store.errors import (
    CheckpointerClosedError,
    CheckpointNotFoundError,
    InvalidValueError,
    SaveFailedError,
    StepAlreadyExistsError,
    TemplateMismatchError,
    UnsupportedLeafError,
)
from vibe_store.interfaces import Checkpointer, PyTree
from vibe_store.testing.promise import promised_by
from vibe_store.testing.trees import assert_same

__all__ = ["CheckpointerContract", "CheckpointerDirectory"]

_Failing = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class CheckpointerDirectory:
    """A directory that is empty at first, and how the checkpointer under test opens it.

    Attributes:
        open: opens the directory, the same one each time. What it opens saves every multiple of 10 at least,
            keeps 12 steps at least, and ranks by the metric ``"loss"``, the lower the better.
        failing: a context in which everything that is written to the directory fails with an OSError. None
            skips the tests of what becomes of failures.
    """

    open: Callable[[], Checkpointer]
    failing: _Failing | None = None


class CheckpointerContract:
    """Every promise of :class:`~vibe_store.interfaces.Checkpointer`. Subclass it, override ``directory``::

    class TestMyCheckpointer(CheckpointerContract):
        @pytest.fixture
        def directory(self, tmp_path):
            return CheckpointerDirectory(open=lambda: MyCheckpointer(tmp_path), failing=...)
    """

    @pytest.fixture
    def directory(self) -> CheckpointerDirectory:
        """A new, empty directory for each test. Override this."""
        raise NotImplementedError(f"{type(self).__name__} has to override the fixture 'directory'.")

    @pytest.fixture
    def failing(self, directory: CheckpointerDirectory) -> _Failing:
        """Makes a context in which nothing can be written to the directory."""
        if directory.failing is None:
            pytest.skip("nothing makes writes to this directory fail (CheckpointerDirectory.failing)")
        return directory.failing

    # --- Saving and restoring.

    @promised_by("Checkpointer")
    def test_an_empty_directory_holds_no_step(self, directory: CheckpointerDirectory) -> None:
        """Where nothing was saved there is no step, and asking for one raises CheckpointNotFoundError."""
        with directory.open() as checkpointer:
            assert checkpointer.all_steps() == []
            assert checkpointer.latest_step() is None
            assert checkpointer.best_step() is None
            assert checkpointer.last_committed is None
            for step in (None, 10):
                with pytest.raises(CheckpointNotFoundError):
                    checkpointer.restore(step, {})
            with pytest.raises(CheckpointNotFoundError):
                checkpointer.info(10)
            with pytest.raises(CheckpointNotFoundError):
                checkpointer.metadata(10)
            checkpointer.wait()

    @promised_by("Checkpointer.save", "Checkpointer.restore")
    def test_what_was_saved_comes_back(self, directory: CheckpointerDirectory) -> None:
        """``restore`` gives the state of a step bit for bit, to this checkpointer and to a later one."""
        with directory.open() as checkpointer:
            for step in (20, 100, 10):
                assert checkpointer.save(step, _tree(step)) is True
            assert_same(checkpointer.restore(20, _tree(0)), _tree(20))
        with directory.open() as later:
            for step in (10, 20, 100):
                assert_same(later.restore(step, _tree(0)), _tree(step))

    @promised_by("Checkpointer.all_steps", "Checkpointer.latest_step")
    def test_steps_are_listed_as_numbers_in_order(self, directory: CheckpointerDirectory) -> None:
        """``all_steps`` is every committed step, ascending; ``latest_step`` is the highest of them."""
        with directory.open() as checkpointer:
            for step in (10**6, 20, 90, 100, 0):
                checkpointer.save(step, {"a": step})
            assert checkpointer.all_steps() == [0, 20, 90, 100, 10**6]
            assert checkpointer.latest_step() == 10**6

    @promised_by("Checkpointer.restore")
    def test_no_step_means_the_newest(self, directory: CheckpointerDirectory) -> None:
        """``restore(None)`` gives the highest step, whichever was saved or restored last."""
        with directory.open() as checkpointer:
            for step in (10, 30, 20):
                checkpointer.save(step, _tree(step))
            checkpointer.restore(10, _tree(0))
            assert_same(checkpointer.restore(None, _tree(0)), _tree(30))

    @promised_by("Checkpointer")
    def test_whoever_reads_sees_every_save_before(self, directory: CheckpointerDirectory) -> None:
        """Whatever reads sees every save that was made before it, one in the background too."""
        large = {"a": np.arange(500_000)}
        with directory.open() as checkpointer:
            checkpointer.save(10, large)
            assert checkpointer.all_steps() == [10]
            checkpointer.save(20, large)
            assert checkpointer.latest_step() == 20
            checkpointer.save(30, large, metadata={"a": 1})
            assert checkpointer.metadata(30) == {"a": 1}
            checkpointer.save(40, large)
            assert checkpointer.info(40).step == 40
            checkpointer.save(50, large, metrics={"loss": 1.0})
            assert checkpointer.best_step() == 50
            checkpointer.save(60, {"a": np.arange(3)})
            assert_same(checkpointer.restore(None, {"a": np.zeros(3, int)}), {"a": np.arange(3)})

    @promised_by("Checkpointer.wait", "Checkpointer.last_committed")
    def test_after_a_wait_everybody_sees_the_step(self, directory: CheckpointerDirectory) -> None:
        """After ``wait`` every save is committed: others see it, and ``last_committed`` is the last."""
        with directory.open() as checkpointer, directory.open() as other:
            checkpointer.save(10, {"a": np.arange(500_000)})
            checkpointer.wait()
            assert checkpointer.last_committed is not None
            assert checkpointer.last_committed.step == 10
            assert other.all_steps() == [10]

    @promised_by("Checkpointer.close")
    def test_a_close_waits_and_may_be_repeated(self, directory: CheckpointerDirectory) -> None:
        """``close`` waits for every save; closing twice is no error; afterwards nothing is saved."""
        checkpointer = directory.open()
        checkpointer.save(10, {"a": np.arange(500_000)})
        checkpointer.close()
        checkpointer.close()
        with directory.open() as other:
            assert other.all_steps() == [10]
        with pytest.raises(CheckpointerClosedError):
            checkpointer.save(20, {"a": 1})

    @promised_by("Checkpointer")
    def test_the_end_of_a_block_closes(self, directory: CheckpointerDirectory) -> None:
        """A checkpointer is a context manager: leaving the block commits what was saved in it."""
        with directory.open() as checkpointer:
            checkpointer.save(10, {"a": np.arange(500_000)})
        assert directory.open().all_steps() == [10]
        with pytest.raises(KeyError, match="the body's own"), directory.open() as checkpointer:
            raise KeyError("the body's own")

    @promised_by("Checkpointer.save")
    def test_donation_and_changes_in_place_after_a_save_do_not_change_what_is_stored(
        self, directory: CheckpointerDirectory
    ) -> None:
        """When ``save`` returns, the caller may donate and change everything that it passed."""
        array, numpy, more = jnp.arange(100_000.0), np.arange(100_000.0), np.arange(10)
        metrics, metadata = {"loss": 1.0}, {"deep": [1]}
        with directory.open() as checkpointer:
            checkpointer.save(
                10, {"a": array, "n": numpy}, items={"more": more}, metrics=metrics, metadata=metadata
            )
            jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(array))
            numpy[:] = -1
            more[:] = -1
            metrics["loss"] = 2.0
            metadata["deep"].append(2)
            like = {"a": jax.ShapeDtypeStruct((100_000,), jnp.float32), "n": np.zeros(100_000)}
            state, items = checkpointer.restore(10, like, items={"more": np.zeros(10, int)})
            assert_same(state, {"a": jnp.arange(100_000.0), "n": np.arange(100_000.0)})
            assert_same(items, {"more": np.arange(10)})
            assert checkpointer.info(10).metrics == {"loss": 1.0}
            assert checkpointer.metadata(10) == {"deep": [1]}

    @promised_by("Checkpointer.save")
    def test_saves_in_quick_succession_each_store_their_own_state(
        self, directory: CheckpointerDirectory
    ) -> None:
        """A save does not disturb the one before it, which may still be under way."""
        array = np.zeros(50_000)
        with directory.open() as checkpointer:
            for step in range(0, 50, 10):
                array[:] = step
                checkpointer.save(step, {"numpy": array, "jax": jnp.full(1000, step)})
            array[:] = -1
            for step in range(0, 50, 10):
                loaded = checkpointer.restore(step, {"numpy": array, "jax": jnp.zeros(1000, jnp.int32)})
                assert_same(loaded, {"numpy": np.full(50_000, float(step)), "jax": jnp.full(1000, step)})

    @promised_by("Checkpointer.save")
    def test_a_step_that_exists_is_refused_and_stays(self, directory: CheckpointerDirectory) -> None:
        """``save`` of a committed step raises StepAlreadyExistsError, forced or not, and changes nothing."""
        with directory.open() as checkpointer:
            checkpointer.save(10, _tree(10), metrics={"loss": 1.0})
            with pytest.raises(StepAlreadyExistsError):
                checkpointer.save(10, _tree(11), metrics={"loss": 2.0})
            checkpointer.wait()
        with directory.open() as later:
            with pytest.raises(StepAlreadyExistsError):
                later.save(10, _tree(12), force=True)
            assert later.all_steps() == [10]
            assert_same(later.restore(10, _tree(0)), _tree(10))
            assert later.info(10).metrics == {"loss": 1.0}

    @promised_by("Checkpointer.save")
    def test_a_step_that_is_not_to_be_saved_is_saved_when_forced(
        self, directory: CheckpointerDirectory
    ) -> None:
        """``save`` returns whether the step is saved; ``force`` saves it, whatever the interval says."""
        with directory.open() as checkpointer:
            for step in (10, 33):
                saved = checkpointer.save(step, {"a": step})
                assert (step in checkpointer.all_steps()) is saved
                if not saved:
                    assert checkpointer.save(step, {"a": step}, force=True) is True
            assert checkpointer.all_steps() == [10, 33]
            assert checkpointer.save(47, {"a": 47}, force=True) is True
            assert checkpointer.all_steps() == [10, 33, 47]

    # --- Items, templates.

    @promised_by("Checkpointer.save", "Checkpointer.restore")
    def test_items_are_restored_apart(self, directory: CheckpointerDirectory) -> None:
        """Each item is loaded where it is asked for, and no other; one that is not there is an error."""
        with directory.open() as checkpointer:
            checkpointer.save(10, _tree(1), items={"replay": _tree(2), "env-0": {"x": np.arange(4)}})
            assert_same(checkpointer.restore(10, _tree(0)), _tree(1))
            state, items = checkpointer.restore(10, _tree(0), items={"replay": _tree(0)})
            assert_same(state, _tree(1))
            assert_same(items, {"replay": _tree(2)})
            state, items = checkpointer.restore(None, _tree(0), items={})
            assert items == {}
            for step in (10, None):
                with pytest.raises(CheckpointNotFoundError, match="other"):
                    checkpointer.restore(step, _tree(0), items={"other": _tree(0)})

    @promised_by("Checkpointer.restore")
    def test_a_template_may_be_of_shapes_or_be_missing(self, directory: CheckpointerDirectory) -> None:
        """``like`` may be of ``jax.ShapeDtypeStruct``; without one, dicts and lists are restored."""
        tree = {"a": jnp.arange(3), "b": [np.ones(2), 1.5, "x"]}
        with directory.open() as checkpointer:
            checkpointer.save(10, tree)
            like = {"a": jax.ShapeDtypeStruct((3,), jnp.int32), "b": [np.zeros(2), 0.0, ""]}
            assert_same(checkpointer.restore(10, like), tree)
            assert_same(checkpointer.restore(10), tree)

    @promised_by("Checkpointer.restore")
    def test_a_template_that_differs_is_refused_by_path(self, directory: CheckpointerDirectory) -> None:
        """Where a template differs, TemplateMismatchError holds every difference; nothing older is loaded."""
        with directory.open() as checkpointer:
            checkpointer.save(10, {"a": np.zeros((3, 5)), "x": 1})
            checkpointer.save(20, {"a": np.zeros((3, 4)), "x": 1.5})
            for step in (20, None):
                with pytest.raises(TemplateMismatchError) as refused:
                    checkpointer.restore(step, {"a": np.zeros((3, 5)), "x": 1})
                assert {*refused.value.paths} == {"['a']", "['x']"}

    @promised_by("Checkpointer.restore")
    def test_a_part_is_restored_where_that_is_allowed(self, directory: CheckpointerDirectory) -> None:
        """With ``partial=True`` the checkpoint may hold leaves that a template does not."""
        with directory.open() as checkpointer:
            checkpointer.save(10, {"a": np.arange(3), "b": {"c": 1, "d": "x"}})
            loaded = checkpointer.restore(10, {"b": {"c": 0}}, partial=True)
            assert loaded == {"b": {"c": 1}}
            with pytest.raises(TemplateMismatchError):
                checkpointer.restore(10, {"b": {"c": 0}})

    # --- What is known of a step.

    @promised_by("Checkpointer.info", "Checkpointer.metadata")
    def test_metrics_metadata_and_the_record_of_a_step_come_back(
        self, directory: CheckpointerDirectory
    ) -> None:
        """``info`` and ``metadata`` say of each step what it was saved with, and when."""
        before = datetime.now(UTC)
        metadata = {"env": "CartPole", "seeds": [1, None, True], "nested": {"é": 0.5}}
        with directory.open() as checkpointer:
            checkpointer.save(
                10, {"a": np.zeros(100)}, items={"rest": 1}, metrics={"loss": 0.5, "n": 3}, metadata=metadata
            )
            checkpointer.save(20, {"a": 1})
        with directory.open() as later:
            info = later.info(10)
            assert info.step == 10
            assert {*info.items} == {"state", "rest"}
            assert info.metrics == {"loss": 0.5, "n": 3}
            assert info.size >= 800
            assert info.serializer
            minute = timedelta(minutes=1)
            assert before - minute <= info.created <= datetime.now(UTC) + minute
            assert later.metadata(10) == metadata
            assert {*later.info(20).items} == {"state"}
            assert later.info(20).metrics is None
            assert later.metadata(20) is None

    @promised_by("Checkpointer.best_step")
    def test_the_best_step_is_the_one_with_the_best_metric(self, directory: CheckpointerDirectory) -> None:
        """``best_step`` has the best metric; a step without it, or with NaN, is never best."""
        losses: dict[int, dict[str, float] | None] = {
            10: {"return": -5.0}, 20: {"loss": float("nan")}, 30: None, 40: {"loss": 3.0},
            50: {"loss": 1.0}, 60: {"loss": 2.0}, 70: {"loss": float("nan")},
        }  # fmt: skip
        best = []
        with directory.open() as checkpointer:
            for step, metrics in losses.items():
                checkpointer.save(step, {"a": 1}, metrics=metrics)
                best.append(checkpointer.best_step())
        assert best == [None, None, None, 40, 50, 50, 50]
        assert directory.open().best_step() == 50

    # --- Refusals.

    @promised_by("Checkpointer.save")
    def test_a_step_that_is_none_is_refused(self, directory: CheckpointerDirectory) -> None:
        """A step is a whole number from 0 up; anything else raises InvalidValueError."""
        accepted: list[Any] = []
        with directory.open() as checkpointer:
            for step in (-10, True, 10.0, "10", None):
                try:
                    accepted.append((step, checkpointer.save(step, {"a": 1}, force=True)))  # type: ignore[arg-type] # which is refused
                except InvalidValueError:
                    continue
            assert accepted == []
            assert checkpointer.all_steps() == []

    @promised_by("Checkpointer.save")
    def test_what_cannot_be_stored_is_refused_before_anything_is_written(
        self, directory: CheckpointerDirectory
    ) -> None:
        """A leaf, a metric or metadata that cannot be stored is refused at once, and nothing is saved."""
        with directory.open() as checkpointer:
            with pytest.raises(UnsupportedLeafError, match=r"\['bad'\]"):
                checkpointer.save(10, {"bad": object()})
            with pytest.raises(UnsupportedLeafError, match=r"\['bad'\]"):
                checkpointer.save(10, {"a": 1}, items={"more": {"bad": object()}})
            with pytest.raises(InvalidValueError):
                checkpointer.save(10, {"a": 1}, metadata={"bad": object()})
            with pytest.raises(InvalidValueError):
                checkpointer.save(10, {"a": 1}, metrics={"bad": "5"})  # type: ignore[dict-item] # which is refused
            checkpointer.wait()
            assert checkpointer.all_steps() == []
            assert checkpointer.save(10, {"a": 1}) is True
            assert checkpointer.all_steps() == [10]

    # --- What others see meanwhile, and failures.

    @promised_by("Checkpointer.all_steps")
    def test_what_is_listed_can_be_restored(self, directory: CheckpointerDirectory) -> None:
        """Only committed steps are listed: whoever looks while a step is saved can restore what it sees."""
        large = 100_000

        def save() -> None:
            with directory.open() as checkpointer:
                for step in range(10, 70, 10):
                    checkpointer.save(step, {"a": np.full(large, step)})

        with ThreadPoolExecutor(1) as pool, directory.open() as reader:
            saving = pool.submit(save)
            seen: list[int] = []
            while len(seen) < 6 and not (saving.done() and saving.exception()):
                steps = reader.all_steps()
                assert steps == sorted({*seen, *steps})
                for step in {*steps} - {*seen}:
                    loaded = reader.restore(step, {"a": np.zeros(large, int)})
                    assert_same(loaded, {"a": np.full(large, step)})
                seen = steps
            saving.result()

    @promised_by("Checkpointer.wait")
    def test_a_failure_in_the_background_is_raised_once(
        self, directory: CheckpointerDirectory, failing: _Failing
    ) -> None:
        """What goes wrong in the background, ``wait`` raises, once, and no such step is listed."""
        with directory.open() as checkpointer:
            checkpointer.save(10, _tree(10))
            checkpointer.wait()
            with failing():
                error = _failure(lambda: (checkpointer.save(20, _tree(20)), checkpointer.wait()))
            assert not isinstance(error, SaveFailedError) or error.step == 20
            checkpointer.wait()
            assert checkpointer.all_steps() == [10]
            assert_same(checkpointer.restore(None, _tree(0)), _tree(10))
            assert checkpointer.last_committed is not None
            assert checkpointer.last_committed.step == 10
            assert checkpointer.save(20, _tree(21)) is True
            assert_same(checkpointer.restore(20, _tree(0)), _tree(21))

    @promised_by("Checkpointer.all_steps")
    def test_a_step_that_failed_is_seen_by_nobody(
        self, directory: CheckpointerDirectory, failing: _Failing
    ) -> None:
        """A step is there when it is committed, and not before: one whose save failed was never there."""
        with directory.open() as checkpointer:
            checkpointer.save(10, _tree(10), metrics={"loss": 2.0})
            checkpointer.wait()
            with failing():
                background = _fails_later(lambda: checkpointer.save(20, _tree(20), metrics={"loss": 1.0}))
                assert checkpointer.all_steps() == [10]
                assert checkpointer.latest_step() == 10
                assert checkpointer.best_step() == 10
                with pytest.raises(CheckpointNotFoundError):
                    checkpointer.info(20)
                assert_same(checkpointer.restore(None, _tree(0)), _tree(10))
                assert directory.open().all_steps() == [10]
            if background:
                _failure(checkpointer.wait)
        assert directory.open().all_steps() == [10]

    @promised_by("Checkpointer.save", "Checkpointer.close")
    def test_a_failure_is_raised_by_the_next_save_or_by_the_close(
        self, directory: CheckpointerDirectory, failing: _Failing
    ) -> None:
        """The ``save`` after one that failed raises that failure and saves nothing; so does ``close``."""
        checkpointer = directory.open()
        checkpointer.save(10, _tree(10))
        checkpointer.wait()
        with failing():
            if _fails_later(lambda: checkpointer.save(20, _tree(20))):
                checkpointer.all_steps()  # it has happened when this returns
                with pytest.raises(SaveFailedError):
                    checkpointer.save(30, _tree(30))
                assert checkpointer.all_steps() == [10]
            if _fails_later(lambda: checkpointer.save(40, _tree(40))):
                _failure(checkpointer.close)
        checkpointer.close()
        assert directory.open().all_steps() == [10]


def _tree(seed: int) -> PyTree:
    """A small pytree, another one for each seed."""
    random = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(random.normal(size=(3, 4)), jnp.float32),
        "half": jnp.asarray(random.normal(size=5), jnp.bfloat16),
        "n": np.arange(seed, seed + 5),
        "key": jax.random.key(seed, impl="rbg"),
        "k": seed,
    }


def _failure(act: Callable[[], object]) -> Exception:
    with pytest.raises((SaveFailedError, OSError)) as raised:
        act()
    return raised.value


def _fails_later(save: Callable[[], object]) -> bool:
    """Call a save that is to fail; return whether it does so in the background, and not at once."""
    try:
        save()
    except (SaveFailedError, OSError):
        return False
    return True
