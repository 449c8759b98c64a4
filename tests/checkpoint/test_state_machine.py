"""Two writers do all that can be done to a directory, any call fails or ends its writer, and a model agrees.

At least 10,000 rules run in memory and 500 on disk, the same ones each time. With the environment variable
``VIBE_STORE_STATE_MACHINE_STEPS`` set to a number, that many run in memory, a twentieth of them on disk,
and other ones each time; a million takes over an hour::

    VIBE_STORE_STATE_MACHINE_STEPS=1000000 pytest -n 0 tests/checkpoint/test_state_machine.py

Two races are open, and the machine does not mind the garbage that they leave: a step that is replaced at
the very moment at which another writer deletes it, and one that two writers replace, or create and replace,
at once. What is committed is whole in both, but files of the one that lost may stay, and nothing names them.
"""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vibe_store.checkpoint import (
    CheckpointManager,
    initialize_checkpoint_dir,
    list_checkpoints,
    load_manifest,
    load_metadata,
    save_checkpoint,
)
from vibe_store.checkpoint.layout import read_best, write_best
from vibe_store.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedCheckpointWarning,
    SaveFailedError,
    StepAlreadyExistsError,
    VibeStoreError,
    WriterLockedError,
)
from vibe_store.interfaces import Blob, RetentionPolicy, StorageBackend
from vibe_store.retention import best_n, every_steps, keep_any, latest
from vibe_store.run_dir import RunDir
from vibe_store.storage.local import LocalStorage
from vibe_store.storage.memory import MemoryStorage
from vibe_store.testing import Call, Fault, FaultyStorage

pytestmark = pytest.mark.proof

_STEPS_AT_A_TIME = 50
_BAD = -1
"""What a step holds that does not verify."""

Loss = float | Literal["missing"] | None


class Crash(BaseException):
    """The process of a writer ends: nothing of it comes after."""


# --- The model: what a directory holds, and what a manager gives up.


@dataclass(frozen=True)
class Config:
    """How a manager is opened."""

    keep: str = "all"
    period: int | None = None
    mode: Literal["min", "max"] | None = None
    interval: int = 1
    background: bool = False


@dataclass
class Model:
    """What is stored: the save that each step holds, by a number that no other save has."""

    held: dict[int, int] = field(default_factory=dict)
    losses: dict[int, Loss] = field(default_factory=dict)
    pins: set[int] = field(default_factory=set)
    best: int | None = None
    damaged: dict[int, Literal["file", "manifest"]] = field(default_factory=dict)
    scarred: set[int] = field(default_factory=set)
    """Folders that hold or held a manifest that cannot be read, so nobody knows what in them is garbage."""

    def shown(self) -> dict[int, float]:
        """The loss of each step whose manifest can be read; NaN for one without."""
        losses = {step: self.losses[seed] for step, seed in self.held.items()}
        return {
            step: loss if isinstance(loss, float) else math.nan
            for step, loss in losses.items()
            if self.damaged.get(step) != "manifest"
        }

    def best_of(self, mode: Literal["min", "max"] | None, count: int = 1) -> list[int]:
        sign = {"min": 1, "max": -1, None: 0}[mode]
        ranked = sorted((sign * loss, step) for step, loss in self.shown().items() if not math.isnan(loss))
        return [step for _, step in ranked[:count]] if mode else []

    def given_up(self, config: Config, just_saved: int, restored: int | None) -> set[int]:
        """What a manager deletes after it has saved a step."""
        shown = set(self.shown())
        kept = {max(shown), just_saved, self.best} | self.pins | set(self.best_of(config.mode))
        if restored is not None and just_saved <= restored:
            kept.add(restored)
        if config.period is not None:
            kept |= {step for step in shown if step % config.period == 0}
        return shown - kept - _KEPT[config.keep](self)

    def forget(self, steps: Set[int]) -> None:
        for step in steps:
            del self.held[step]
            self.damaged.pop(step, None)
            self.pins.discard(step)


def _hostile(step: int) -> bool:
    return step * 7 % 5 > 1


def _gives_up_at_random(checkpoints: Any, /) -> frozenset[int]:
    return frozenset(info.step for info in checkpoints if _hostile(info.step))


def _gives_up_all(checkpoints: Any, /) -> frozenset[int]:
    return frozenset(info.step for info in checkpoints)


