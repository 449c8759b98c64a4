"""A rule that does one thing between two calls of another."""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from vibe_store.checkpoint import save_checkpoint
from vibe_store.checkpoint.unnamed import sweep_unnamed
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    StepAlreadyExistsError,
)
from vibe_store.interfaces import StorageBackend
from vibe_store.testing.faulty_storage import FaultyStorage
from vibe_store.testing.state_machine.doing import LOSSES, STEPS, WHO, Between, Writer, content, save_with
from vibe_store.testing.state_machine.model import BAD, Loss
from vibe_store.testing.state_machine.stored import Stored


@dataclass
class Act:
    """One of two things that happen at the same time, and what came of it."""

    what: str
    writer: Writer
    step: int
    seed: int
    loss: Loss
    error: BaseException | None = None
    loaded: int | None = None

    @property
    def writes(self) -> bool:
        return self.what in {"save", "overwrite"}


class TwoAtOnce(Stored):
    """Two things happen at the same time, in each order of their calls in which one comes between."""

    @rule(
        who=WHO,
        outer=st.sampled_from(["save", "overwrite", "restore", "restore newest"]),
        step=STEPS,
        loss=LOSSES,
        inner=st.sampled_from(["save", "open and save", "overwrite", "pin", "mark"]),
        other_step=st.none() | STEPS,
        other_loss=LOSSES,
        at=st.integers(0, 16),
        elsewhere=st.booleans(),
    )
    def do_one_thing_between_two_calls_of_another(
        self,
        who: int,
        outer: str,
        step: int,
        loss: Loss,
        inner: str,
        other_step: int | None,
        other_loss: Loss,
        at: int,
        elsewhere: bool,
    ) -> None:
        self._wait()
        if inner == "open and save":
            self._close(1 - who)
        one = Act(outer.split()[-1], self._writer(who), step, self._new(loss), loss)
        if outer == "save":  # of a step that is new; the rule `save` tries the others
            step = next((s for s in (*range(step, 8), *range(step)) if s not in self.model.held), step)
        other_step = step if other_step is None else other_step
        other = Act(inner.split()[-1], self._writer(1 - who), other_step, self._new(other_loss), other_loss)
        doomed = self._may_delete(one, other)
        between = Between(at, lambda: self._in_between(other, elsewhere=elsewhere))
        storage = one.writer.storage if one.what != "overwrite" else FaultyStorage(self.inner)
        one.error = self._try(storage, between, lambda: self._do(one, storage))
        storage.faults = ()
        self._check_both(one, other, happened=between.done, doomed=doomed)

    def _may_delete(self, one: Act, other: Act) -> set[int]:
        """What either writer may delete, whether or not it sees what the other changes.

        A pin that it does not see only spares more.
        """
        doomed: set[int] = set()
        for mine, theirs in ((one, other), (other, one)):
            for seen in ([mine, theirs], [mine]) if mine.what == "save" else ():
                held = self.model.held | {act.step: act.seed for act in seen if act.writes}
                best = theirs.step if theirs in seen and theirs.what == "mark" else self.model.best
                damaged = {s: how for s, how in self.model.damaged.items() if held[s] == self.model.held[s]}
                guess = dataclasses.replace(self.model, held=held, best=best, damaged=damaged)
                doomed |= guess.given_up(mine.writer.config, mine.step, mine.writer.restored)
        return doomed

    def _in_between(self, act: Act, *, elsewhere: bool) -> None:
        """Do something as another thread of this process does it, or, in memory, as another process."""
        with pytest.MonkeyPatch.context() as patch:
            if elsewhere and not self.on_disk:
                patch.setattr("vibe_store.checkpoint.pending._alive", set())
                patch.setattr(
                    "vibe_store.checkpoint.manager.sweep_unnamed",
                    lambda storage, **_: sweep_unnamed(storage, older_than=86_400.0),
                )
            act.error = self._try(act.writer.storage, None, lambda: self._do(act, FaultyStorage(self.inner)))

    def _do(self, act: Act, storage: StorageBackend) -> None:
        manager, step = act.writer.manager, act.step
        if act.what == "save":
            save_with(manager, step, act.seed, act.loss, force=True)
            manager.wait()
        elif act.what == "overwrite":
            save_checkpoint(storage, step=step, **content(act.seed, act.loss))
        elif act.what == "pin":
            manager.pin(step)
        elif act.what == "mark":
            self._mark(storage, step)
        else:
            wanted = None if act.what == "newest" else step
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DamagedCheckpointWarning)
                act.loaded = manager.restore(wanted, content(0, None)["pytree"])["k"]

    def _check_both(self, one: Act, other: Act, *, happened: bool, doomed: set[int]) -> None:
        before, now = self._before(), self._observe()
        acts = [one, other] if happened else [one]
        written = [act for act in acts if act.writes and act.error is None]
        possible = {step: {held} for step, held in before.items()}
        for act in written:
            possible.setdefault(act.step, set()).add(act.seed)
        assert now.keys() <= possible.keys()
        assert possible.keys() - now.keys() <= doomed
        for act in acts:
            self._check_act(act, before, now, written, possible, doomed)
        for step in now.keys() & {act.step for act in written}:
            here = [act for act in written if act.step == step]
            last = [act for act in here if act.what == "overwrite"] or here
            assert now[step] in {act.seed for act in last}
            self._replaced(step, now[step])
        self.model.forget(self.model.held.keys() - now.keys())

    def _check_act(
        self,
        act: Act,
        before: Mapping[int, int],
        now: Mapping[int, int],
        written: list[Act],
        possible: Mapping[int, set[int]],
        doomed: set[int],
    ) -> None:
        """Check that what came of one thing is something that could come of it, and note what it changed."""
        others = [each for each in written if each is not act and each.step == act.step]
        if act.what == "save" and act.error is None:
            assert act.step not in before or act.step in doomed
            assert all(each.what != "save" for each in others)
        elif act.what == "save":
            assert isinstance(act.error, StepAlreadyExistsError)
            assert act.step in before or others
        elif act.what in {"restore", "newest"}:
            steps = {act.step}
            if act.what == "newest":
                steps = {max((s for s in held if held[s] != BAD), default=-1) for held in (before, now)}
            seeds = {seed: step for step in steps for seed in possible.get(step, ())}
            if act.error is None:
                assert act.loaded in seeds.keys() - {BAD}
                act.writer.restored = seeds[act.loaded]
            else:
                assert isinstance(act.error, CheckpointNotFoundError | CorruptCheckpointError)
                assert BAD in before.values() or steps - before.keys() or steps & doomed
        elif act.what == "pin" and act.error is not None:
            assert isinstance(act.error, CheckpointNotFoundError | CorruptCheckpointError)
            assert act.step not in before or act.step in doomed or before[act.step] == BAD
        elif act.what == "pin" and act.step in now:
            self.model.pins.add(act.step)
        elif act.what == "mark":
            self.model.best = act.step
        else:
            assert act.error is None
        act.writer.begun = True