_POLICIES: dict[str, RetentionPolicy] = {
    "all": lambda _: frozenset(),
    "nothing": _gives_up_all,
    "at random": _gives_up_at_random,
    "two": latest(2),
    "some": keep_any(latest(1), every_steps(4), best_n(2, "loss", mode="max")),
}
_KEPT: dict[str, Callable[[Model], set[int]]] = {
    "all": lambda model: set(model.held),
    "nothing": lambda _: set(),
    "at random": lambda model: {step for step in model.held if not _hostile(step)},
    "two": lambda model: set(sorted(model.shown())[-2:]),
    "some": lambda model: {0, 4, 8, max(model.shown()), *model.best_of("max", 2)},
}


# --- What is done to it.


class Trouble:
    """The fault that one operation meets: at its n-th call to the storage, or its n-th deletion."""

    def __init__(
        self, kind: str, at: int, how: Literal["before", "after", "cut"], method: str | None = None
    ) -> None:
        self.kind, self.how, self.method, self.struck = kind, how, method, False
        self.left = at if method is None else at % 4

    def faults(self) -> tuple[Fault, ...]:
        def error() -> BaseException:
            return Crash() if self.kind == "crash" else OSError("injected fault")

        if self.how == "cut":  # only a deletion may be cut in half: everything else is whole or not at all
            return (
                Fault(lambda call: call.method == "delete" and self._now(call), "cut", error),
                Fault(lambda call: call.method != "delete" and self._now(call), "before", error),
                Fault(self._dead, "before", error),
            )
        return Fault(self._now, self.how, error), Fault(self._dead, "before", error)

    def _now(self, call: Call) -> bool:
        if self.struck or self.kind == "none" or self.method not in {None, call.method}:
            return False
        self.left -= 1
        self.struck = self.left < 0
        return self.struck

    def _dead(self, _: Call) -> bool:
        return self.kind == "crash" and self.struck

    def __repr__(self) -> str:
        return f"Trouble({self.kind!r}, {self.how!r}, {self.method!r}, struck={self.struck})"


_troubles = st.builds(
    Trouble,
    st.sampled_from(["none", "none", "fail", "fail", "crash"]),
    st.integers(0, 24),
    st.sampled_from(["before", "after", "cut"]),
    st.sampled_from([None, None, "delete"]),
)


class Between:
    """Does something once, just before the n-th call of an operation on another storage."""

    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self.left, self.act, self.done = at, act, False

    def faults(self) -> tuple[Fault, ...]:
        return (Fault(self._now),)

    def _now(self, _: Call) -> bool:
        self.left -= 1
        if self.left < 0 and not self.done:
            self.done = True
            self.act()
        return False


class Writer:
    """One manager, and the storage as its process sees it."""

    def __init__(self, inner: StorageBackend, config: Config) -> None:
        self.config, self.storage = config, FaultyStorage(inner)
        self.restored: int | None = None
        self.begun = False
        self.manager = CheckpointManager(self.storage, **options(config))


def options(config: Config) -> dict[str, Any]:
    return {
        "retention": _POLICIES[config.keep],
        "keep_period": config.period,
        "save_interval_steps": config.interval,
        "async_timeout_secs": 60.0 if config.background else None,
        "best_fn": None if config.mode is None else lambda metrics: metrics["loss"],
        "best_mode": config.mode or "min",
    }


def content(seed: int, loss: Loss) -> dict[str, Any]:
    """The arguments of one save, apart from its step; the seed decides what goes with it."""
    numbers = {"other": 1.0} if loss == "missing" else {"loss": loss}
    return {
        "pytree": {"k": seed, "w": np.full(3, seed, np.float32)},
        "items": {"aux": np.full(2, seed)} if seed % 3 == 0 else None,
        "metadata": {"seed": seed} if seed % 4 == 0 else None,
        "metrics": None if loss is None else numbers,
    }


_who = st.sampled_from([0, 1])
_steps = st.integers(0, 7)
_losses = st.sampled_from([None, "missing", math.nan, -math.inf, 1.0, 2.0, 2.0, 3.0])
_configs = st.builds(
    Config,
    keep=st.sampled_from(sorted(_POLICIES)),
    period=st.sampled_from([None, 3]),
    mode=st.sampled_from([None, "min", "max"]),
    interval=st.sampled_from([1, 1, 2]),
    background=st.booleans(),
)


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


def save_with(
    manager: CheckpointManager, step: int, seed: int, loss: Loss, *, force: bool, expect: bool = True
) -> None:
    """Save, and spoil what was passed as soon as the manager has it."""
    arguments = content(seed, loss)
    assert manager.save(step, force=force, **arguments) is expect
    arguments["pytree"]["w"][:] = -1
    arguments["pytree"]["k"] = -1


class Directory(RuleBasedStateMachine):
    """A directory of checkpoints, two managers that write to it, and a model of it."""

    make: ClassVar[Callable[[], StorageBackend]]
    rules_run: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = type(self).make()
        self.reader = CheckpointManager(self.inner)
        self.model = Model()
        self.configs = [Config(), Config()]
        self.writers: list[Writer | None] = [None, None]
        self.known: dict[tuple[Blob, ...], int] = {}
        self.listed: object = None
        self.just_swept = False
        self.on_disk = self.inner.local_path("") is not None

    @initialize(one=_configs, other=_configs)
    def open(self, one: Config, other: Config) -> None:
        self.configs = [one, other]

    # --- Rules: each does one thing, and compares what is stored with what that may have led to.

    @rule(
        who=_who,
        step=_steps,
        loss=_losses,
        force=st.booleans(),
        trouble=_troubles,
        told=st.sampled_from(["wait", "close", "save"]),
    )
    def save(self, who: int, step: int, loss: Loss, force: bool, trouble: Trouble, told: str) -> None:
        writer, seed, exists = self._writer(who), self._new(loss), step in self.model.held
        skipped = step % writer.config.interval != 0 and not force
        changes = len(writer.storage.calls)

        def act() -> None:
            save_with(writer.manager, step, seed, loss, force=force, expect=not skipped)
            if trouble.kind == "none" and not exists:
                return  # it goes on in the background, and whoever looks waits for it
            if told == "save" and not exists and not skipped:
                with suppress(OSError):  # unless the first one's failure is raised
                    writer.manager.save(step, 0, force=True)
                    writer.manager.wait()
            elif told == "close":
                writer.manager.close()
            writer.manager.wait()

        error = self._try(writer.storage, trouble, act)
        self._after_trouble(who, trouble)
        if told == "close":
            self._close(who)
        now = self._observe()
        if skipped or (exists and isinstance(error, StepAlreadyExistsError)):
            assert skipped == (error is None)
            assert now == self._before()
            assert not skipped or len(writer.storage.calls) == changes
        elif exists:
            assert trouble.struck
            assert now == self._before()
        else:
            self._check_saved(writer, step, seed, now, error, trouble)
        writer.begun = True

    def _check_saved(
        self,
        writer: Writer,
        step: int,
        seed: int,
        now: dict[int, int],
        error: BaseException | None,
        trouble: Trouble,
    ) -> None:
        before = self._before()
        self.model.held[step] = seed
        doomed = self.model.given_up(writer.config, step, writer.restored)
        if not trouble.struck:
            assert error is None
            assert now == {s: held for s, held in (before | {step: seed}).items() if s not in doomed}
            self.just_swept |= not writer.begun
        else:
            committed, said = step in now, error is None or f"Step {step} was saved" in str(error)
            assert committed or not said
            assert trouble.kind == "crash" or trouble.how == "after" or committed == said
            if committed:
                assert now.items() <= (before | {step: seed}).items()
                assert before.keys() - now.keys() <= doomed
            else:
                assert now == before
        self.model.forget(self.model.held.keys() - now.keys())

    @rule(who=_who, saves=st.lists(st.tuples(_steps, _losses), min_size=1, max_size=4))
    def train(self, who: int, saves: list[tuple[int, Loss]]) -> None:
        """Save some steps in a row, with nothing between that would look at the directory."""
        for step, loss in saves:
            self.save(who, step, loss, True, Trouble("none", 0, "before"), "wait")

    @rule(step=_steps, loss=_losses, trouble=_troubles)
    def overwrite(self, step: int, loss: Loss, trouble: Trouble) -> None:
        seed, storage = self._new(loss), FaultyStorage(self.inner)
        error = self._try(
            storage, trouble, lambda: save_checkpoint(storage, step=step, **content(seed, loss))
        )
        now, before = self._observe(), self._before()
        self.just_swept |= not trouble.struck and "manifest" not in self.model.damaged.values()
        if error is None or now.get(step) == seed:
            assert now == before | {step: seed}
            self._replaced(step, seed)
        else:
            assert now == before
        assert error is None or trouble.struck
        if trouble.kind == "fail" and trouble.how != "after":
            assert (error is None) == (now.get(step) == seed)

    @rule(who=_who, step=st.none() | _steps, trouble=_troubles)
    def restore(self, who: int, step: int | None, trouble: Trouble) -> None:
        writer, before, found = self._writer(who), self._before(), []
        good = [s for s, held in before.items() if held != _BAD]
        wanted = max(good, default=None) if step is None else step
        newer = [s for s in before if step is None and s not in good and s > (wanted or 0)]

        def act() -> None:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                loaded = writer.manager.restore(step, content(0, None)["pytree"])
            found.append(loaded["k"])
            assert [w.category for w in told] == [DamagedCheckpointWarning] * len(newer)

        error = self._try(writer.storage, trouble, act)
        self._after_trouble(who, trouble)
        if found:
            assert wanted is not None
            assert found == [before[wanted]]
            writer.restored = wanted
        elif not trouble.struck:
            damaged = bool(before) if step is None else step in before
            assert isinstance(error, CorruptCheckpointError if damaged else CheckpointNotFoundError)
            assert wanted not in good

    @rule(who=_who, step=_steps, pinned=st.booleans(), trouble=_troubles)
    def pin_or_unpin(self, who: int, step: int, pinned: bool, trouble: Trouble) -> None:
        writer = self._writer(who)
        act = writer.manager.pin if pinned else writer.manager.unpin
        error = self._try(writer.storage, trouble, lambda: act(step))
        self._after_trouble(who, trouble)
        done = error is None or (trouble.struck and pinned == self._is_pinned(step))
        if done:
            (self.model.pins.add if pinned else self.model.pins.discard)(step)
        elif not trouble.struck:
            bad = self.model.damaged.get(step) == "manifest"
            assert bad or step not in self.model.held
            assert isinstance(error, CorruptCheckpointError if bad else CheckpointNotFoundError)
        if error is None and not trouble.struck:
            self.just_swept |= not writer.begun
        writer.begun = True

    @rule(step=_steps, trouble=_troubles)
    def mark_best(self, step: int, trouble: Trouble) -> None:
        storage = FaultyStorage(self.inner)
        error = self._try(storage, trouble, lambda: self._mark(storage, step))
        assert error is None or trouble.struck
        if error is None or read_best(self.inner) == step:
            self.model.best = step

    @precondition(lambda self: self.model.held and not self.model.damaged)
    @rule(
        index=st.integers(0, 9),
        what=st.sampled_from(["file", "manifest"]),
        how=st.sampled_from(["flip", "cut", "gone"]),
    )
    def damage(self, index: int, what: Literal["file", "manifest"], how: str) -> None:
        self._wait()
        step = sorted(self.model.held)[index % len(self.model.held)]
        name = "manifest.json"
        if what == "file":
            name = load_manifest(self.inner, step=step).items["state"].files["state.eqx"].key
        key = f"step_{step}/{name}"
        data = bytearray(self.inner.read(key))
        data[len(data) // 2] ^= 4
        if how == "gone" and what == "file":
            self.inner.delete([key])
        else:
            self.inner.write(key, bytes(data) if how == "flip" else bytes(data[:-1]))
        self.model.damaged[step] = what
        if what == "manifest":
            self.model.scarred.add(step)

    @rule(who=_who, config=_configs)
    def reopen(self, who: int, config: Config) -> None:
        self._close(who)
        self.configs[who] = config
        self._writer(who)

    @rule(who=_who, config=_configs)
    def resume(self, who: int, config: Config) -> None:
        self._wait()
        self._close(who)
        self.configs[who] = config
        before = self._before()
        good = max((s for s, held in before.items() if held != _BAD), default=-1)
        aside = {s for s in before if s > good}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            manager, resuming = initialize_checkpoint_dir(self.inner, resume=True, **options(config))
        manager.close()
        assert [w.category for w in told] == [DamagedCheckpointWarning] * len(aside)
        assert resuming == (good >= 0)
        for step in aside:
            del self.model.held[step], self.model.damaged[step]
        self.model.scarred |= aside

    @rule(
        who=_who,
        outer=st.sampled_from(["save", "overwrite", "restore", "restore newest"]),
        step=_steps,
        loss=_losses,
        inner=st.sampled_from(["save", "open and save", "overwrite", "pin", "mark"]),
        other_step=st.none() | _steps,
        other_loss=_losses,
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
        if between.done and self._may_leave_files(one, other, doomed):
            self.model.scarred.add(other.step)

    def _may_leave_files(self, one: Act, other: Act, doomed: set[int]) -> bool:
        """Whether the races that the module's docstring names may have been lost."""
        if one.what == "overwrite":
            return other.writes and one.step == other.step
        return one.what == "save" and other.what == "overwrite" and other.step in doomed

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
                patch.setattr("vibe_store.checkpoint.writer._SURELY_DEAD_SECS", 86400.0)
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
                steps = {max((s for s in held if held[s] != _BAD), default=-1) for held in (before, now)}
            seeds = {seed: step for step in steps for seed in possible.get(step, ())}
            if act.error is None:
                assert act.loaded in seeds.keys() - {_BAD}
                act.writer.restored = seeds[act.loaded]
            else:
                assert isinstance(act.error, CheckpointNotFoundError | CorruptCheckpointError)
                assert _BAD in before.values() or steps - before.keys() or steps & doomed
        elif act.what == "pin" and act.error is not None:
            assert isinstance(act.error, CheckpointNotFoundError | CorruptCheckpointError)
            assert act.step not in before or act.step in doomed or before[act.step] == _BAD
        elif act.what == "pin" and act.step in now:
            self.model.pins.add(act.step)
        elif act.what == "mark":
            self.model.best = act.step
        else:
            assert act.error is None
        act.writer.begun = True

    @precondition(lambda self: self.on_disk)
    @rule(step=_steps)
    def save_while_another_process_writes(self, step: int) -> None:
        self._close(0)
        self._close(1)
        path = self.inner.local_path(".vibe_store/writer.lock")
        assert path is not None
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            json.dump({"pid": 1, "purpose": "manager"}, lock)
            lock.flush()
            with pytest.raises(WriterLockedError):
                self._writer(0).manager.save(step, 0, force=True)

    # --- After each rule.

    @invariant()
    def what_is_stored_is_what_the_model_says(self) -> None:
        type(self).rules_run += 1
        model = self.model
        assert self._observe() == self._before()
        for writer in filter(None, self.writers):
            best = model.best_of(writer.config.mode)
            assert writer.manager.best_step() == (best[0] if best else None)
        stored = (model.best, tuple(self.inner.list()))
        if stored != self.listed:
            self._check_listings()
        self.listed = stored
        if self.just_swept and "manifest" not in model.damaged.values():
            assert self._garbage() == set()
        self.just_swept = False

    def _check_listings(self) -> None:
        model, steps = self.model, sorted(self.model.held)
        for manager in (self.reader, *(writer.manager for writer in self.writers if writer)):
            assert manager.all_steps() == steps
        statuses = list_checkpoints(self.inner)
        seen = {status.step for status in statuses}
        if self.on_disk:
            seen |= {step for step, _ in self._run_dir().list_checkpoints()}
        assert set(steps) <= seen <= set(steps) | model.scarred
        for status in statuses:
            if status.step in model.held:
                damaged = model.damaged.get(status.step) == "manifest"
                assert status.status == ("damaged" if damaged else "committed")
                assert status.best == (status.step == model.best)
                assert damaged or (status.info and status.info.pinned == (status.step in model.pins))

    def teardown(self) -> None:
        for who in (0, 1):
            self._close(who)
        root = self.inner.local_path("")
        if root is None:
            self.inner.delete([blob.key for blob in self.inner.list()])
        else:
            shutil.rmtree(root.parent, ignore_errors=True)

    # --- Helpers.

    def _writer(self, who: int) -> Writer:
        writer = self.writers[who]
        if writer is None:
            writer = self.writers[who] = Writer(self.inner, self.configs[who])
        return writer

    def _close(self, who: int) -> None:
        writer, self.writers[who] = self.writers[who], None
        if writer is not None:
            writer.manager.close()

    def _wait(self) -> None:
        for writer in filter(None, self.writers):
            writer.manager.wait()

    def _new(self, loss: Loss) -> int:
        seed = len(self.model.losses)
        self.model.losses[seed] = loss
        return seed

    def _try(
        self, storage: FaultyStorage, trouble: Trouble | Between | None, act: Callable[[], object]
    ) -> BaseException | None:
        """Do something that may fail, in a process that a crash leaves dead."""
        storage.faults = trouble.faults() if trouble else ()
        try:
            act()
        except (VibeStoreError, OSError, Crash) as error:
            if isinstance(error, SaveFailedError):
                expected = isinstance(error.__cause__, Crash) or "injected fault" in str(error)
                assert expected, error  # noqa: PT017 - not every failure is one of the save
            return error
        finally:
            if not (isinstance(trouble, Trouble) and trouble.kind == "crash"):
                storage.faults = ()
        return None

    def _after_trouble(self, who: int, trouble: Trouble) -> None:
        writer = self.writers[who]
        assert writer is not None
        if trouble.kind == "crash" and trouble.struck:
            self.writers[who] = None
            with suppress(SaveFailedError):
                writer.manager.close()  # unlocks, as the end of a process does; its storage is dead
        else:
            writer.storage.faults = ()

    def _replaced(self, step: int, seed: int) -> None:
        self.model.held[step] = seed
        self.model.damaged.pop(step, None)

    def _before(self) -> dict[int, int]:
        return {step: _BAD if step in self.model.damaged else seed for step, seed in self.model.held.items()}

    def _observe(self) -> dict[int, int]:
        """Return which save each committed step holds; what did not change is not loaded again."""
        self._wait()
        folders: dict[str, list[Blob]] = {}
        for blob in self.inner.list("step_"):
            folders.setdefault(blob.key.partition("/")[0], []).append(blob)
        now = {}
        for folder, blobs in folders.items():
            if any(blob.key == f"{folder}/manifest.json" for blob in blobs):
                step, objects = int(folder.removeprefix("step_")), tuple(blobs)
                if objects not in self.known:
                    self.known[objects] = self._load(step)
                now[step] = self.known[objects]
        return now

    def _load(self, step: int) -> int:
        like = content(0, None)
        try:
            with_items = "aux" in load_manifest(self.inner, step=step).items
            state, items = self.reader.restore(
                step, like["pytree"], items=like["items"] if with_items else {}
            )
        except CorruptCheckpointError:
            return _BAD
        seed = int(state["k"])
        saved = content(seed, self.model.losses[seed])
        assert state["w"].tobytes() == saved["pytree"]["w"].tobytes()
        assert with_items == (saved["items"] is not None)
        assert not with_items or items["aux"].tobytes() == saved["items"]["aux"].tobytes()
        assert load_metadata(self.inner, step=step) == saved["metadata"]
        assert repr(self.reader.info(step).metrics) == repr(saved["metrics"])
        return seed

    def _mark(self, storage: StorageBackend, step: int) -> None:
        if self.on_disk:
            self._run_dir().mark_best(step)
        else:
            write_best(storage, step)

    def _run_dir(self) -> RunDir:
        root = self.inner.local_path("")
        assert root is not None
        return RunDir(base_dir=root.parents[1], run_id=root.parent.name)

    def _is_pinned(self, step: int) -> bool:
        return any(blob.key == f"step_{step}/pinned" for blob in self.inner.list(f"step_{step}/"))

    def _garbage(self) -> set[str]:
        """Every key that no manifest names, apart from the known ones and from folders that are scarred."""
        root = self.inner.local_path("")
        keys = {blob.key for blob in self.inner.list()}
        if root is not None:
            keys = {
                str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()
            }
        keys -= {"best", ".vibe_store/writer.lock"}
        for step in self.model.held:
            files = load_manifest(self.inner, step=step).files
            keys -= {f"step_{step}/{name}" for name in ("manifest.json", *(file.key for file in files))}
        keys -= {f"step_{step}/pinned" for step in self.model.pins}
        return {
            key
            for key in keys
            if key.partition("/")[0] not in {f"step_{step}" for step in self.model.scarred}
        }


def _run(make: Callable[[], StorageBackend], rules: int) -> None:
    by_hand = _BY_HAND is not None

    class Machine(Directory):
        rules_run = 0

    Machine.make = staticmethod(make)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=math.ceil(rules / _STEPS_AT_A_TIME * 1.3),
            stateful_step_count=_STEPS_AT_A_TIME,
            derandomize=not by_hand,
            database=None,
            deadline=None,
            print_blob=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Machine.rules_run >= rules


_BY_HAND = os.environ.get("VIBE_STORE_STATE_MACHINE_STEPS")


@pytest.mark.usefixtures("dead_at_once")
def test_a_directory_in_memory_holds_what_the_model_says(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(fast_path))  # what is loaded from memory passes through it
    _run(lambda: MemoryStorage(f"memory://{uuid.uuid4().hex}"), int(_BY_HAND or 10_000))


@pytest.mark.usefixtures("dead_at_once")
def test_a_directory_on_disk_holds_what_the_model_says(fast_path: Path) -> None:
    _run(
        lambda: LocalStorage(str(fast_path / uuid.uuid4().hex / "checkpoints")), int(_BY_HAND or 10_000) // 20
    )
